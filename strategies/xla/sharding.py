"""How each parameter lies on a mesh of XLA devices."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..plans.plan import check_cut, cut_dimension, styles_by_layer

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")  # the axes of a mesh, outermost first

Partition = tuple[Any, ...]
"""For each dimension of a tensor the axis that cuts it, several of them, or None."""


def partitions(module: nn.Module, mesh: Any) -> dict[str, Partition]:
    """The partition of each parameter, by name: "tensor" cuts what the module's plan says, "fsdp" the largest dimension
    that is left, if it has an entry for each device.

    Raises:
        ValueError: the plan doesn't fit; or cuts one of two layers that share a weight.
    """
    sizes: Mapping[str, int] = mesh.shape()
    cut = dimensions_by_plan(module, sizes[TENSOR]) if sizes[TENSOR] > 1 else {}
    return {name: partition(p, cut.get(id(p)), sizes[FSDP]) for name, p in module.named_parameters()}


def partition(parameter: Tensor, by_plan: int | None, fsdp: int) -> Partition:
    """Choose how one parameter is cut, as ``partitions`` says.

    Args:
        parameter: its shape counts.
        by_plan: the dimension that "tensor" cuts.
        fsdp: devices of that axis.
    """
    axes: list[str | None] = [None] * parameter.ndim
    if by_plan is not None:
        axes[by_plan] = TENSOR
    free = [dimension for dimension, axis in enumerate(axes) if axis is None]
    largest = max(free, key=lambda dimension: parameter.shape[dimension], default=None)
    if largest is not None and parameter.shape[largest] >= fsdp:
        axes[largest] = FSDP
    return tuple(axes)


def dimensions_by_plan(module: nn.Module, degree: int) -> dict[int, int]:
    """The dimension of each parameter that the module's plan cuts, by the parameter's id."""
    layers = dict(module.named_modules())
    found: dict[int, int] = {}
    for name, style in styles_by_layer(module, degree).items():
        check_cut(name, style, layers[name], degree)
        dimension = cut_dimension(style)
        if dimension is None:
            continue
        # A whole output is made of a layer cut by its inputs, so its bias is whole; that of one cut by outputs is cut.
        cut = ("weight", "bias") if dimension == 0 and isinstance(layers[name], nn.Linear) else ("weight",)
        for parameter in (getattr(layers[name], part, None) for part in cut):
            if parameter is None:
                continue
            if found.setdefault(id(parameter), dimension) != dimension:
                raise ValueError(
                    f"tensor_parallel_plan cuts the weight that {name!r} shares with another layer by two dimensions. "
                    'Cut both by the same ("embedding" and "colwise_gather"), or neither.'
                )
    return found


def by_samples(tensor: Tensor) -> Partition:
    """Cut a tensor's first dimension over all devices that hold different samples."""
    return ((DATA, FSDP), *[None] * (tensor.ndim - 1))


def mark(tensor: Tensor, mesh: Any, axes: Partition) -> None:
    """Mark how a tensor lies on the mesh; a mark that it has is replaced."""
    from torch_xla.distributed.spmd import clear_sharding, mark_sharding

    clear_sharding(tensor)
    mark_sharding(tensor, mesh, axes)
