"""The stage of a played rank: operators on tensors that have a shape, a dtype and a storage, but no memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..batches import map_batch
from .repeats import Repeats

aten = torch.ops.aten
DEVICE = torch.ops.prim.device.default
PLAIN = Tensor, nn.Parameter, FakeTensor  # any other class takes an operator apart, and has the parts computed
PROFILER = "profiler"  # the namespace of operators that compute nothing
# What the framework, not the user, asks of numbers that nobody has: a norm of 0 is finite, and needs no clipping.
ANSWERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: lambda tensor: 0.0 if tensor.dtype.is_floating_point else 0,
    aten.is_nonzero.default: lambda tensor: False,
    aten.equal.default: lambda first, second: True,
}


class Stage(TorchDispatchMode):
    """Entered around all that a played rank computes.

    What is made in here, and what is computed from such tensors, is fake: torch's FakeTensor, whose storage has a size
    and no memory. What is computed from real tensors alone stays real, so that a batch can be read and its items be
    counted. Ranges of numbers are real, too: models look at positions to find out which mask they need.

    Attributes:
        is_in_module: whether the user's forward and loss run, or their backward: there a number that nobody has is an
            error, since the user's program would go another way for another number.
        is_placing: whether the module is being placed.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.repeats = Repeats(self.fake_mode)
        self.is_in_module = self.is_placing = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here, and torch's way around its compiler costs time at every operator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute an operator, on fake tensors where any is fake or none is given."""
        if func is DEVICE:  # a fake tensor is asked for it at every turn
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = kwargs or {}
        if func.namespace == PROFILER:
            return func(*args, **kwargs)
        if not all(kind in PLAIN for kind in types):
            return NotImplemented  # a class of its own (DTensor) takes the operator apart first, and comes here again
        some, fake = look(args)
        if kwargs:
            more, more_fake = look(kwargs.values())
            some, fake = some or more, fake or more_fake
        if some and not fake:
            return func(*args, **kwargs)
        if fake and not self.is_in_module and func in ANSWERS:
            return ANSWERS[func](*args)
        if not some:
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "meta":
                return func(*args, **kwargs)
            if func._overloadpacket is aten.arange:
                return func(*args, **kwargs)
            # torch's C++ reads what it puts into such: DDP agrees by them upon which bucket a gradient lies in.
            if self.is_placing and kwargs.get("dtype") is torch.int32:
                return func(*args, **kwargs)
        return self.repeats.call(func, args, kwargs, self.compute)

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Have torch find the result of an operator on fake tensors."""
        with self.fake_mode:
            return func(*args, **kwargs)

    @contextmanager
    def left(self) -> Iterator[None]:
        """In here everything is real."""
        with _disable_current_modes():
            yield

    @contextmanager
    def in_module(self, inside: bool = True) -> Iterator[None]:
        """In here the user's module computes; or, in the midst of it, a package does for itself."""
        before, self.is_in_module = self.is_in_module, inside
        try:
            yield
        finally:
            self.is_in_module = before

    @contextmanager
    def placing(self) -> Iterator[None]:
        """In here a module is placed."""
        self.is_placing = True
        try:
            yield
        finally:
            self.is_placing = False

    def fake(self, tensor: Tensor) -> Tensor:
        """A fake tensor of the same shape, dtype, strides and class."""
        if isinstance(tensor, FakeTensor):
            return tensor
        with self.left():
            return self.fake_mode.from_tensor(tensor.detach(), static_shapes=True)

    def copied(self, batch: Any) -> Any:
        """A batch whose tensors are fake, made as a copy to a device would make them: the memory is new.

        Raises:
            ValueError: it is an object that nobody looks into.
        """

        def copy(value: Any) -> Tensor:
            if not isinstance(value, Tensor):
                raise ValueError(f"A batch of {type(value).__name__}, which moves itself, has no shapes to be told.")
            return torch.empty(value.shape, dtype=value.dtype)

        return map_batch(copy, batch)

    def take(self, module: nn.Module) -> None:
        """Exchange parameters and buffers that have memory for fake ones. Ties stay, and what a weight knows beside its
        values: a quantized one how it is packed.
        """
        exchanged: dict[int, tuple[Tensor, Tensor]] = {}

        def stand_in(tensor: Tensor) -> Tensor:
            if id(tensor) not in exchanged:
                fake = self.fake(tensor)
                if isinstance(tensor, nn.Parameter):
                    fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    vars(fake).update({name: value for name, value in vars(tensor).items() if name not in vars(fake)})
                exchanged[id(tensor)] = tensor, fake
            return exchanged[id(tensor)][1]

        for layer in module.modules():
            held: Any
            for held in (layer._parameters, layer._buffers):
                for name, tensor in held.items():
                    if tensor is not None and not tensor.is_meta:
                        held[name] = stand_in(tensor)


def look(values: Any) -> tuple[bool, bool]:
    """Whether there are tensors among an operator's arguments, and whether one of them is fake."""
    some = fake = False
    for value in values:
        if isinstance(value, Tensor):
            some = True
            fake = fake or isinstance(value, FakeTensor)
        elif isinstance(value, list | tuple):
            more, more_fake = look(value)
            some, fake = some or more, fake or more_fake
    return some, fake
