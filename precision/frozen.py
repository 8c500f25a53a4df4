"""Frozen parts of a module, such as a teacher or a reference: they don't train, and may have a number format of their
own.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .boundary import cast_inputs, widen_outputs
from .names import did_you_mean
from .quantized import is_quantized

Module = TypeVar("Module", bound=nn.Module)


class Format(NamedTuple):
    """A number format of a part that makes no gradients: of its parameters, and of its matrix products where autocast
    casts them.
    """

    parameters: torch.dtype
    products: torch.dtype | None = None


FORMATS: Mapping[str, Format] = {
    "bf16-true": Format(torch.bfloat16),
    "16-true": Format(torch.float16),
    "32-true": Format(torch.float32),
    "64-true": Format(torch.float64),
    "bf16-mixed": Format(torch.float32, torch.bfloat16),
    "16-mixed": Format(torch.float32, torch.float16),
}
SAVED = ("once", "always", "never")


class Frozen:
    """What ``frozen`` says of a module; it stands in the place of the module's ``forward``, and its ``train`` in that
    of the module's.

    It is found as the owner of the module's ``train``, so that a copy of the module, or one that was sent to another
    process, has a copy of this.

    Args:
        module: that is frozen.
        precision, saved, exported, input_gradients: see ``frozen``.

    Attributes:
        format: the number format; None where it is that of the run.
    """

    def __init__(
        self, module: nn.Module, precision: str | None, saved: str, exported: bool, input_gradients: bool
    ) -> None:
        self.module, self.precision, self.saved = module, precision, saved
        self.exported, self.input_gradients = exported, input_gradients
        self.format = None if precision is None else FORMATS[precision]
        earlier = mark_of(module)
        before = earlier.own_forward if earlier else vars(module).get("forward")
        self.own_forward: Callable[..., Any] | None = before

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the module's own forward, for who looks what it takes."""
        return inspect.signature(self._forward)

    @property
    def _forward(self) -> Callable[..., Any]:
        own: Callable[..., Any] = self.own_forward or type(self.module).forward.__get__(self.module)
        return own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's own forward: without a graph, and in its number format."""
        module = self.module
        if not self.input_gradients and torch.is_grad_enabled():
            self._check_inputs(args, kwargs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.input_gradients), self._autocast(args, kwargs):
            if self.format is None:
                return self._forward(*args, **kwargs)
            args, kwargs = cast_inputs(self.format.parameters, module, args, kwargs)
            return widen_outputs(module, args, self._forward(*args, **kwargs))

    def train(self, mode: bool = True) -> nn.Module:
        """Stay in evaluation, whatever the mode of the whole."""
        module = self.module
        return type(module).train(module, False)

    def _check_inputs(self, args: Any, kwargs: Any) -> None:
        if any(isinstance(value, Tensor) and value.requires_grad for value in tree_leaves((args, kwargs))):
            raise ValueError(
                f"The frozen {type(self.module).__name__} is given inputs that carry a gradient, which ends there. "
                "Write frozen(..., input_gradients=True) for gradients to go through it, or give it input.detach()."
            )

    def _autocast(self, args: Any, kwargs: Any) -> AbstractContextManager[Any]:
        if self.format is None:
            return nullcontext()
        tensors = (value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))
        device = next(tensors, next(self.module.parameters(), torch.empty(0))).device.type
        if self.format.products is None:
            return torch.autocast(device, enabled=False)
        return torch.autocast(device, dtype=self.format.products)


def frozen(
    module: Module,
    *,
    precision: str | None = None,
    saved: str = "once",
    exported: bool = False,
    input_gradients: bool = False,
) -> Module:
    """Freeze a module for good, as a teacher or a reference is: it takes no gradients, stays in evaluation whatever
    ``train()`` says (no dropout, no news in its batch norms), and its forward makes no graph.

    It keeps its class, the names of its parameters and its ``state_dict``. It is placed and sharded as the rest is, and
    has neither optimizer state nor memory for gradients. Where it is no part of a block of ``shard_units()``, fully
    sharded strategies gather it for its own forward alone. See docs/frozen.md.

    Args:
        module: of which no parameter is to train. It is changed in place.
        precision: a number format of its own beside the run's: "bf16-true", "16-true", "32-true", "64-true",
            "bf16-mixed" or "16-mixed". Its parameters and floating-point buffers are cast at once, its inputs as they
            come, and 16-bit outputs to float32. None: that of the run.
        saved: what checkpoints hold of it. "once": the first one of a run has its files, which later ones have, too, as
            hard links. "always": each has files of its own. "never": none has, and a resumed run's module must bring
            the same values, which is checked. ``save_only_trainable`` leaves out what is saved once.
        exported: whether ``fit.export`` writes it; a ``save_pretrained`` writes whole models.
        input_gradients: whether gradients go through its forward to its inputs.

    Returns:
        The module.

    Raises:
        TypeError: it isn't a module.
        ValueError: an option has another value than those above.

    Example:
        >>> class Distilled(TrainModule):
        ...     def __init__(self, teacher, student):
        ...         super().__init__()
        ...         self.student = student
        ...         self.teacher = frozen(teacher, precision="bf16-true")
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"frozen() takes a module. Received: {module!r:.200}")
    if precision is not None and precision not in FORMATS:
        raise ValueError(f"frozen(precision=...): {did_you_mean(str(precision), FORMATS)}")
    if saved not in SAVED:
        raise ValueError(f"frozen(saved=...) takes {', '.join(map(repr, SAVED))}. Received: {saved!r}")
    mark = Frozen(module, precision, saved, exported, input_gradients)
    module.requires_grad_(False)
    take_over(module, mark, mark.train)
    module.train(False)
    convert_frozen(module)
    return module


def take_over(layer: nn.Module, forward: Callable[..., Any], train: Callable[..., nn.Module]) -> None:
    """Put a mark where torch looks for a layer's own methods."""
    layer.forward = forward
    layer.train = train  # type: ignore[method-assign]


def mark_of(layer: nn.Module) -> Frozen | None:
    """What ``frozen`` says of a layer; None where it wasn't called with this one."""
    owner = getattr(vars(layer).get("train"), "__self__", None)
    return owner if isinstance(owner, Frozen) else None


def frozen_parts(module: nn.Module) -> dict[str, Frozen]:
    """The parts of a module that ``frozen`` was called with, by their names; what is inside of another comes later."""
    return {name: mark for name, layer in module.named_modules() if (mark := mark_of(layer)) is not None}


def parts_by_layer(module: nn.Module) -> dict[nn.Module, Frozen]:
    """Each layer in a frozen part to the innermost one that it is in."""
    return {layer: mark for mark in frozen_parts(module).values() for layer in mark.module.modules()}


def own_dtypes(module: nn.Module) -> dict[int, torch.dtype]:
    """The ids of parameters and buffers of parts with a number format of their own, to the dtype of each."""
    return {
        id(tensor): mark.format.parameters
        for mark in frozen_parts(module).values()
        if mark.format is not None
        for tensor in (*mark.module.parameters(), *mark.module.buffers())
    }


def convert_frozen(module: nn.Module) -> None:
    """Bring the parts with a number format of their own into its dtypes, where they aren't."""
    dtypes = own_dtypes(module)

    def cast(tensor: Tensor) -> Tensor:
        dtype = dtypes.get(id(tensor))
        is_number = tensor.is_floating_point() and not is_quantized(tensor)
        return tensor if dtype is None or not is_number else tensor.to(dtype)

    if dtypes:
        apply: Callable[..., nn.Module] = module._apply
        apply(cast)


def check_frozen_parts(module: nn.Module) -> None:
    """Refuse frozen parts with parameters that train: checkpoints may leave them out.

    Raises:
        ValueError: names them.
    """
    found = [
        f"{part}.{name}".lstrip(".")
        for part, mark in frozen_parts(module).items()
        for name, parameter in mark.module.named_parameters()
        if parameter.requires_grad
    ]
    if found:
        more = f" and {len(found) - 10} more" if len(found) > 10 else ""
        raise ValueError(
            f"These parameters are in a part that frozen() was called with, and require a gradient: "
            f"{', '.join(found[:10])}{more}. Call frozen() on what doesn't train alone, after it is whole."
        )
