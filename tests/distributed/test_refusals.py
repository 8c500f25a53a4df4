"""What can't work is refused on every rank, with the reason and what works instead; and ranks stop together."""

import os
from typing import Any

import pytest
from ranks import Ranks
from stratagem import Callback, Fit
from torch import nn
from training import WIDTH, Tagger, make_fit, make_strategy, token_rows

pytestmark = pytest.mark.slow


class Overlapping(Tagger):
    """Two patterns match one layer."""

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {"blocks.*.up": "colwise", "blocks.0.*": "rowwise"}


class Unmatched(Tagger):
    """A pattern matches nothing."""

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {"layers.*.up": "colwise"}


class Misspelt(Tagger):
    """A style that doesn't exist."""

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {"blocks.*.up": "columnwise"}


class Unplanned(Tagger):
    """No plan at all."""

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {}


class Indivisible(Tagger):
    """25 features, which neither 2 nor 4 ranks divide."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.up, block.down = nn.Linear(WIDTH, 25), nn.Linear(25, WIDTH)


class HalfTied(Tagger):
    """Cuts the embedding, and not the head that has its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, WIDTH)
        self.head = nn.Linear(WIDTH, 12)
        self.head.weight = self.embed.weight

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {"embed": "embedding"}


def refusal(module: type[Tagger] = Tagger, by_rank: dict[int, dict[str, Any]] | None = None, **arguments: Any) -> str:
    """The error that this rank raises up to its first update.

    Args:
        module: to be trained.
        by_rank: arguments that only some ranks are given.
        **arguments: of make_fit.
    """
    own = (by_rank or {}).get(int(os.environ["RANK"]), {})
    samples = own.pop("samples", 20)
    try:
        make_fit(module(), token_rows(samples), **{"max_steps": 1, **arguments, **own}).train()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def check(ranks: dict[int, Ranks], world: int, *says: str, **arguments: Any) -> None:
    """Every rank refuses, in the same words."""
    found = ranks[world].run(refusal, **arguments)
    assert found == [found[0]] * world
    assert [part for part in says if part not in found[0]] == [], found[0]


@pytest.mark.parametrize(
    ("world", "strategy", "options", "says"),
    [
        (2, "fsdp2", {"tensor_parallel": 3}, ("tensor_parallel=3", "2 ranks", "1, 2", "start 3, 6")),
        (4, "fsdp2", {"tensor_parallel": 3}, ("tensor_parallel=3", "4 ranks", "1, 2, 4", "start 3, 6")),
        (
            4,
            "fsdp2",
            {"replicas": 2, "tensor_parallel": 4},
            ("replicas=2 x tensor_parallel=4", "1, 2, 4", "start 8, 16"),
        ),
        (4, "fsdp1", {"replicas": 3}, ("replicas=3", "1, 2, 4")),
        (2, "fsdp2", {"replicas": 0}, ("replicas=0", "at least 1")),
        (1, "tp", {}, ("there is one rank", "devices=2", "torchrun", "strategy='single'")),
        (2, "fsdp2", {"loss_parallel": True}, ("loss_parallel", "tensor_parallel=2")),
        (2, "single", {}, ("strategy='single'", "2 ranks were started", "strategy='ddp'")),
        (2, "dp", {}, ("strategy='dp'", "2 ranks were started", "strategy='ddp'")),
    ],
    ids=str,
)
def test_worlds_that_can_not_be(
    ranks: dict[int, Ranks], world: int, strategy: str, options: dict[str, Any], says: tuple[str, ...]
) -> None:
    check(ranks, world, "ValueError", *says, strategy=strategy, options=options)


@pytest.mark.parametrize(("world", "options"), [(2, {"tensor_parallel": 2}), (4, {"tensor_parallel": 2})], ids=str)
@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Overlapping, ("'blocks.*.up'", "'blocks.0.*'", "'blocks.0.up'", "narrower")),
        (Unmatched, ("'layers.*.up' matches no layer of Unmatched",)),
        (Misspelt, ("unknown style 'columnwise'", "Did you mean 'colwise'?")),
        (Unplanned, ("tensor_parallel_plan", "Unplanned", 'strategy="fsdp2"')),
        (Indivisible, ("'blocks.0.up'", "(25, 6)", "2 ranks don't divide")),
        (HalfTied, ("share a weight", "Cut both")),
    ],
)
def test_plans_that_can_not_be(
    ranks: dict[int, Ranks], world: int, options: dict[str, Any], module: type[Tagger], says: tuple[str, ...]
) -> None:
    check(ranks, world, "ValueError", *says, module=module, strategy="fsdp2", options=options)


class Wider(Tagger):
    """Another model than the other ranks'."""

    def __init__(self) -> None:
        super().__init__(blocks=3)


def refusal_of_models(**arguments: Any) -> str:
    return refusal(Wider if os.environ["RANK"] == "1" else Tagger, **arguments)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("by_rank", "says"),
    [
        ({1: {"learning_rate": 0.5}}, "rank 1: argument learning_rate is 0.5, on rank 0 0.01"),
        ({1: {"per_device_train_batch_size": 3}}, "rank 1: argument per_device_train_batch_size is 3, on rank 0 8"),
        ({1: {"precision": "bf16-mixed"}}, "rank 1: Fit precision is 'BF16Mixed()', on rank 0 'Full()'"),
        ({1: {"samples": 19}}, "rank 1: data train_data is 19, on rank 0 20"),
        ({0: {"seed": 7}}, "rank 1: argument seed is 42, on rank 0 7"),
    ],
    ids=str,
)
def test_ranks_with_other_arguments(
    ranks: dict[int, Ranks], world: int, by_rank: dict[int, dict[str, Any]], says: str
) -> None:
    check(ranks, world, "ValueError", says, strategy="ddp", by_rank=by_rank)


def test_ranks_with_other_models(ranks: dict[int, Ranks]) -> None:
    found = ranks[2].run(refusal_of_models, strategy="fsdp2")
    assert found == [found[0]] * 2
    assert "rank 1: parameter blocks.2.down.bias is '(6,) torch.float32', on rank 0 'absent'" in found[0]


def devices_refusal(devices: Any, strategy: str = "ddp") -> str:
    try:
        Fit(Tagger(), token_rows(4), strategy=make_strategy(strategy), devices=devices, progress=False)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    ("devices", "says"), [(4, "devices=4, but 2 ranks were started"), (0, "Received: 0"), ("two", "Received: 'two'")]
)
def test_devices_that_are_not_there(ranks: dict[int, Ranks], devices: Any, says: str) -> None:
    found = ranks[2].run(devices_refusal, devices=devices)
    assert found == [found[0]] * 2
    assert says in found[0]


def test_several_devices_for_one_process() -> None:
    assert "strategy='single' runs in one process, so devices=2" in devices_refusal(2, "single")


# Flags.


class RaiseOn(Callback):
    """Asks for something in one event of one update on one rank."""

    def __init__(self, rank: int, event: str, flag: str, step: int) -> None:
        self.rank, self.event, self.flag, self.step = rank, event, flag, step
        self.saved: list[int] = []

    def ask(self, event: str, state: Any, control: Any) -> None:
        if event == self.event and state.global_step == self.step and int(os.environ["RANK"]) == self.rank:
            setattr(control, self.flag, True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ask("on_step_begin", state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ask("on_step_end", state, control)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ask("on_log", state, control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved.append(state.global_step)


def train_with_flag(directory: str, event: str, flag: str, step: int, **arguments: Any) -> tuple[int, float, list[int]]:
    """Updates done, epochs done, and the updates at which a checkpoint was saved."""
    callback = RaiseOn(1, event, flag, step)
    fit = make_fit(Tagger(), token_rows(80), callbacks=[callback], output_dir=directory, **arguments)
    fit.train()
    return fit.state.global_step, fit.state.epoch, callback.saved


@pytest.mark.parametrize(("world", "strategy"), [(2, "ddp"), (4, "fsdp2"), (2, "tp")])
def test_flag_of_one_rank_is_obeyed_by_all(ranks: dict[int, Ranks], tmp_path: Any, world: int, strategy: str) -> None:
    arguments = {"strategy": strategy, "directory": str(tmp_path), "per_device_train_batch_size": 4, "logging_steps": 4}
    # What on_step_end asks for goes out with the next update's item count.
    stopped = ranks[world].run(train_with_flag, event="on_step_end", flag="should_training_stop", step=3, **arguments)
    assert [steps for steps, _, _ in stopped] == [4] * world
    saved = ranks[world].run(train_with_flag, event="on_step_end", flag="should_save", step=5, max_steps=8, **arguments)
    assert [(steps, at) for steps, _, at in saved] == [(8, [6])] * world
    # And so does what an earlier event of the update, the fifth, asks for.
    early = ranks[world].run(
        train_with_flag, event="on_step_begin", flag="should_save", step=4, max_steps=8, **arguments
    )
    assert [(steps, at) for steps, _, at in early] == [(8, [6])] * world
    # At a log the ranks talk anyway.
    at_log = ranks[world].run(train_with_flag, event="on_log", flag="should_training_stop", step=4, **arguments)
    assert [steps for steps, _, _ in at_log] == [4] * world


def test_epoch_stop_of_one_rank(ranks: dict[int, Ranks], tmp_path: Any) -> None:
    """80 samples are 5 updates of 16. Each epoch that is broken off after its second leaves the others whole."""
    found = ranks[2].run(
        train_with_flag,
        event="on_step_end",
        flag="should_epoch_stop",
        step=1,
        directory=str(tmp_path),
        strategy="ddp",
        per_device_train_batch_size=8,
        max_steps=-1,
        num_train_epochs=2.0,
    )
    assert [steps for steps, _, _ in found] == [2 + 5] * 2
