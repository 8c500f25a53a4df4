"""Asking for a plan of all candidates, by the words of a command line."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ..configuration.command_line import Command, values_of
from ..configuration.options import strategy_class
from .asking import FIT, MARGIN, PlanningError, check
from .candidates import choose_among
from .child import answered, played
from .choosing import Candidate, Choice
from .devices import Device, find_device
from .forked import run_forked


@dataclass(frozen=True)
class PlannedChoice:
    """A choice that was planned: for a device, and a number of nodes."""

    choice: Choice
    device: Device
    nodes: int


def choose_by_words(
    words: Sequence[str],
    world_size: int,
    device: str,
    nodes: int | None = None,
    margin: float = MARGIN,
    host_memory: int | None = None,
) -> PlannedChoice:
    """Choose the strategy of what a command line configures, as ``stratagem fit`` takes it without ``--strategy``.

    Args:
        words: of the command line, the target among them.
        world_size, device, nodes, margin: see ``plan_of``.
        host_memory: bytes of the host's memory for each rank; None where that isn't known.

    Raises:
        ValueError: nothing can be chosen; says why and what to write instead.
        PlanningError: the words can't work, or a copy of this process ended; the message has what it printed.
    """
    named = [word for word in words if word.startswith("--strategy")]
    if named and not stands_for_candidates(words):
        raise ValueError(f"--auto chooses the strategy: leave out {named[0]}, or --auto.")
    found = find_device(device)
    nodes = check(world_size, nodes, margin)
    read = run_forked([partial(settings, words)], {})[0]
    if read.answer is None:
        raise PlanningError(read.status, read.printed)
    room = int(found.memory * (1 - margin))
    host_room = None if host_memory is None else int(host_memory * (1 - margin))
    play = partial(play_words, words, world_size // nodes)
    choice = choose_among(play, world_size, nodes, room, host_room, **read.answer)
    return PlannedChoice(choice, found, nodes)


def stands_for_candidates(words: Sequence[str]) -> bool:
    """Whether the strategy that the words name stands for one that is chosen."""
    named = values_of(words, "strategy")
    return bool(named) and strategy_class(named[-1]).chooses


def settings(words: Sequence[str]) -> dict[str, Any]:
    """Read the words, and return what of them candidates follow from: arguments of ``choose_among``."""
    values = Command("stratagem plan", "", names_target=True).read(words).values
    steps = 0 if values.get("gradient_accumulation_schedule") else values.get("gradient_accumulation_steps", 1)
    return {"checkpoints": bool(values.get("gradient_checkpointing")), "accumulation": steps}


def play_words(words: Sequence[str], per_node: int, candidate: Candidate) -> Mapping[str, Any]:
    """Play a candidate of what the words configure."""
    request = {
        "words": words, "config": None, "fit": FIT, "ranks_per_node": per_node, "candidate": asdict(candidate),
    }  # fmt: skip
    return answered(partial(played, request))
