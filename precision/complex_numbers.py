"""Complex numbers as pairs of real ones, for kernels and messages that know real ones only."""

import torch
from torch import Tensor


def as_real(tensor: Tensor) -> Tensor:
    """View a tensor's complex numbers as pairs of real ones, along a last dimension of 2; return any other as it is.

    Example:
        >>> as_real(torch.tensor([1 + 2j]))
        tensor([[1., 2.]])
    """
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
