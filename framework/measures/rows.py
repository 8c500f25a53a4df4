"""Rows on the host, batch after batch in one tensor that is made once: nothing is copied to join them."""

from collections.abc import Sequence

import torch
from torch import Tensor

SLACK = 1.1  # of the bytes of its rows, a tensor's memory may have; one that has more is copied


class Rows:
    """Puts the batches of one tensor one after another, as long as they are alike but for their number of rows.

    Args:
        expected: rows in all, at most. Memory that isn't written to isn't taken.
        first: the first batch, which says the form of a row.
    """

    def __init__(self, expected: int, first: Tensor) -> None:
        self.used = 0
        self._shape, self._dtype = torch.Size(), first.dtype  # of the last batch that was found to be alike
        try:
            self.whole = torch.empty((expected, *first.shape[1:]), dtype=first.dtype)
        except RuntimeError:  # there isn't so much memory, and perhaps it isn't needed: later rows may be shorter
            self.whole = torch.empty(0, dtype=first.dtype)

    def put(self, tensor: Tensor) -> Tensor | None:
        """Copy a batch to its place and return it there; None where it has no place here."""
        shape = tensor.shape
        if shape != self._shape:
            if shape[1:] != self.whole.shape[1:]:
                return None
            self._shape = shape
        rows, begin = shape[0], self.used
        if begin + rows > self.whole.shape[0] or tensor.dtype is not self._dtype:
            return None
        self.used = begin + rows
        return self.whole.narrow(0, begin, rows).copy_(tensor)


def in_one_piece(rows: Sequence[Tensor]) -> Tensor | None:
    """Return tensors that lie one after another in one memory as one tensor; None where they don't."""
    first = rows[0]
    base = first._base
    if base is None or not first.is_contiguous():
        return None
    form, dtype, place, count = first.shape[1:], first.dtype, first.data_ptr(), 0
    for row in rows:
        if row._base is not base or row.data_ptr() != place or row.shape[1:] != form or row.dtype != dtype:
            return None
        place += row.nbytes
        count += row.shape[0]
    whole = first.as_strided((count, *form), first.stride(), first.storage_offset())
    return whole if whole.nbytes * SLACK >= whole.untyped_storage().nbytes() else whole.clone()
