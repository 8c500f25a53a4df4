"""Batches of another size than the one that was read."""

from collections import Counter
from typing import Any

from torch import Tensor

from ...strategies.batches import map_batch, tensors_of


def samples_in(batch: Any) -> int:
    """The samples of a micro-batch: the first dimension that most of its tensors have; 0 where there is none."""
    sizes = Counter(tensor.shape[0] for tensor in tensors_of(batch) if tensor.ndim)
    return sizes.most_common(1)[0][0] if sizes else 0


def of_samples(batch: Any, samples: int, wanted: int) -> Any:
    """A micro-batch that has its first sample as often as wanted, without memory of its own.

    Args:
        batch: of ``samples`` samples: tensors with that first dimension are exchanged, others stay.
        samples: that it has.
        wanted: that it is to have.
    """

    def exchanged(tensor: Any) -> Any:
        if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[0] == samples:
            return tensor[:1].expand(wanted, *tensor.shape[1:])
        return tensor

    return map_batch(exchanged, batch)
