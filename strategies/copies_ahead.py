"""Copies of batches on a stream of their own: the next batch comes while the device still computes the last ones.

The host hands work to an accelerator far ahead of it. A copy on the stream that computes would begin when all that was
handed over before is done, and what computes with it would wait for the copy. On another stream it begins at once.
"""

import functools
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .batches import map_batch, tensors_of

PART = 1 / 50
"""The part of a device's memory that batches may take which were copied and aren't computed yet."""


class CopiesAhead:
    """Copies batches from page-locked memory to a device, while it computes. Nothing here waits on the host.

    Args:
        device: the accelerator.
        most: bytes of batches that may lie there, copied and not computed yet. The host may be many batches ahead, and
            a batch beyond this is copied in its turn, when those before it are computed and their memory is free.
    """

    def __init__(self, device: torch.device, most: int) -> None:
        self.device, self.most = device, most
        self.backend: Any = torch.get_device_module(device)
        self.stream = self.backend.Stream(device)
        self._last = 0  # bytes of the batch that was copied last
        self._ahead: deque[tuple[Any, int]] = deque()  # the end of the work with a batch, on the device, and its bytes

    def move(self, batch: Any, move_one: Callable[[Any], Any]) -> Any:
        """The batch on the device, for the stream that computes there now.

        Args:
            batch: see ``batches.py``.
            move_one: moves a tensor that isn't page-locked, or an object that moves itself, on that stream.
        """
        computing = self.backend.current_stream(self.device)
        self._note_work(computing)
        size = sum(tensor.nbytes for tensor in tensors_of(batch) if self.is_pinned(tensor))
        if not size or size + sum(held for _, held in self._ahead) > self.most:
            return map_batch(move_one, batch)
        self._last = size

        def moved(value: Any) -> Any:
            if not self.is_pinned(value):
                return move_one(value)
            with self.backend.stream(self.stream):
                copy = value.to(self.device, non_blocking=True)
            self.keep(copy, computing)
            return copy

        result = map_batch(moved, batch)
        computing.wait_stream(self.stream)  # the device's stream waits, before what is handed to it from now on
        return result

    def _note_work(self, computing: Any) -> None:
        """Note that all work with the last batch was handed over, and forget the batches whose work is done."""
        if self._last:
            end = self.backend.Event()
            end.record(computing)
            self._ahead.append((end, self._last))
            self._last = 0
        while self._ahead and self._ahead[0][0].query():
            self._ahead.popleft()

    def is_pinned(self, value: Any) -> bool:
        """Whether this is a tensor in page-locked memory of the host."""
        return isinstance(value, Tensor) and value.device.type == "cpu" and value.is_pinned()

    def keep(self, copy: Tensor, computing: Any) -> None:
        """Have a copy's memory, which belongs to the stream of copies, not be used again before the stream that
        computes is done with what was handed to it while the copy was there.
        """
        copy.record_stream(computing)


@functools.cache
def copies_ahead(device: torch.device) -> CopiesAhead:
    """What copies to a CUDA device in this process."""
    return CopiesAhead(device, int(torch.cuda.get_device_properties(device).total_memory * PART))
