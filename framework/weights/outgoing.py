"""Weights on their way into another format: read one at a time, in the dtype that was asked for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .sources import Source, everything


@dataclass(frozen=True)
class Outgoing:
    """What is to be written.

    Attributes:
        tensors: where each comes from, by its new name.
        tied: further names to the first one's.
        dtype: of floating-point tensors; None keeps each one's.
    """

    tensors: Mapping[str, Source]
    tied: Mapping[str, str]
    dtype: torch.dtype | None = None

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is written."""
        own = self.tensors[name].dtype
        return self.dtype if self.dtype is not None and own.is_floating_point else own

    def bytes_of(self, name: str) -> int:
        """How many bytes a tensor is written in."""
        return torch.Size(self.tensors[name].shape).numel() * self.dtype_of(name).itemsize

    def read(self, name: str) -> Tensor:
        """Read a whole tensor; contiguous, on the host.

        Raises:
            ValueError: a number is too large for the dtype that was asked for.
        """
        source = self.tensors[name]
        tensor = source.read(everything(source))
        dtype = self.dtype_of(name)
        if tensor.dtype != dtype:
            cast = tensor.to(dtype)
            if bool((cast.isinf() & tensor.isfinite()).any()):
                raise ValueError(
                    f"{name} holds numbers beyond the range of {dtype} (up to {torch.finfo(dtype).max:.5g}): as large "
                    f"as {tensor.abs().max():.5g}. Convert to bfloat16, or keep {tensor.dtype}."
                )
            tensor = cast
        return tensor.contiguous()

    def all(self, names: list[str]) -> Iterator[Tensor]:
        """Read tensors one after another."""
        for name in names:
            yield self.read(name)
