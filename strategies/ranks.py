"""The ranks that a run is on: this process's place among them, and what they tell one another."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import Tensor


class Ranks:
    """The part of a strategy that knows the other ranks. Here there are none: one process is rank 0 of 1.

    Attributes:
        rank, world_size: this process among all processes.
        data_rank, data_size: this rank's place among those that read different samples; tensor- and context-parallel
            ranks share theirs.
        gradient_ranks: ranks that gradients are averaged over: those with different samples or positions.
        tensor_parallel_size, context_parallel_size: ranks that share one sample, split by features or by positions.
        devices_per_rank: devices that one process feeds; a micro-batch holds samples for all of them.
    """

    rank: int = 0
    world_size: int = 1
    data_rank: int = 0
    data_size: int = 1
    gradient_ranks: int = 1
    tensor_parallel_size: int = 1
    context_parallel_size: int = 1
    devices_per_rank: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and shows progress. Exactly one does."""
        return self.rank == 0

    # Between ranks.

    def sum_over_data_ranks(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks that gradients are averaged over, in place or not; return the sum."""
        return tensor

    def read(self, tensors: Sequence[Tensor], *, summed: bool = False) -> list[float]:
        """Copy the numbers in some tensors to the host, one after the other, in one transfer. Waits for the device.

        Args:
            tensors: on the device.
            summed: over the ranks that gradients are averaged over. Collective then.
        """
        rows = [tensor.reshape(-1) for tensor in tensors]
        # float64 holds a float32 loss and any count exactly; neighbours of one dtype are widened together.
        parts = [torch.cat(list(alike)).double() for _, alike in groupby(rows, key=lambda row: row.dtype)]
        numbers = torch.cat(parts)
        return (self.sum_over_data_ranks(numbers) if summed else numbers).tolist()

    def gather_rows(
        self, rows: Tensor, contributes: bool = True, pad_to: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the rows of all ranks with different samples, this rank's own first, with gradients that go back to
        where they were computed. Collective, in backward too.

        Args:
            rows: (rows, ...).
            contributes: whether the others are given this rank's rows.
            pad_to: fill each rank's rows up with zeros, and return a mask beside them.
        """
        return rows if pad_to is None else with_mask(rows, pad_to)

    def max_over_ranks(self, tensor: Tensor) -> None:
        """Replace the tensor by its largest value over all ranks, in place."""

    def sum_on_host(self, values: list[int]) -> list[int]:
        """Sum each number over all ranks. Never waits for the device."""
        return values

    def new_group(self) -> Any:
        """Make another group of all ranks on the host, for ``gather`` in another thread. Collective."""
        return None

    def drop_group(self, group: Any) -> None:
        """Destroy a group of ``new_group``, in which nothing is under way. Collective."""

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """Return every rank's ``value``, in the order of ranks, on every rank. Small host objects only."""
        return [value]

    def copy_from(self, tensor: Tensor, source: int, to_all: bool) -> None:
        """Fill a tensor of bytes on the host with that of another rank: on every rank, or on the main process alone.

        Args:
            tensor: contiguous; the same size on all that take part.
            source: the rank that has it.
            to_all: every rank takes part; else ``source`` and the main process do, and nothing is done where they are
                one.
        """

    def gather_to_main(self, value: Any, group: Any = None) -> list[Any]:
        """Return every rank's ``value``, in the order of ranks, on rank 0; on the others nothing."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's ``value`` on every rank. Small host objects only."""
        return value

    def barrier(self) -> None:
        """Return once every rank has come here."""

    def all_say(self, what: str, seconds: float) -> bool:
        """Whether every rank calls this within so many seconds with the same words. All that call it get one answer.
        Not collective: other ranks may be elsewhere, and never call it.
        """
        return True

    def open_stores(self, name: str) -> tuple[Any, Any] | None:
        """Open connections to the store that the ranks met by, of this rank's own, for use while others wait.

        Args:
            name: of the use; each call with it opens a part of the store that is empty, the same on all ranks.

        Returns:
            (part, attempt): the part, and the store of the launcher's attempt; None where there are no other ranks.
        """
        return None

    # Beginning again after a failure that another attempt may not meet. Used by runs that ask for it, and only those.

    def attempt(self) -> AbstractContextManager[Any]:
        """Make a context for an attempt at a run; it wakes this rank where it waits for one that has failed."""
        return nullcontext()

    def tell_failure(self, reason: str | None) -> str | None:
        """Tell other ranks, which may wait elsewhere, that this rank's attempt failed. Not collective.

        Args:
            reason: why all should begin again; None where this rank's failure is no such reason, or only the
                consequence of another's.

        Returns:
            The reason that a rank has given, the same on all: ``release`` and ``begin_again`` come next. None where
            there is none: the failure stands.
        """
        return reason

    def hear_failure(self) -> str | None:
        """Wait for the reason that another rank tells, whose failure made this rank fail; see ``tell_failure``."""
        return None


def padded(rows: Tensor, size: int) -> Tensor:
    """Fill rows up with zeros to a size."""
    missing = size - len(rows)
    return torch.cat([rows, rows.new_zeros((missing, *rows.shape[1:]))]) if missing else rows


def with_mask(rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Fill rows up with zeros to a size, and tell in a mask which of them are rows."""
    return padded(rows, size), torch.arange(size, device=rows.device) < len(rows)
