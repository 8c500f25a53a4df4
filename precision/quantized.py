"""Quantized parameters (bitsandbytes' 4-bit ones): packed integers whose scales stand beside the tensor."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def is_quantized(tensor: Tensor) -> bool:
    """Whether the tensor's numbers are packed codes, in whatever dtype they are stored: a cast would scramble them."""
    return getattr(tensor, "quant_state", None) is not None


def quantized_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The quantized parameters by name, placed or not: sharding makes plain ones of them, but their layers know."""
    return {
        name: parameter
        for prefix, layer in module.named_modules()
        if getattr(layer, "quant_state", None) is not None
        for name, parameter in layer.named_parameters(prefix, recurse=False)
        if name.endswith("weight")
    }


def scales(module: nn.Module) -> Iterator[Tensor]:
    """The tensors that belong to quantized parameters without being parameters or buffers: scales and codes, and those
    of the scales where these are quantized themselves (Dettmers et al., 2023).
    """
    for layer in module.modules():
        state = getattr(layer, "quant_state", None)
        for part in filter(None, (state, getattr(state, "state2", None))):
            yield from (value for value in vars(part).values() if isinstance(value, Tensor))


def keep_trainable(module: nn.Module) -> None:
    """Leave quantized layers in the layout they are trained in. On CPUs with AVX512-BF16, an evaluation would have
    bitsandbytes repack their weights for good into one that has no backward: gradients would end there, silently.
    """
    for layer in module.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def check_storage(module: nn.Module, strategy: str, *, flat: torch.dtype | None, cast_to: torch.dtype | None) -> None:
    """Refuse quantized parameters that a sharding strategy would scramble, or can't lay beside the others.

    Args:
        module: in the precision's dtypes.
        strategy: its name, for the message.
        flat: the one dtype of all parameters, where they are laid end to end; None where each keeps its own.
        cast_to: what the strategy casts floating-point parameters to for computation; None where it doesn't.

    Raises:
        ValueError: names the parameters and the storage that works.
    """
    casts = cast_to is not None and cast_to != flat
    for name, parameter in quantized_parameters(module).items():
        storage = parameter.dtype
        if flat is not None and storage != flat:
            why = f"lays all parameters of a block end to end, which takes one dtype, and the others are {flat}"
        elif cast_to is not None and storage.is_floating_point and storage != cast_to:
            why = f"casts floating-point parameters to {cast_to} in this precision, which would scramble its codes"
        else:
            continue
        mend = "Quantize with quant_storage=torch.uint8" + ("" if flat is None else " and use strategy='fsdp2'")
        if flat is not None:
            mend += f", or with quant_storage={flat}" + (" and use precision='32-true'" if casts else "")
        raise ValueError(
            f"{strategy} can't shard the quantized parameter {name!r}, which is stored in {storage}: it {why}. {mend}."
        )
