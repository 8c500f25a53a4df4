"""``strategy="auto"``: a Fit that is being made is played under each candidate, in copies of its process, and goes on
with the one that is chosen.
"""

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ...strategies.launch import start_ranks
from ...strategies.played import Here, Stage, cuts_of, look_here, play, told_by_first, world_of
from ..arguments import FitArguments
from ..fields.argument_ranges import names_in
from ..printing import console_for_tables, say
from .asking import MARGIN, PlanningError
from .candidates import arguments_of, choose_among, strategy_of
from .child import WITHOUT_EFFECT, answered
from .choice_shown import choice_shown
from .choosing import Candidate, Choice
from .playing import Player

if TYPE_CHECKING:
    from ...strategies.base import Strategy
    from ..steps import Steps

OF_FIT = "devices", "max_restarts"  # in WITHOUT_EFFECT, and no fields of FitArguments


def choose_for(
    make: Callable[..., None],
    fit: "Steps",
    args: FitArguments,
    chooser: "Strategy",
    devices: int | str,
    max_restarts: int,
) -> "tuple[Strategy, FitArguments, Choice]":
    """Choose a strategy for a Fit that is being made. Every rank calls it, before anything is placed.

    Rank 0 plays and tells the others. The device is the one that is here.

    Args:
        make: makes the Fit, given strategy, args and loggers.
        fit: that it makes.
        args: of the run.
        chooser: stands for the strategy; where it has candidates measured, the table is printed after that.
        devices, max_restarts: see ``start_ranks``.

    Returns:
        The strategy, the arguments with what was chosen of them, and why.

    Raises:
        ValueError: on every rank; nothing can be chosen. Says why and what to write instead.
    """
    start_ranks(chooser, devices, max_restarts, names_in(args.preemption_signals), is_quiet=not args.progress)
    here = look_here()
    told: Mapping[str, Any] = {}
    if here.rank == 0:
        told = decided(partial(decide, make, fit, args, here))
    told = told_by_first(here, told)
    if "problem" in told:
        raise ValueError(told["problem"])
    choice = Choice.from_dict(told)
    if here.rank == 0 and args.progress and not chooser.candidates_to_measure:
        show(choice, here.world_size)
    if choice.chosen is None:
        least = min((each.figures.need for each in choice.verdicts if not each.figures.problem), default=None)
        raise ValueError(nothing_fits(choice, least))
    if choice.is_static:
        warnings.warn(
            "strategy='auto': no update of this module could be played, so that what is held decided, without "
            f"activations. It is {choice.chosen.python}.",
            stacklevel=3,
        )
    return strategy_of(choice.chosen), args.replace(**arguments_of(choice.chosen, args)), choice


def decided(decide: Callable[[], Choice]) -> dict[str, Any]:
    """Decide, and return what ranks are told: the choice, or the "problem"."""
    try:
        return decide().to_dict()
    except (ValueError, TypeError, ImportError, PlanningError) as error:
        return {"problem": f"strategy='auto': {error}"}


def nothing_fits(choice: Choice, least: int | None) -> str:
    """Say that no candidate can run, and what to do."""
    if least is None:
        return f"strategy='auto' has no candidate that can run: {choice.verdicts[0].sentence}"
    return (
        f"strategy='auto' has no candidate that fits: the smallest needs {least:,} bytes, and {choice.room:,} are "
        "there with a margin. Take more ranks, a smaller per_device_train_batch_size with more "
        "gradient_accumulation_steps, or another precision; or name a strategy, to try all the same."
    )


def decide(make: Callable[..., None], fit: "Steps", args: FitArguments, here: Here) -> Choice:
    """Play the candidates, and choose."""
    memory, host_memory = here.device_memory, here.host_memory
    if memory is None:
        memory, host_memory = host_memory, None
    if memory is None:
        raise ValueError("this system doesn't say how much memory it has. Name a strategy.")
    return choose_among(
        partial(played, make, fit, args, here.ranks_per_node),
        here.world_size,
        max(1, here.world_size // here.ranks_per_node),
        room=int(memory * (1 - MARGIN)),
        host_room=None if host_memory is None else int(host_memory * (1 - MARGIN)),
        checkpoints=args.gradient_checkpointing,
        accumulation=0 if args.gradient_accumulation_schedule else args.gradient_accumulation_steps,
        offloads=here.device_memory is not None,
    )


def played(
    make: Callable[..., None], fit: "Steps", args: FitArguments, per_node: int, candidate: Candidate
) -> dict[str, Any]:
    """Make the Fit under a candidate, in a copy of its process, and return the account."""
    ranks = int(os.environ["WORLD_SIZE"])
    stage = Stage()
    own = {name: value for name, value in WITHOUT_EFFECT.items() if name not in OF_FIT}

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as directory, world_of(0, ranks):
            given = args.replace(**{**own, **arguments_of(candidate, args)}, output_dir=directory)
            strategy = play(strategy_of(candidate), stage)
            make(strategy=strategy, args=given, loggers=())
            if fit.train_data is None:
                raise ValueError("it is chosen for training, and there is no train_data. Name a strategy.")
            account = Player(fit, stage, per_node).play().to_dict()
            cuts = cuts_of(fit.module)
            strategy.release(fit.module)
        return {"account": account, "cuts": cuts}

    return answered(work)


def show(choice: Choice, world_size: int) -> None:
    """Print the table of candidates where the progress of the run is printed."""
    console = console_for_tables()
    with console.capture() as printed:
        ranks = "1 rank" if world_size == 1 else f"{world_size:,} ranks"
        console.print(choice_shown(choice, f'strategy="auto" for {ranks}'))
    say(printed.get().rstrip())
