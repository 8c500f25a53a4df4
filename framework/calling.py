"""How a module's forward is called on a batch: with what it names."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..strategies.batches import is_by_position

Call = Callable[[nn.Module, Any], Any]


def forward_call(module: nn.Module) -> Call:
    """Make the function that calls the model on a batch, from the signature of the module's forward.

    Returns:
        A function (model, batch) -> outputs, where ``model`` may be a wrapper around ``module``. It raises a ValueError
        where the batch lacks what forward needs, or is a list that can be read in two ways.
    """
    name = f"{type(module).__name__}.forward"
    parameters = list(inspect.signature(module.forward).parameters.values())
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    takes_rest = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    names = [p.name for p in named if p.kind is not p.POSITIONAL_ONLY]
    positions = len([p for p in named if p.kind is not p.KEYWORD_ONLY])
    required = [p.name for p in named if p.default is p.empty]
    lists_are_whole = positions <= 1 and not takes_rest

    def call(model: nn.Module, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            arguments = dict(batch) if takes_all else {name: batch[name] for name in names if name in batch}
            missing = [name for name in required if name not in arguments]
            if missing:
                raise ValueError(
                    f"{name} needs {', '.join(missing)}, which the batch doesn't hold. "
                    f"forward names {', '.join(names)}; the batch's keys are {', '.join(map(str, batch))}."
                )
            return model(**arguments)
        if is_by_position(batch):
            if len(batch) < len(required):
                raise ValueError(
                    f"{name} needs {len(required)} inputs ({', '.join(required)}), but the "
                    f"batch is a {type(batch).__name__} of {len(batch)}."
                )
            return model(*(batch if takes_rest else batch[:positions]))
        if not lists_are_whole and isinstance(batch, list):
            check_list(batch)
        return model(batch)

    def check_list(batch: list[Any]) -> None:
        nonlocal lists_are_whole
        ways = (
            "Have collate_fn return a tuple if its entries are forward's inputs, and (batch,), a tuple of one, if the "
            "list is its first input."
        )
        if len(required) > 1:
            raise ValueError(
                f"{name} needs {len(required)} inputs ({', '.join(required)}), but the batch is a list of "
                f"{len(batch)}, which is one input. {ways}"
            )
        if len(batch) > 1 and (takes_rest or len(batch) <= positions):
            raise ValueError(
                f"The batch is a list of {len(batch)}, and {name} could take it in two ways: whole as "
                f"{names[0] if names else 'its first input'}, or entry by entry as {len(batch)} inputs. {ways}"
            )
        # A longer list can only be whole, and so is every other batch of the same collate_fn, also a short last one.
        lists_are_whole = len(batch) > positions

    return call
