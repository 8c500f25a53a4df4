"""Operators that were asked for before: a fake result is made again from its shape, without asking torch for it.

A model's blocks ask for the same operators with the same shapes, over and over, and torch's fake tensors take a fifth
of a millisecond for each, even for those that they remember themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

Compute = Callable[[Any, Any, Any], Any]
NUMBERS = int, float, bool
NAMES = torch.dtype, torch.device, torch.layout, torch.memory_format, str, type(None)
UNKNOWN = object()  # an argument that can't be compared
NOT_ALIKE = ()  # remembered for operators whose results can't be made again from shapes


@dataclass(frozen=True, slots=True)
class Made:
    """How a result is made again.

    Attributes:
        argument: the number of the argument that it lies in or is; None where its memory is new.
        is_same: whether it is that argument itself.
        shape, stride, offset, dtype, device: of the result.
    """

    argument: int | None
    is_same: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class Repeats:
    """Remembers results of operators by their arguments' shapes.

    Args:
        mode: of the fake tensors.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.known: dict[Any, tuple[bool, Sequence[Made]]] = {}

    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], compute: Compute) -> Any:
        """Make the result of an operator, from what is remembered or by computing.

        Args:
            func: the operator.
            args, kwargs: its arguments.
            compute: has torch find its result.
        """
        key = key_of(func, args, kwargs)
        if key is UNKNOWN:
            return compute(func, args, kwargs)
        known = self.known.get(key)
        if known is None:
            out = compute(func, args, kwargs)
            self.known[key] = self.learned(func, args, kwargs, key, out)
            return out
        is_list, made = known
        if made is NOT_ALIKE:
            return compute(func, args, kwargs)
        if is_list:
            return [self.made_again(each, args) for each in made]
        return self.made_again(made[0], args)

    def made_again(self, made: Made, args: Sequence[Any]) -> Tensor:
        """Make a result."""
        if made.is_same:
            return args[made.argument]  # type: ignore[index,no-any-return]
        with in_kernel_invocation_manager(self.mode):
            if made.argument is None:
                plain = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
            else:
                storage = args[made.argument].untyped_storage()
                plain = torch.empty((0,), dtype=made.dtype, device="meta")
                plain.set_(storage, made.offset, made.shape, made.stride)
        return FakeTensor(self.mode, plain, made.device)

    def learned(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], key: Any, out: Any
    ) -> tuple[bool, Sequence[Made]]:
        """What to remember of a result that torch found."""
        is_list = type(out) is list
        results = out if is_list else [out]
        fakes = [value for value in args if isinstance(value, FakeTensor)]
        if (
            func.namespace != "aten"
            or torch.Tag.inplace_view in func.tags
            or not results
            or not all(isinstance(each, FakeTensor) and is_plain(each) and each.constant is None for each in results)
            or any(each is value for each in results for value in kwargs.values())
            or key_of(func, args, kwargs) != key  # it changed an argument's shape
        ):
            return False, NOT_ALIKE
        storages = {value.untyped_storage()._cdata for value in flat((*args, *kwargs.values()))}
        found = []
        for each in results:
            same = [number for number, value in enumerate(args) if value is each]
            cdata = each.untyped_storage()._cdata
            if same:
                place, is_same = same[0], True
            elif cdata not in storages:
                place, is_same = None, False
                storages.add(cdata)  # two results in one new storage aren't made again
            elif len(fakes) == 1 and fakes[0].untyped_storage()._cdata == cdata:
                place, is_same = next(n for n, value in enumerate(args) if value is fakes[0]), False
            else:
                return False, NOT_ALIKE
            made = Made(
                place, is_same, tuple(each.shape), each.stride(), each.storage_offset(), each.dtype, each.fake_device
            )
            if traits(self.made_again(made, args)) != traits(each):
                return False, NOT_ALIKE
            found.append(made)
        return is_list, found


def key_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operator's result follows from; ``UNKNOWN`` where that can't be told from shapes."""
    if torch.is_inference_mode_enabled():
        return UNKNOWN
    key: list[Any] = [func, torch.get_default_dtype()]
    if not put(key, args):
        return UNKNOWN
    for name, value in kwargs.items():
        key.append(name)
        if not put(key, (value,)):
            return UNKNOWN
    return tuple(key)


def put(key: list[Any], values: Sequence[Any]) -> bool:
    """Append what is to be compared of arguments to a key; return whether all can be."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None or not is_plain(value):
                return False
            key += (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
        elif kind in NUMBERS:
            key += (kind, value)  # 1, 1.0 and True are equal, and have other dtypes
        elif kind in NAMES:
            key.append(value)
        elif kind is list or kind is tuple or kind is torch.Size:
            key += (list, len(value))
            if not put(key, value):
                return False
        else:
            return False
    return True


def is_plain(tensor: Tensor) -> bool:
    """Whether shape, strides, offset and dtype say all of a tensor."""
    return tensor.layout is torch.strided and not tensor.dtype.is_complex and not tensor.is_neg()


def traits(tensor: Tensor) -> tuple[Any, ...]:
    """All that is to be equal of a tensor that was made again."""
    return (
        tensor.shape,
        tensor.stride(),
        tensor.storage_offset(),
        tensor.dtype,
        tensor.untyped_storage().nbytes(),
        tensor.requires_grad,
        str(torch._C._dispatch_keys(tensor)),
    )


def flat(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among arguments."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += flat(value)
    return found
