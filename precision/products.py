"""Which parameters mixed precision reads in 16 bits: those of matrix products, which autocast casts, and no others."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

MULTIPLYING = (nn.Linear, _ConvNd, nn.MultiheadAttention)
KEPT = (nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
LARGE = 2**20
"""Elements from which on a matrix of a layer of another kind is taken for one that is multiplied: experts in one
tensor, or a transformers.Conv1D. A smaller one may as well be added (an embedding of positions), and is cheap to read
whole."""

Slot = tuple[nn.Module, str]  # a layer, and the name of a parameter of its own


def float32_slots(module: nn.Module) -> set[Slot]:
    """Where parameters stand that autocast leaves in float32, or may leave there: of norms, embeddings and recurrent
    layers, whatever a layer of the user's own holds unless it is large, and what one of these shares with a product.

    Args:
        module: its parameters may be cut, or on the meta device.
    """
    slots = list(own_parameters(module))
    kept = {id(parameter) for (layer, _), parameter in slots if not is_multiplied(layer, parameter)}
    return {slot for slot, parameter in slots if id(parameter) in kept}


def own_parameters(module: nn.Module) -> Iterator[tuple[Slot, nn.Parameter]]:
    """Every parameter where it stands; a tied one in each of its places."""
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            yield (layer, name), parameter


def is_multiplied(layer: nn.Module, parameter: Tensor) -> bool:
    """Whether a layer uses a parameter of its own in a matrix product, as far as can be told."""
    if isinstance(layer, MULTIPLYING):
        return True
    if isinstance(layer, KEPT) or parameter.ndim < 2:
        return False
    return parameter.numel() >= LARGE and min(parameter.shape[-2:]) > 1


def casts(compute: torch.dtype | None, parameter: torch.dtype | None) -> bool:
    """Whether a format computes products in another dtype than it keeps parameters in."""
    return compute is not None and compute != parameter
