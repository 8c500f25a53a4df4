"""Tensor parallelism by a plan: patterns over layer names to the way each layer is cut."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.optim import Optimizer

from ...precision.names import did_you_mean
from ...precision.quantized import is_quantized
from ..mesh import mesh_of
from .cut_features import CUT, WHOLE, CutFeatures, Gather
from .ready_plans import ready_plan, refusal

Plan = Mapping[str, "str | ParallelStyle"]
Ties = list[tuple[tuple[nn.Module, str], tuple[nn.Module, str]]]

STYLES: Mapping[str, Callable[[], ParallelStyle] | None] = {
    # whole input -> features cut over the ranks
    "colwise": lambda: ColwiseParallel(),
    # whole input -> whole output; for an output head
    "colwise_gather": lambda: ColwiseParallel(output_layouts=Replicate()),
    # cut features -> whole output, by a sum over the ranks
    "rowwise": lambda: RowwiseParallel(),
    # an embedding, cut by rows of its table
    "embedding": lambda: RowwiseParallel(input_layouts=Replicate()),
    # activations between the cut layers are cut by position (Korthikanti et al., 2023)
    "sequence": lambda: SequenceParallel(),
    "colwise_from_sequence": lambda: ColwiseParallel(input_layouts=Shard(1)),
    "colwise_gather_from_sequence": lambda: ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    "rowwise_to_sequence": lambda: RowwiseParallel(output_layouts=Shard(1)),
    "embedding_to_sequence": lambda: RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    # parameters of its own that stay whole: found out by cut_features.py, unless the plan says it
    "used_on_cut": None,
    "used_on_whole": None,
}
"""What a plan may name, beside instances of torch's ParallelStyle."""

USED_ON = {"used_on_cut": CUT, "used_on_whole": WHOLE}

# The dimension of the weight that a style cuts, by the first part of the style's name.
CUT_DIMENSION = {"colwise": 0, "rowwise": 1, "embedding": 0}


def apply_plan(module: nn.Module, mesh: DeviceMesh, gather: Gather, *, loss_parallel: bool = False) -> CutFeatures:
    """Cut the layers that the module's ``tensor_parallel_plan()`` names, in place, over a one-dimensional mesh.

    Args:
        module: its plan maps name patterns (``blocks.*.up``) to a name in STYLES or a ParallelStyle.
        mesh: the tensor-parallel ranks.
        gather: over all ranks.
        loss_parallel: leave the outputs of "colwise_gather" layers cut by class, for a loss under loss_parallel().

    Returns:
        What sums the gradients of whole parameters that are used on cut features.

    Raises:
        ValueError: no plan, a pattern that matches nothing, two that match one name, or a size that can't be cut.
    """
    layers = dict(module.named_modules())
    chosen = styles_by_layer(module, mesh.size())
    tied = tied_parameters(module)
    stated = {name: USED_ON[style] for name, style in chosen.items() if isinstance(style, str) and style in USED_ON}
    styles = {
        name: _style(name, style, layers[name], mesh.size(), loss_parallel)
        for name, style in chosen.items()
        if name not in stated
    }
    parallelize_module(module, mesh, styles, src_data_rank=None)  # the ranks are alike, so each cuts its own part
    # parallelize_module makes a new parameter for each layer, which unties those that were one.
    for (layer, name), (first_layer, first_name) in tied:
        if type(layer._parameters[name]) is not type(first_layer._parameters[first_name]):
            raise ValueError(
                "tensor_parallel_plan cuts one of two layers that share a weight, but not the other. Cut both by the "
                'same dimension ("embedding" and "colwise_gather"), or neither.'
            )
    tie(tied)
    return CutFeatures(module, styles, stated, mesh.get_group(), gather)


def plan_of(module: nn.Module, degree: int) -> Plan:
    """The module's own plan, else the ready one for what it is.

    Raises:
        ValueError: there is neither; the message has the lines of a ready one that match, to start from.
    """
    plan: Plan = module.tensor_parallel_plan() or ready_plan(module, degree)  # type: ignore[operator]
    if not plan:
        raise ValueError(refusal(module))
    return plan


def styles_by_layer(module: nn.Module, degree: int) -> "dict[str, str | ParallelStyle]":
    """The layers that the module's plan names, and how each is cut; raises as ``apply_plan`` does."""
    layers = dict(module.named_modules())
    plan = plan_of(module, degree)
    chosen: dict[str, tuple[str, str | ParallelStyle]] = {}
    for pattern, style in plan.items():
        names = [name for name in layers if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(f"tensor_parallel_plan: {pattern!r} matches no layer of {type(module).__name__}.")
        for name in names:
            if name in chosen:
                raise ValueError(
                    f"tensor_parallel_plan: both {chosen[name][0]!r} and {pattern!r} match {name!r}. "
                    "Make the patterns narrower, so that each layer is cut one way."
                )
            chosen[name] = pattern, style
    return {name: style for name, (_, style) in chosen.items()}


def local_shapes(module: nn.Module, degree: int) -> dict[str, tuple[int, ...]]:
    """The shape of each cut layer's weight on one of ``degree`` ranks, by layer name. A style of the user's own, whose
    cut can't be known, counts as cut in every dimension.
    """
    layers = dict(module.named_modules())
    found: dict[str, tuple[int, ...]] = {}
    for name, style in styles_by_layer(module, degree).items():
        weight = getattr(layers[name], "weight", None)
        if not isinstance(weight, Tensor):
            continue
        dimension = cut_dimension(style)
        cut = range(weight.dim()) if isinstance(style, ParallelStyle) and dimension is None else [dimension]
        found[name] = tuple(size // degree if d in cut else size for d, size in enumerate(weight.shape))
    return found


def cut_dimension(style: "str | ParallelStyle") -> int | None:
    """The dimension of the weight that a style cuts; None where it cuts none, or isn't known to."""
    if isinstance(style, str):
        return CUT_DIMENSION.get(style.partition("_")[0])
    return 0 if isinstance(style, ColwiseParallel) else 1 if isinstance(style, RowwiseParallel) else None


def _style(
    name: str, style: "str | ParallelStyle", layer: nn.Module, degree: int, loss_parallel: bool
) -> ParallelStyle:
    check_cut(name, style, layer, degree)
    if isinstance(style, ParallelStyle):
        return style
    if loss_parallel and style.startswith("colwise_gather"):
        layout = Shard(1) if style.endswith("sequence") else Replicate()
        return ColwiseParallel(input_layouts=layout, output_layouts=Shard(-1), use_local_output=False)
    make = STYLES[style]
    assert make is not None, "what stays whole is told apart before"
    return make()


def check_cut(name: str, style: "str | ParallelStyle", layer: nn.Module, degree: int) -> None:
    """Refuse a style that a layer can't be cut by; what a style of the user's own can do isn't known.

    Args:
        name: of the layer.
        style: from the plan.
        layer: its weight is whole.
        degree: parts.

    Raises:
        ValueError: no such style, no such layer, or a size that can't be cut.
    """
    if isinstance(style, ParallelStyle):
        return
    if style not in STYLES:
        raise ValueError(
            f"tensor_parallel_plan: {name!r} has an unknown style {style!r}. {did_you_mean(style, STYLES)}"
        )
    weight = getattr(layer, "weight", None)
    dimension = CUT_DIMENSION.get(style.partition("_")[0])
    if dimension is not None and (
        not isinstance(layer, nn.Linear | nn.Embedding) or any(map(is_quantized, layer.parameters(recurse=False)))
    ):
        raise ValueError(
            f"tensor_parallel_plan: {name!r} is a {type(layer).__module__}.{type(layer).__name__}, and {style!r} cuts "
            "nn.Linear and nn.Embedding with plain weights only, no adapters around them and no quantized ones. Use "
            "strategy='fsdp2', or a plan that leaves such layers out."
        )
    if dimension is not None and isinstance(weight, Tensor) and weight.shape[dimension] % degree:
        raise ValueError(
            f"tensor_parallel_plan: {name!r} is cut {style}, but its weight {tuple(weight.shape)} has "
            f"{weight.shape[dimension]} entries in dimension {dimension}, which {degree} ranks don't divide. "
            f"Use a tensor_parallel degree that divides it, or leave the layer out of the plan."
        )


def tied_parameters(module: nn.Module) -> Ties:
    """(owner, name) of every further place of a shared parameter, with the (owner, name) of its first place."""
    first: dict[int, tuple[nn.Module, str]] = {}
    tied = []
    for layer in module.modules():
        for name, parameter in layer._parameters.items():
            if parameter is None:
                continue
            if id(parameter) in first:
                tied.append(((layer, name), first[id(parameter)]))
            else:
                first[id(parameter)] = layer, name
    return tied


def tie(tied: Ties) -> None:
    """Make one parameter again of those that ``tied_parameters`` found, where layers were given new ones."""
    for (layer, name), (first_layer, first_name) in tied:
        layer._parameters[name] = first_layer._parameters[first_name]


@contextmanager
def groups_split_by_mesh(optimizer: Optimizer) -> Iterator[None]:
    """In here, each of the optimizer's groups holds parameters of one mesh: fused kernels take no mixture. Outside, the
    groups are the user's, so that schedules and checkpoints know nothing of it.
    """
    whole = optimizer.param_groups
    parts: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for group in whole:
        by_mesh: dict[Any, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            by_mesh[mesh_of(parameter)].append(parameter)
        parts += [(group, {**group, "params": parameters}) for parameters in by_mesh.values()]
    optimizer.param_groups = [part for _, part in parts]
    try:
        yield
    finally:
        optimizer.param_groups = whole
        for group, part in parts:  # some optimizers count updates in a group, alike in all its parts
            group.update({name: value for name, value in part.items() if name != "params"})
