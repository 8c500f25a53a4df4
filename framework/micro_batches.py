"""Reading micro-batches on several ranks: an update's, and an evaluation's, of which every rank must have equally many.

Ranks that had different numbers of them would meet in different collectives: over gloo a size mismatch aborts the
process, over NCCL they wait until their timeout. So how many each has read, and whether reading failed on one, is
exchanged before any is computed with: with the message that an update has anyway, and in evaluation once for several
micro-batches that are read ahead, where the data's length isn't known to be the same on all ranks.
"""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..strategies.base import Strategy
from .data import DataStream
from .in_step import InStep
from .objective import Count

if TYPE_CHECKING:
    from .fit import Fit

AHEAD = 8  # micro-batches of an evaluation that are read before they are computed with


def read_update(
    fit: "Fit", epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
) -> tuple[list[Any], Count | None]:
    """See ``Fit.get_batch_samples``. Collective where there are several ranks."""
    strategy, stream, count = fit.strategy, fit.stream, fit.objective.count
    position = stream.position
    failure: Exception | None = None
    batches: list[Any] = []
    items: Count = 0
    try:
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if len(batches) > 1 or strategy.world_size > 1:
            items = sum(map(count, batches))
    except Exception as error:
        if strategy.world_size == 1:
            raise
        failure = error
    on_host = 0 if isinstance(items, Tensor) else items
    if strategy.world_size > 1 and (batches or failure or not stream.is_equal_on_ranks):
        write_failed = fit.writer is not None and fit.writer.has_failed()
        samples = stream.position - position
        summed, any_failed = fit.exchange.send(on_host, write_failed, len(batches), samples, failure)
        if any_failed and fit.writer is not None:
            fit.writer.finish()  # raises what it failed with, on every rank
        # Tensor-parallel ranks have each counted the same items, context-parallel ones their own parts.
        on_host = summed * strategy.gradient_ranks // strategy.world_size
    if not batches:
        if stream.position == 0:
            raise ValueError(
                f"train_data gave no batch in epoch {fit.epoch_index}. If it is an iterable that can be read only "
                "once, have its __iter__ begin anew each time."
            )
        return batches, None
    if len(batches) == 1 and strategy.world_size == 1:
        return batches, None
    # The batches may already live on the device, and so does their count.
    total: Count = strategy.sum_over_data_ranks(items.to(device)) if isinstance(items, Tensor) else on_host
    fit.averages.expect(total)
    return batches, total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)


def in_step(strategy: Strategy, stream: DataStream, batches: Iterator[Any]) -> Iterator[Any]:
    """An evaluation's micro-batches. Collective once for several of them, where the ranks might not have equally many.

    Raises:
        ValueError, OtherRankError: see ``InStep.check``.
    """
    if strategy.world_size == 1 or stream.is_equal_on_ranks:
        yield from batches
        return
    comparison = InStep(strategy, "evaluation data")
    while True:
        position = stream.position
        failure: Exception | None = None
        ahead: list[Any] = []
        try:
            ahead = list(itertools.islice(batches, AHEAD))
        except Exception as error:
            failure = error
        samples = stream.position - position
        comparison.check(strategy.sum_on_host(comparison.numbers(len(ahead), samples, failure)), samples, failure)
        if not ahead:
            return
        yield from ahead
