"""32-bit parameters and arithmetic: what every other format is compared with."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .base import Precision
from .boundary import remove_border
from .frozen import own_dtypes
from .quantized import is_quantized


class Full(Precision):
    """``precision="32-true"``: float32 parameters, compute and reductions."""

    name = "32-true"
    parameter_dtype = torch.float32
    compute_dtype = torch.float32
    reduce_dtype = torch.float32

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast floating-point parameters and buffers to float32; integer and complex ones stay."""
        return cast_floating(module, torch.float32)


def cast_floating(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the floating-point parameters and buffers of a module in place.

    ``module.to(dtype)`` would turn complex buffers (rotary embeddings) into real ones, so complex tensors are kept, and
    so are quantized ones, whose dtype is only what their codes are stored in. Frozen parts with a number format of
    their own keep it.
    """
    own = own_dtypes(module)

    def cast(tensor: Tensor) -> Tensor:
        is_number = tensor.is_floating_point() and not is_quantized(tensor)
        return tensor.to(own.get(id(tensor), dtype)) if is_number else tensor

    remove_border(module)  # an earlier run in another dtype may have left one
    apply: Callable[..., nn.Module] = module._apply  # nn.Module.to itself is made of it; ties and optimizers last
    return apply(cast)
