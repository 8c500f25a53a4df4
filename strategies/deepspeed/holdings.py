"""What a ZeRO engine holds beside what its module and its optimizer have.

The names are DeepSpeed's own, of the 0.19 releases.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def held_apart(zero: Any, stage: int, module: nn.Module) -> Mapping[str, Sequence[Tensor]]:
    """Find what an engine holds on this rank, by what it is; see ``Strategy.held_apart``.

    Args:
        zero: the optimizer of an engine at stages 1 to 3.
        stage: of the engine.
        module: the engine's.
    """
    masters = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    gradients = [zero.grad_partitions_flat_buffer] if stage == 3 else gradients_of(zero)
    buckets = [bucket.buffer for bucket in zero.ipg_buckets.values()]
    shards: dict[bool, list[Tensor]] = {True: [], False: []}
    for parameter in module.parameters():
        if stage == 3:
            shards[parameter.requires_grad].append(parameter.ds_tensor)  # type: ignore[attr-defined]
    return {
        "parameters": shards[True],
        "frozen_parameters": shards[False],
        "gradients": [*tensors_of(gradients), *(master.grad for master in masters if master.grad is not None)],
        "optimizer_state": list(masters),
        "messages": list(tensors_of(buckets)),
    }


def gradients_of(zero: Any) -> list[Any]:
    """The gradients that stages 1 and 2 accumulate: of micro-batches, and of this rank's shard."""
    return [list(zero.all_grad_tensors.values()), list(zero.averaged_gradients.values()), zero.grads_in_partition]


def tensors_of(values: Any) -> Iterator[Tensor]:
    """The tensors in lists of lists."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_of(value)
