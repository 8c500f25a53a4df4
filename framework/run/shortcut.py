"""Shortcut: a call of what torch.compile has compiled, straight to it where its guards hold.

torch.compile's own wrapper prepares for code that isn't compiled yet, at each call, which takes longer than the guards
and, for a small model, half as long as the program. The guards are asked here all the same; where they don't hold, the
caller goes through torch.compile.
"""

import types
from collections.abc import Callable
from typing import Any

import torch


class Shortcut:
    """Calls a compiled function of (model, inputs, num_items).

    Args:
        function: the one that torch.compile was given.
        entry: of torch.compile's cache.
    """

    def __init__(self, function: types.FunctionType, entry: Any) -> None:
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        self.seen: dict[str, Any] = {name: cell.cell_contents for name, cell in cells}
        self.guards_hold: Callable[[dict[str, Any]], bool] = entry.guard_manager.check
        self.call: Callable[[Any, Any, Any], Any] = types.FunctionType(
            entry.code, function.__globals__, function.__name__, None, function.__closure__
        )

    def holds(self, model: Any, inputs: Any, num_items: Any) -> bool:
        """Whether the function was compiled for such arguments, and for all else that it reads in Python."""
        seen = self.seen
        seen["model"], seen["inputs"], seen["num_items"] = model, inputs, num_items
        return self.guards_hold(seen)


def shortcut_to(function: types.FunctionType) -> Shortcut | None:
    """Make the shortcut to what a function was compiled to last; None where this torch keeps it elsewhere."""
    try:
        entries = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(function.__code__)
        return Shortcut(function, entries[0]) if entries else None
    except AttributeError:
        return None
