"""What several ranks hold alike is compared after the first update: a difference is named, with the ranks."""

from typing import Any

import pytest
import torch
from ranks import Ranks
from stratagem import Callback
from stratagem.framework.switches.ranks_agree import RanksAgree
from stratagem.strategies.duplicates import ENTRIES, fingerprints
from torch import nn
from torch.distributed.tensor import DTensor
from training import Tagger, make_fit, share_of_16, token_rows

# Ranks, strategy, options, ranks that change something, parameter, how the error names it.
PLANTED: dict[str, tuple[int, str, dict[str, Any], list[int], str, str]] = {
    "ddp": (2, "ddp", {}, [1], "blocks.1.up.weight", "blocks.1.up.weight: rank 1 differs from rank 0 by up to 1.0e+00"),
    "ddp-4": (4, "ddp", {}, [1, 3], "head.bias", "head.bias: ranks 1, 3 differ from rank 0"),
    "tp": (2, "tp", {}, [0], "blocks.0.norm.bias", "blocks.0.norm.bias: rank 1 differs from rank 0"),
    "frozen": (2, "ddp", {}, [1], "mix.weight", "mix.weight: rank 1 differs from rank 0"),
    "fsdp2xtp": (
        4,
        "fsdp2",
        {"tensor_parallel": 2},
        [3],
        "blocks.0.norm.bias",
        "shard 1 of blocks.0.norm.bias: rank 3 differs from rank 2",
    ),
    "fsdp2-hybrid": (4, "fsdp2", {"replicas": 2}, [2], "mix.weight", "0 of mix.weight: rank 2 differs from rank 0"),
    "fsdp1-hybrid": (4, "fsdp1", {"replicas": 2}, [3], "mix.weight", "mix.weight: rank 3 differs from rank 1"),
}


class Plant(Callback):
    """Adds 1 to the first number that this rank has of a parameter or buffer, at the end of an update."""

    def __init__(self, ranks: list[int], name: str, update: int = 1) -> None:
        self.ranks, self.name, self.update = ranks, name, update

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        fit = context["fit"]
        if state.global_step == self.update and fit.strategy.rank in self.ranks:
            tensors = {**fit.strategy.named_parameters(), **dict(fit.module.named_buffers())}
            tensor = tensors[self.name]
            with torch.no_grad():
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)[0] += 1


def train(
    world: int, strategy: str, options: dict[str, Any], planted: list[Any], module: type = Tagger, **arguments: Any
) -> tuple[str, int]:
    """The error, and how many listeners there were for it afterwards."""
    torch.manual_seed(0)
    fit = make_fit(
        module(),
        token_rows(90),
        strategy=strategy,
        options=options,
        callbacks=[Plant(*planted)] if planted else [],
        per_device_train_batch_size=share_of_16(strategy, world, options),
        **{"max_steps": 4, **arguments},
    )
    try:
        fit.train()
    except RuntimeError as error:
        return str(error), fit.state.global_step
    assert not [
        listener for listener in fit.callbacks.listeners["on_step_end"] if isinstance(listener.__self__, RanksAgree)
    ]
    return "nothing", fit.state.global_step


def said(ranks: dict[int, Ranks], world: int, **arguments: Any) -> tuple[str, int]:
    found = ranks[world].run(train, world=world, **arguments)
    assert found == [found[0]] * world
    return found[0]


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name in ("ddp", "tp") else pytest.mark.slow) for name in PLANTED]
)
def test_a_parameter_that_one_rank_changed_is_named(ranks: dict[int, Ranks], case: str) -> None:
    world, strategy, options, changed, name, says = PLANTED[case]
    text, update = said(ranks, world, strategy=strategy, options=options, planted=[changed, name])
    assert update == 1
    assert text.startswith("After update 1, 1 of ")
    assert says in text
    assert "a callback" in text


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_buffer_that_one_rank_changed_is_named(ranks: dict[int, Ranks], strategy: str) -> None:
    text, _ = said(ranks, 2, strategy=strategy, options={}, planted=[[1], "order"])
    assert "\n  order: rank 1 differs from rank 0 by up to 1.0e+00" in text


def test_ranks_that_agree_are_asked_once(ranks: dict[int, Ranks]) -> None:
    assert said(ranks, 2, strategy="tp", options={}, planted=[]) == ("nothing", 4)


def test_a_later_difference_is_looked_for_where_that_was_asked_for(ranks: dict[int, Ranks]) -> None:
    planted = {"strategy": "ddp", "options": {}, "planted": [[1], "head.bias", 2]}
    assert said(ranks, 2, **planted) == ("nothing", 4)
    text, update = said(ranks, 2, **planted, debug="ranks_agree")
    assert update == 2
    assert text.startswith("After update 2, 1 of ")


def test_an_update_that_moves_nothing_is_not_taken_for_the_first(ranks: dict[int, Ranks]) -> None:
    # Under tp a parameter whose gradient lacks the other rank's part shows when weights move, not before.
    assert said(ranks, 2, strategy="ddp", options={}, planted=[[1], "head.bias", 2], warmup_steps=3)[1] == 2


class Rounded(Callback):
    """One rank's bias is one unit in the last place off."""

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if state.global_step == 1 and context["fit"].strategy.rank == 1:
            with torch.no_grad():
                bias = context["fit"].module.head.bias
                bias.copy_(torch.nextafter(bias, torch.full_like(bias, 9.0)))


def warned() -> list[str]:
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_fit(Tagger(), token_rows(20), strategy="ddp", callbacks=[Rounded()], max_steps=2).train()
    return [text for warning in caught if "drift apart" in (text := str(warning.message))]


def test_a_difference_by_rounding_is_warned_about(ranks: dict[int, Ranks]) -> None:
    for messages in ranks[2].run(warned):
        [text] = messages
        assert "head.bias: rank 1 differs from rank 0" in text


# Without ranks.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_fingerprints_tell_every_entry_and_the_order(dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 2, (6,)).to(dtype)
    tensor[:2] = torch.tensor([0, 1])
    others = []
    for i in range(6):
        other = tensor.clone()
        other[i] = 1 - other[i].int() if dtype is torch.bool else other[i] + 1
        others.append(other)
    swapped = tensor.clone()
    swapped[:2] = tensor[:2].flip(0)
    before = tensor.clone()
    found = fingerprints([tensor, before, swapped, *others])
    assert torch.equal(tensor, before)  # they only look
    assert found[0] == found[1]
    assert len(set(found)) == len(found) - 1


def test_fingerprints_of_neighbours_by_rounding_differ() -> None:
    # One up and one down by a unit in the last place: a plain sum of the bits would be the same.
    tensor = torch.ones(3)
    other = torch.tensor([1.0, 1.0 + 2**-23, 1.0 - 2**-24])
    assert len(set(fingerprints([tensor, other, other.flip(0)]))) == 3


def test_long_and_empty_tensors_have_fingerprints() -> None:
    long = torch.zeros(ENTRIES + 3)
    last = long.clone()
    last[-1] = 1
    found = fingerprints([long, last, torch.zeros(0), nn.Parameter(torch.zeros(()))])
    assert found[0] != found[1]
