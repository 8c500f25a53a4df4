"""Initial values that a rank draws for its part alone: the same as those of the whole."""

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stratagem.strategies.held_parts import HeldPart, held_parts
from stratagem.strategies.recording import NotByParts, StandIn, loops_recorded
from stratagem.strategies.tiles import ENTRIES, do, overlapping, tile_shape
from torch import Tensor, nn

CPU = torch.device("cpu")


def padded(weight: Tensor) -> None:
    nn.init.normal_(weight)
    weight[min(3, len(weight) - 1)].fill_(0)


def blocks(weight: Tensor) -> None:
    half = len(weight) // 2
    weight[:half].uniform_(-1, 0)
    weight[half:].normal_(5.0, 0.1)
    weight[:, ::1][-1:] = 7.0


INITS: dict[str, Callable[[Tensor], Any]] = {
    "normal": lambda w: nn.init.normal_(w, 1.0, 3.0),
    "uniform": nn.init.uniform_,
    "truncated": lambda w: nn.init.trunc_normal_(w, std=0.7, a=-1.0, b=1.0),
    "far tail": lambda w: nn.init.trunc_normal_(w, std=0.2, a=0.4, b=1.0),
    "kaiming": nn.init.kaiming_uniform_,
    "xavier": nn.init.xavier_normal_,
    "exponential, then its logarithm": lambda w: w.exponential_(2.0).log_().mul_(-0.5).clamp_(min=-1),
    "bernoulli": lambda w: w.bernoulli_(0.3),
    "padded": padded,
    "in blocks": blocks,
    "by data": lambda w: w.data.normal_().add_(torch.tensor(2.0)),
    "zeros and ones": lambda w: nn.init.zeros_(w).add_(1),
}


def recorded(init: Callable[[Tensor], Any], shape: tuple[int, ...]) -> list[Any]:
    with torch.no_grad(), loops_recorded():
        stand_in = StandIn(torch.empty(shape, device="meta"), CPU)
        init(nn.Parameter(stand_in))
    return stand_in.operations


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(INITS)), st.integers(2, 300), st.integers(2, 1200), st.data())
def test_a_part_has_the_values_of_the_whole(init: str, rows: int, columns: int, data: st.DataObject) -> None:
    like = torch.empty(rows, columns, device="meta")
    operations = recorded(INITS[init], (rows, columns))
    whole = do(operations, held_parts(like), like, "name", CPU)
    assert whole.isfinite().all()
    boxes = []
    for size in (rows, columns):
        first, last = sorted((data.draw(st.integers(0, size)), data.draw(st.integers(0, size))))
        boxes.append(slice(first, last))
    part = HeldPart(tuple(boxes), tuple(slice(0, box.stop - box.start) for box in boxes))
    assert torch.equal(do(operations, [part], like, "name", CPU), whole[part.whole])


def test_values_are_those_asked_for() -> None:
    shape = 500, 1000
    like = torch.empty(shape, device="meta")
    drawn = {name: do(recorded(init, shape), held_parts(like), like, name, CPU) for name, init in INITS.items()}
    assert drawn["normal"].mean() == pytest.approx(1, abs=0.02)
    assert drawn["normal"].std() == pytest.approx(3, rel=0.01)
    assert drawn["uniform"].min() >= 0
    assert drawn["uniform"].mean() == pytest.approx(0.5, abs=0.003)
    assert drawn["truncated"].abs().max() <= 1
    assert drawn["far tail"].min() >= 0.4
    assert drawn["kaiming"].abs().max() == pytest.approx((6 / 1000) ** 0.5, rel=0.001)
    assert drawn["bernoulli"].mean() == pytest.approx(0.3, abs=0.003)
    assert drawn["padded"][3].eq(0).all()
    assert drawn["padded"][4].ne(0).any()
    assert drawn["in blocks"][:250].max() <= 0
    assert drawn["in blocks"][250:-1].mean() == pytest.approx(5, abs=0.01)
    assert drawn["in blocks"][-1].eq(7).all()
    assert drawn["by data"].mean() == pytest.approx(2, abs=0.01)
    assert drawn["zeros and ones"].eq(1).all()
    # No two tiles, names, draws or seeds are alike.
    tiles = drawn["normal"].flatten()[: 2**18].view(-1, 64)
    assert len(torch.unique(tiles, dim=0)) == len(tiles)
    again = do(recorded(INITS["normal"], shape), held_parts(like), like, "another", CPU)
    assert not torch.isclose(again, drawn["normal"]).view(-1)[:64].any()
    torch.manual_seed(1)
    other = do(recorded(INITS["normal"], shape), held_parts(like), like, "normal", CPU)
    assert not torch.isclose(other, drawn["normal"]).view(-1)[:64].any()


def test_threads_draw_the_same() -> None:
    like = torch.empty(600, 1000, device="meta")
    operations = recorded(INITS["truncated"], (600, 1000))
    alone = do(operations, held_parts(like), like, "name", CPU)
    torch.set_num_threads(3)
    try:
        assert torch.equal(do(operations, held_parts(like), like, "name", CPU), alone)
    finally:
        torch.set_num_threads(1)


@given(st.lists(st.integers(0, 3000), max_size=4))
def test_tiles_are_small_and_cover_all(shape: list[int]) -> None:
    sizes = tile_shape(shape)
    assert prod(sizes) <= max(ENTRIES, 512)
    everything = tuple(slice(0, size) for size in shape)
    expected = prod(-(-n // s) for n, s in zip(shape, sizes, strict=True))
    if expected < 10_000:
        assert len(list(overlapping(everything, sizes))) == expected


@pytest.mark.parametrize(
    "init",
    [
        nn.init.orthogonal_,
        nn.init.eye_,
        lambda w: nn.init.normal_(w, generator=torch.Generator()),
        lambda w: w.copy_(torch.zeros(4, 4)),
        lambda w: w.mul_(w),
        lambda w: w.normal_().div_(w.norm()),
        lambda w: w.fill_(w[0, 0].item()),
        lambda w: w[::2].fill_(0),
        lambda w: w.t().normal_(),
        lambda w: [w[i % 4].fill_(i) for i in range(100)],
    ],
)
def test_what_needs_the_whole_is_told(init: Callable[[Tensor], Any]) -> None:
    with pytest.raises(NotByParts):
        recorded(init, (4, 4))
