"""A run that its launcher starts again, on other ranks than before: the samples of an update stay what they were.

Ranks that are lost are done without: each of the others takes more micro-batches in an update. As the global order of
samples follows from the seed alone, every update has the samples that it would have had, and the schedule is the same.
"""

import itertools
import sys
from typing import Any

from torch.utils.data import DataLoader

from ...strategies.base import Strategy
from ...strategies.launch import launched
from ..arguments import FitArguments
from ..checkpoint.line import Launch
from ..data import DataStream
from ..printing import say

RUNS = itertools.count()  # the runs of this process: each attempt at a program makes the same ones, in the same order


def find_launch(strategy: Strategy, args: FitArguments, stream: DataStream) -> Launch | None:
    """Describe the next run of this process as its launcher knows it. Collective where there is a launcher.

    Args:
        strategy: set up.
        args: of the run.
        stream: of the run, cut by these arguments.

    Returns:
        The run; None where no launcher would start it again.
    """
    number, here = next(RUNS), launched()
    if here is None:
        return None
    if here.has_range and args.gradient_accumulation_schedule:
        raise ValueError(
            f"gradient_accumulation_schedule={args.gradient_accumulation_schedule!r}: updates of several sizes can't "
            "be shared by a range of ranks. Write devices= as one number, or leave the schedule out."
        )
    if here.has_range and stream.has_parts:
        raise ValueError(
            "train_data gives each rank a part of its own (shares_among_ranks = True), which fits one number of ranks. "
            "Write devices= as one number, or leave shares_among_ranks out."
        )
    # An agent of torchrun that came later counts anew, so the ranks' counts differ.
    attempts = strategy.gather(here.attempt)
    samples = stream.global_micro_batch * args.gradient_accumulation_steps
    if here.most and strategy.data_size == strategy.world_size:
        samples = samples * here.most // strategy.world_size
    is_restart = max(attempts) > 0
    return Launch(
        name=f"{here.run}/{number}",
        is_restart=is_restart,
        most=here.most if here.has_range else 0,
        keeps_samples=is_restart,
        may_come_again=here.may_come_again,
        global_batch=samples,
    )


def with_global_batch(args: FitArguments, stream: DataStream, global_batch: int, train_data: Any) -> FitArguments:
    """Return the arguments, with so many samples in an update, and no larger a micro-batch than was asked for.

    Args:
        args: of the run.
        stream: of the run, cut by these arguments.
        global_batch: samples in an update over all ranks.
        train_data: as it was given to Fit: a ready DataLoader keeps its batch size.

    Raises:
        ValueError: these ranks can't share so many samples evenly; the message has the numbers.
    """
    if args.gradient_accumulation_schedule:
        raise ValueError(
            "This run goes on with another number of ranks, and gradient_accumulation_schedule="
            f"{args.gradient_accumulation_schedule!r} has updates of several sizes for the number it began with. Start "
            "it with as many ranks as before."
        )
    asked = args.per_device_train_batch_size
    own_size = isinstance(train_data, DataLoader)
    places = stream.global_micro_batch if own_size else stream.global_micro_batch // asked
    share, rest = divmod(global_batch, places)
    if rest:
        each = f"batches of {stream.options.batch_size} on each of " if own_size else ""
        raise ValueError(
            f"This run began with {global_batch} samples in an update, and {each}{stream.size} ranks can't share them "
            f"evenly: {global_batch} can't be divided by {places}. Choose per_device_train_batch_size and "
            "gradient_accumulation_steps so that the samples of an update can be divided by each number of ranks from "
            "the fewest to the most, or a smaller range."
        )
    size = asked if own_size else next(size for size in range(min(asked, share), 0, -1) if share % size == 0)
    steps = share if own_size else share // size
    return args.replace(per_device_train_batch_size=size, gradient_accumulation_steps=steps)


def explain(args: FitArguments, asked: FitArguments, strategy: Strategy, global_batch: int) -> None:
    """Say on the main process what a rank's share of an update has become."""
    if not strategy.is_main:
        return
    ranks = f"{strategy.world_size} rank{'s' * (strategy.world_size > 1)}"
    say(
        f"An update keeps its {global_batch} samples on {ranks}: gradient_accumulation_steps="
        f"{args.gradient_accumulation_steps} and per_device_train_batch_size={args.per_device_train_batch_size}, in "
        f"place of {asked.gradient_accumulation_steps} and {asked.per_device_train_batch_size}.",
        sys.stderr,
    )
    if args.dataloader_drop_last:
        say(
            "dataloader_drop_last=True drops what is left of an epoch after whole micro-batches, which are of another "
            "size now: the last update of an epoch may have other samples.",
            sys.stderr,
        )
