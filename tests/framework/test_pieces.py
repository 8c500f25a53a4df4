"""Batches cut along their samples, and outputs joined again: what can be, and what is refused by its name."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from stratagem.framework.run.pieces import Joined, bounds, cut
from torch import Tensor

Pair = namedtuple("Pair", ["left", "right"])
X = torch.arange(14.0).view(7, 2)
TEXT = "abcdefg"


@dataclass
class Graphs:
    nodes: Tensor
    size: int


class Mover:
    """An object of a library that knows how it moves."""

    def to(self, device: Any) -> "Mover":
        return self


def forward(x: Any, mask: Any = None, *rest: Any, **named: Any) -> None:
    """What the arguments below are for."""


def flat(value: Any) -> Any:
    """Plain Python in the place of tensors."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict | UserDict):
        return {key: flat(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [flat(entry) for entry in value]
    return vars(value) | {"nodes": value.nodes.tolist()} if isinstance(value, Graphs) else value


@pytest.mark.parametrize(
    ("value", "second"),
    [
        (X, X[3:5]),
        ({"a": X, "b": [X, X], "c": None, "d": "text"}, {"a": X[3:5], "b": [X[3:5], X[3:5]], "c": None, "d": "text"}),
        (UserDict(a=X, t=torch.tensor(0.07)), {"a": X[3:5], "t": torch.tensor(0.07)}),
        (OrderedDict(a=X), {"a": X[3:5]}),
        ((X, X + 1), (X[3:5], X[3:5] + 1)),
        (Pair(X, 2), Pair(X[3:5], 2)),
        ([{"sample": i} for i in range(7)], [{"sample": 3}, {"sample": 4}]),
        ({"x": X, "texts": list(TEXT), "more": tuple(TEXT)}, {"x": X[3:5], "texts": ["d", "e"], "more": ["d", "e"]}),
        (Graphs(X, 2), Graphs(X[3:5], 2)),
    ],
    ids=["tensor", "mapping", "UserDict", "OrderedDict", "tuple", "namedtuple", "samples", "texts", "dataclass"],
)  # fmt: skip
def test_a_piece_has_the_samples_of_each_container(value: Any, second: Any) -> None:
    pieces = cut(forward, [value], {"mask": X}, 3, fill=False)
    assert [(piece.begin, piece.end) for piece in pieces] == [(0, 3), (3, 5), (5, 7)]
    [found] = pieces[1].args
    assert type(found) is type(value)
    assert flat(found) == flat(second)
    assert pieces[1].kwargs["mask"].equal(X[3:5])


def test_no_piece_is_empty_and_ranks_make_equally_many() -> None:
    assert bounds(7, 3) == [(0, 3), (3, 5), (5, 7)] and bounds(2, 3) == [(0, 1), (1, 2)] and bounds(0, 2) == [(0, 0)]
    assert len(cut(forward, [X[:2]], {}, 4, fill=False)) == 2
    filled = cut(forward, [X[:2]], {}, 4, fill=True)
    assert [piece.counts for piece in filled] == [True, True, False, False]
    assert all(piece.args[0].equal(X[:1]) for piece in filled[2:])


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ([X], {"bias": X.T}, r"7 samples, and bias is a tensor of shape \(2, 7\)"),
        ([X, {"a": X[:1]}], {}, r"and mask\['a'\] is a tensor of shape \(1, 2\)"),
        ([X, X, (X, X[:3])], {}, r"and input 2\[1\] is a tensor of shape \(3, 2\)"),
        ([X, Mover()], {}, "and mask is a Mover, which nobody else looks into"),
        ([X, {1, 2}], {}, "and mask is a set"),
        ([X[:2]], {"views": [X[:2], X[:2]]}, "and views is a list of 2 tensors of 2 rows, and could be cut either way"),
        ([3, "text"], {"other": torch.tensor(1.0)}, "there is no tensor and no list in x, mask, other"),
    ],
)
def test_what_can_not_be_cut_is_named(args: list[Any], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"contrastive_chunks=2 cuts what forward takes.*{message}"):
        cut(forward, args, kwargs, 2, fill=False)


def give(x: Tensor) -> Any:
    return {"rows": x, "both": (x * 2, [x[:, 0].long()]), "graphs": Graphs(x + 1, 2), "none": None}


def test_outputs_are_what_the_whole_gives() -> None:
    joined = Joined(7, 3)
    for piece in cut(forward, [X], {}, 3, fill=False):
        joined.fill(piece, give(*piece.args))
    assert flat(joined.outputs()) == flat(give(X))
    assert isinstance(joined.outputs()["both"], tuple)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([X[:3], torch.tensor(1.0)], r"a piece of 3 outputs\[1\] is a Tensor of shape \(\)"),
        ({"similarity": X.T}, r"a piece of 3 outputs\['similarity'\] is a Tensor of shape \(2, 7\)"),
        (Mover(), "a piece of 3 outputs is a Mover"),
    ],
)
def test_outputs_without_rows_are_named(outputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Joined(7, 3).fill(cut(forward, [X], {}, 3, fill=False)[0], outputs)


def test_rows_of_another_shape_are_refused() -> None:
    joined, pieces = Joined(7, 3), cut(forward, [X], {}, 3, fill=False)
    joined.fill(pieces[0], X[:3])
    with pytest.raises(ValueError, match=r"have the shapes \[\(1,\)\], those of another \[\(2,\)\]"):
        joined.fill(pieces[1], X[3:5, :1])
