"""How long a run is: updates from epochs, and epochs from updates."""

import math
import sys
from typing import Any, NamedTuple

from ..arguments import FitArguments
from ..fields.accumulation import micro_batches_at
from .passes import Passes


class RunLength(NamedTuple):
    """The length of a run in every unit.

    Attributes:
        num_train_epochs: passes over the data, of which the last one may end early; sys.maxsize where passes can't be
            counted.
        num_update_steps_per_epoch: updates in a pass; all of them where the data has no length.
        num_examples: samples in a pass.
        num_train_samples: samples in the run.
        epoch_based: whether ``num_train_epochs`` sets the length, and not ``max_steps``.
        len_dataloader: micro-batches in a pass; None where the data has no length.
        max_steps: updates in the run.
    """

    num_train_epochs: int
    num_update_steps_per_epoch: int
    num_examples: int
    num_train_samples: float
    epoch_based: bool
    len_dataloader: int | None
    max_steps: int


def run_length(args: FitArguments, dataloader: Any, total_train_batch_size: int, batches: int = 1) -> RunLength:
    """Compute the length of a run.

    Args:
        args: ``max_steps`` sets the length, or else ``num_train_epochs``.
        dataloader: its length, where it has one, is in micro-batches.
        total_train_batch_size: samples in an update.
        batches: of an update, see ``Turns``.

    Raises:
        ValueError: neither max_steps nor the data says when to stop.
    """
    epoch_based = args.max_steps <= 0
    try:
        micro_batches = len(dataloader)
    except TypeError:
        per_pass = args.overfit_batches if args.limit_train_batches is None else args.limit_train_batches
        if epoch_based and isinstance(per_pass, int):
            max_steps = math.ceil(args.num_train_epochs * per_pass)
            samples = per_pass * total_train_batch_size
            return RunLength(
                sys.maxsize, per_pass, samples, max_steps * total_train_batch_size, epoch_based, None, max_steps
            )
        if epoch_based:
            raise ValueError(
                "train_data has no length, so epochs can't be counted in advance. Set max_steps to the number of "
                f"updates, or limit_train_batches to that of an epoch. Received: max_steps={args.max_steps}"
            ) from None
        samples = args.max_steps * total_train_batch_size
        return RunLength(sys.maxsize, args.max_steps, samples, samples, epoch_based, None, args.max_steps)
    samples = getattr(dataloader, "num_examples", None) or len(dataloader.dataset)
    passes = Passes(args, micro_batches, batches)
    updates = passes.updates(0)
    if not epoch_based:
        epochs, all_samples = passes.passes_of(args.max_steps), args.max_steps * total_train_batch_size
        return RunLength(epochs, updates, samples, all_samples, epoch_based, micro_batches, args.max_steps)
    max_steps = math.ceil(args.num_train_epochs * updates)
    if args.gradient_accumulation_schedule:
        whole, part = divmod(args.num_train_epochs, 1)
        max_steps = passes.updates_between(0, int(whole)) + math.ceil(round(part * passes.updates(int(whole)), 9))
    epochs = math.ceil(args.num_train_epochs)
    return RunLength(epochs, updates, samples, samples * args.num_train_epochs, epoch_based, micro_batches, max_steps)


def length_of_resumed(
    args: FitArguments, length: RunLength, total_train_batch_size: int, done: tuple[int, int, float], batches: int = 1
) -> tuple[int, int]:
    """Compute the length of a run that goes on with another global batch than it began with.

    Where epochs set the length, the rest of them is counted in updates of the new size. Where ``max_steps`` sets it,
    ``max_steps`` stays, and the passes are counted that the updates left will make.

    Args:
        args: as the user gave them, with ``max_steps`` unresolved.
        length: the length of a run that begins with the new global batch.
        total_train_batch_size: samples in an update, with the new global batch.
        done: (updates, whole passes over the data, fraction of the pass under way) that the run has made.
        batches: of an update, see ``Turns``.

    Returns:
        (num_train_epochs, max_steps)
    """
    updates, passes, fraction = done
    if length.len_dataloader is None:
        return length.num_train_epochs, length.max_steps
    accumulation = args.gradient_accumulation_steps * batches
    all_passes = Passes(args, length.len_dataloader, batches)
    # A short last micro-batch counts by the samples in it, and one that is dropped doesn't count.
    micro_batches = min(length.num_examples * accumulation / total_train_batch_size, length.len_dataloader)

    def updates_in(part: float) -> int:
        """Count the updates in a part of the pass under way that reaches its end; rounding must not make an update of
        nothing.
        """
        return math.ceil(part * micro_batches / (batches * micro_batches_at(vars(args), passes)) - 1e-9)

    rest_of_pass = updates_in(1.0 - fraction)
    if args.max_steps > 0:
        beyond = max(0, args.max_steps - updates - rest_of_pass)
        return passes + 1 + all_passes.passes_of(beyond, first=passes + 1), args.max_steps
    passes_left = args.num_train_epochs - passes
    if passes_left <= 1.0:
        left = updates_in(max(0.0, passes_left - fraction))
    else:
        whole, part = divmod(passes_left - 1.0, 1)
        last = passes + 1 + int(whole)
        left = rest_of_pass + all_passes.updates_between(passes + 1, last)
        left += math.ceil(part * all_passes.updates(last) - 1e-9)
    return length.num_train_epochs, updates + left
