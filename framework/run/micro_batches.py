"""Reading an update's micro-batches, of which every rank must have equally many.

Ranks that had different numbers of them would meet in different collectives: over gloo a size mismatch aborts the
process, over NCCL they wait until their timeout. So how many each has read, and whether reading failed on one, is
exchanged before any is computed with, in the message that an update has anyway.
"""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..objective import Count, Objective
from .run import Run

if TYPE_CHECKING:
    from ..checkpoint.saver import Saver  # only a run that saves needs what it imports


def read_update(
    run: Run, objective: Objective, saver: "Saver | None", epoch_iterator: Iterator[Any], num_batches: int,
    device: torch.device,
) -> tuple[list[Any], Count | None]:  # fmt: skip
    """Read the next update's micro-batches, and count their items over all ranks; see ``Steps.get_batch_samples``.
    Collective where there are several ranks.

    Args:
        run: is told how many items the update has.
        objective: counts a micro-batch's items.
        saver: whose failed write ends the run, on every rank.
        epoch_iterator, num_batches, device: as ``get_batch_samples`` takes them.
    """
    strategy, stream = run.strategy, run.stream
    position = stream.position
    run.begin_update(position)
    failure: Exception | None = None
    batches: list[Any] = []
    items: Count = 0
    try:
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if len(batches) > 1 or strategy.world_size > 1:
            items = sum(map(objective.count, batches))
    except Exception as error:
        if strategy.world_size == 1:
            raise
        failure = error
    on_host = 0 if isinstance(items, Tensor) else items
    if strategy.world_size > 1 and (batches or failure or not stream.is_equal_on_ranks):
        write_failed = saver is not None and saver.has_failed()
        samples = stream.position - position
        summed, any_failed = run.exchange.send(run.watch, on_host, write_failed, len(batches), samples, failure)
        if any_failed and saver is not None:
            saver.finish()  # raises what it failed with, on every rank
        # Tensor-parallel ranks have each counted the same items, context-parallel ones their own parts.
        on_host = summed * strategy.gradient_ranks // strategy.world_size
    if not batches:
        if stream.position == 0:
            raise ValueError(
                f"train_data gave no batch in epoch {run.epoch_index}. If it is an iterable that can be read only "
                "once, have its __iter__ begin anew each time."
            )
        return batches, None
    if len(batches) == 1 and strategy.world_size == 1:
        return batches, None
    # The batches may already live on the device, and so does their count.
    total: Count = strategy.sum_over_data_ranks(items.to(device)) if isinstance(items, Tensor) else on_host
    run.averages.expect(total)
    return batches, total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)
