"""Operators of a played rank: what is made again from shapes is what torch's fake tensors find."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stratagem.strategies.played.repeats import Repeats, traits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

aten = torch.ops.aten
CASES: dict[str, tuple[Any, Callable[[], tuple[Any, ...]], dict[str, Any]]] = {
    "sum of unlike": (aten.add.Tensor, lambda: (torch.ones(2, 3), torch.ones(3, dtype=torch.float64)), {}),
    "product": (aten.mm.default, lambda: (torch.ones(3, 2).t(), torch.ones(3, 4)), {}),
    "turned": (aten.t.default, lambda: (torch.ones(2, 3),), {}),
    "slice of a part": (aten.slice.Tensor, lambda: (torch.ones(8)[3:], 0, 1, 3), {}),
    "bytes": (aten.view.dtype, lambda: (torch.ones(4), torch.uint8), {}),
    "pieces": (aten.split.Tensor, lambda: (torch.ones(7, 2), 3), {}),
    "cast": (aten._to_copy.default, lambda: (torch.ones(2, 2),), {"dtype": torch.bfloat16}),
    "in place": (aten.add_.Tensor, lambda: (torch.ones(2), 1), {}),
    "several": (aten._foreach_add.Scalar, lambda: ([torch.ones(2), torch.ones(0, 3)], 1.0), {}),
    "new": (aten.empty.memory_format, lambda: ([2, 3],), {"device": torch.device("cpu")}),
    "largest": (aten.max.dim, lambda: (torch.ones(2, 3), 1), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_result_that_is_made_again_is_what_torch_finds(name: str) -> None:
    func, make, kwargs = CASES[name]
    with FakeTensorMode() as mode:
        repeats, asked = Repeats(mode), []

        def find(func: Any, args: Any, kwargs: Any) -> Any:
            asked.append(func)
            return func(*args, **kwargs)

        given = [make() for _ in range(3)]
        results = [repeats.call(func, args, kwargs, find) for args in given]
        expected = func(*make(), **kwargs)
    listed = [list(each) if isinstance(each, list | tuple) else [each] for each in (*results, expected)]
    assert len({tuple(map(traits, each)) for each in listed}) == 1
    assert type(results[1]) is type(results[0])
    assert len(asked) == (3 if name == "largest" else 1)  # a named tuple is torch's to make
    for args, result in zip(given, listed, strict=False):
        first = args[0]
        if isinstance(first, Tensor):
            lies_in = [part.untyped_storage()._cdata == first.untyped_storage()._cdata for part in result]
            assert all(lies_in) == (func.is_view or name == "in place")


def test_what_changes_a_shape_is_asked_for_each_time() -> None:
    with FakeTensorMode() as mode:
        repeats = Repeats(mode)
        for _ in range(2):
            tensor = torch.ones(2, 3)
            repeats.call(aten.transpose_.default, (tensor, 0, 1), {}, lambda func, args, kwargs: func(*args, **kwargs))
            assert tensor.shape == (3, 2)


def test_equal_numbers_of_other_types_make_other_results() -> None:
    with FakeTensorMode() as mode:
        repeats, ints = Repeats(mode), torch.ones(2, dtype=torch.int64)
        found = [
            repeats.call(aten.mul.Tensor, (ints, number), {}, lambda func, args, kwargs: func(*args, **kwargs)).dtype
            for number in (1, 1.0, 1, 1.0)
        ]
    assert found == [torch.int64, torch.float32] * 2
