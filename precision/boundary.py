"""Where data enters and leaves a module whose dtype isn't float32: inputs are cast, and losses computed in float32."""

from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

BORDERS: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()
HALVES = (torch.float16, torch.bfloat16)


def cast_at_the_border(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Have a module cast its floating-point inputs to ``dtype``, and 16-bit outputs to float32.

    So a data set knows nothing of the number format, and the loss, which stands outside, is summed in float32.
    Integers, and complex numbers, pass as they are.
    """
    remove_border(module)
    inward = module.register_forward_pre_hook(partial(cast_inputs, dtype), with_kwargs=True)
    BORDERS[module] = [inward, module.register_forward_hook(widen_outputs)]
    return module


def remove_border(module: nn.Module) -> None:
    """Remove the hooks of ``cast_at_the_border``: another Fit may take the module in another precision."""
    for handle in BORDERS.pop(module, ()):
        handle.remove()


def cast_inputs(dtype: torch.dtype, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Positional and keyword arguments with floating-point tensors in ``dtype``."""
    return cast_floats(dtype, args), cast_floats(dtype, kwargs)


def cast_floats(dtype: torch.dtype, values: Any) -> Any:
    """Anything that holds tensors, with floating-point ones in ``dtype``."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tree_map(cast, values)


def widen_outputs(module: nn.Module, args: Any, outputs: Any) -> Any:
    """Outputs with 16-bit tensors in float32."""
    return tree_map(
        lambda value: value.float() if isinstance(value, Tensor) and value.dtype in HALVES else value, outputs
    )
