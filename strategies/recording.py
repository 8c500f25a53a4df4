"""What ``init_weights`` does to a parameter, written down instead of done: it can then be done to any part of it.

A stand-in has a parameter's shape and no memory. In-place operations whose result at a place depends on that place
alone (random numbers, fills, products with a number) are recorded, on the whole of it or on rows and columns. Whatever
else is asked of a stand-in can't be done on a part, and raises.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .held_parts import Slices

LONGEST = 64  # operations on one parameter; a loop over its rows is better done once than for each part

aten = torch.ops.aten
VIEWS = (aten.detach.default, aten.alias.default, aten.select.int, aten.slice.Tensor)
ELEMENTWISE = frozenset(
    (
        *("abs_", "add_", "clamp_", "clamp_max_", "clamp_min_", "copy_", "div_", "erfinv_", "exp_", "fill_", "log_"),
        *("mul_", "neg_", "pow_", "reciprocal_", "sqrt_", "sub_", "tanh_", "zero_"),
    )
)
OWN_LOOP = "_no_grad_trunc_normal_"
"""A function of torch.nn.init that looks at what it drew, and draws again until all lies within the bounds."""


class NotByParts(Exception):
    """An operation on a stand-in that can't be done on a part of a parameter."""


@dataclass(frozen=True)
class Operation:
    """One in-place operation on a part of a parameter.

    Attributes:
        function: torch's, called with a tensor first.
        arguments, keywords: what follows; numbers and tensors of one number.
        box: where in the parameter it was done.
        draws: how many operations before it drew random numbers; None where it draws none.
    """

    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    box: Slices
    draws: int | None


class StandIn(Tensor):
    """A parameter without memory that records what is done to it.

    Args:
        like: of the dtype that is needed; it may be without memory.
        device: that it says it is on.
        box: where in the parameter it lies, where it is a view of some rows or columns.
        kept: the parameter's dimensions that a view still has.
        operations: the list that they are written into; a view writes into that of what it is a view of.
    """

    @staticmethod
    def __new__(
        cls,
        like: Tensor,
        device: torch.device,
        box: Slices | None = None,
        kept: tuple[int, ...] = (),
        operations: list[Operation] | None = None,
    ) -> "StandIn":
        """Make a tensor without memory."""
        shape = like.shape if box is None else [box[d].stop - box[d].start for d in kept]
        made: StandIn = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=device)
        return made

    def __init__(
        self,
        like: Tensor,
        device: torch.device,
        box: Slices | None = None,
        kept: tuple[int, ...] = (),
        operations: list[Operation] | None = None,
    ) -> None:
        self.box: Slices = tuple(slice(0, size) for size in like.shape) if box is None else box
        self.kept = tuple(range(like.ndim)) if box is None else kept
        self.operations: list[Operation] = [] if operations is None else operations

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Record an operation, or take a view."""
        given, *rest = args
        keywords = dict(kwargs or {})
        if not isinstance(given, StandIn) or any(isinstance(leaf, StandIn) for leaf in tree_leaves((rest, keywords))):
            raise NotByParts(f"{function} reads a parameter")
        if function in VIEWS:
            return given.part(function, *rest, **keywords)
        given.record(function, tuple(rest), keywords)
        return given

    def part(self, function: Any, dimension: int = 0, first: int | None = None, *rest: Any, **keywords: Any) -> Any:
        """Take a view as ``detach``, ``select`` or ``slice`` would."""
        box, kept = list(self.box), self.kept
        if function in (aten.select.int, aten.slice.Tensor):
            size = self.shape[dimension]
            begin, end, step = (
                (range(size)[first], range(size)[first] + 1, 1)  # type: ignore[index]
                if function is aten.select.int
                else slice(first, *rest).indices(size)
            )
            if step != 1 or keywords:
                raise NotByParts(f"{function} takes every {step}th row")
            d = kept[dimension]
            end = max(begin, end)
            box[d] = slice(box[d].start + begin, box[d].start + end)
            if function is aten.select.int:
                kept = tuple(other for other in kept if other != d)
        return StandIn(self, self.device, tuple(box), kept, self.operations)

    def record(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Write an in-place operation down.

        Raises:
            NotByParts: it isn't one whose result at a place depends on that place alone.
        """
        name = function._schema.name.removeprefix("aten::")
        draws = torch.Tag.nondeterministic_seeded in function.tags
        tensors = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)]
        if not (draws and name.endswith("_")) and name not in ELEMENTWISE:
            raise NotByParts(f"{name} isn't done element by element")
        if any(tensor.numel() != 1 or tensor.is_meta for tensor in tensors) or (draws and tensors):
            raise NotByParts(f"{name} is given a tensor")
        copied = tree_map(lambda leaf: leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf, arguments)
        self.note(function, copied, keywords, draws)

    def note(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], draws: bool) -> None:
        """Add to the operations, unless they are too many, or draw from a generator of the caller's."""
        if keywords.get("generator") is not None:
            raise NotByParts("numbers are drawn from a generator of the caller's own")
        if len(self.operations) == LONGEST:
            raise NotByParts(f"more than {LONGEST} operations on one parameter")
        kept = {key: value for key, value in keywords.items() if key != "generator"}
        before = sum(operation.draws is not None for operation in self.operations) if draws else None
        self.operations.append(Operation(function, arguments, kept, self.box, before))


@contextmanager
def loops_recorded() -> Iterator[None]:
    """In here, torch's truncated normal distribution is recorded as one operation: part by part it can be drawn, though
    not by the operations that it is made of.
    """
    draw = getattr(nn.init, OWN_LOOP)

    def record_or_draw(tensor: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        if not isinstance(tensor, StandIn):
            drawn: Tensor = draw(tensor, *arguments, **keywords)
            return drawn
        tensor.note(draw, arguments[:4], {**keywords, **dict(zip(("generator",), arguments[4:], strict=False))}, True)
        return tensor

    setattr(nn.init, OWN_LOOP, record_or_draw)
    try:
        yield
    finally:
        setattr(nn.init, OWN_LOOP, draw)
