"""A run that goes on from a checkpoint whose strategy was chosen: the same choice, or what has changed since."""

from collections.abc import Mapping
from typing import Any

from .choosing import Choice, Figures


def choice_to_go_on_with(saved: Mapping[str, Any], here: Choice) -> tuple[Choice, str]:
    """Choose between a checkpoint's choice and the one that was made here.

    What was measured, or has run out of memory, since the plans were made counts on: where the plans are the same (the
    machine, and what of the arguments they depend on), the checkpoint's choice is taken.

    Args:
        saved: the checkpoint's state, see ``checkpoint.read_state``.
        here: what was chosen here.

    Returns:
        The choice to go on with, and what is to be said of it; "" where there is nothing to say.
    """
    if "choice" not in saved:
        return here, f"it was saved under strategy={saved['strategy']!r}, which nothing had chosen."
    there = Choice.from_dict(saved["choice"])
    assert there.chosen is not None and here.chosen is not None
    if there.planned == here.planned:
        if there.chosen == here.chosen:
            return there, ""
        return there, f"strategy='auto' goes on with its choice, {there.chosen.python}."
    changed = difference(there, here)
    if there.chosen == here.chosen:
        return here, f"strategy='auto' chose {here.chosen.python} again, though {changed}."
    return here, f"strategy='auto' chose {there.chosen.python} there, and {here.chosen.python} here, since {changed}."


def difference(there: Choice, here: Choice) -> str:
    """Say the first thing in which two choices' plans differ."""
    for name, what in (("room", "the device"), ("host_room", "the host's memory")):
        before, now = getattr(there, name), getattr(here, name)
        if before != now:
            return f"a rank has {said(now)} of {what}, and had {said(before)}"
    figures: dict[str, Figures] = here.planned["figures"]
    earlier: dict[str, Figures] = there.planned["figures"]
    if figures.keys() != earlier.keys():
        return "the candidates aren't the same, as where there are more ranks or nodes"
    title = next(title for title, each in earlier.items() if figures[title] != each)
    before, now = earlier[title], figures[title]
    if before.need != now.need:
        return f"{title} needs {now.need:,} bytes by its plan, and needed {before.need:,}"
    return f"the plan of {title} is another one"


def said(size: int | None) -> str:
    """Write a size that may not be known."""
    return "an unknown part" if size is None else f"{size:,} bytes"
