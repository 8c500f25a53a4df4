"""``strategy="auto"`` where the plan was wrong: the next candidate takes over, and its run is to the bit the one that
it would have been; and where candidates are measured, nothing is left of that.
"""

import json
import os
import random
import time
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from ranks import Ranks
from stratagem import Callback, Fit
from stratagem.framework.configuration.options import make_strategy
from stratagem.framework.planning.choosing import OUT_OF_MEMORY
from stratagem.strategies import Auto
from test_auto import WIDTH, Stack
from torch import Tensor
from torch.utils.data import DataLoader

LEFT = {"attempts": 0, "at": 1}  # attempts that are still to fail, and the forward of each at which they do


class Hungry(Stack):
    """On the last rank, is out of memory in some attempts."""

    blocks_made = 4

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0  # a module is given back as it was

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        is_last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
        if is_last and self.calls == LEFT["at"] and LEFT["attempts"] and not is_played(x):
            LEFT["attempts"] -= 1
            raise torch.OutOfMemoryError("tried to allocate 7 GiB")
        return super().forward(x)


def is_played(x: Tensor) -> bool:
    """Whether a batch has no memory."""
    return type(x).__name__ == "FakeTensor"


class Slow(Hungry):
    """Takes its time, unless its parameters are sharded."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_played(x) and not type(self).__name__.startswith("FSDP"):
            time.sleep(0.05)
        return super().forward(x)


class Counting(Callback):
    """A state that a failed attempt would leave behind."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


MODULES = {"hungry": Hungry, "slow": Slow}


def make(directory: str, module: str = "hungry", loader: bool = False, **arguments: Any) -> Fit:
    torch.manual_seed(3)
    random.seed(4)
    numpy.random.seed(5)
    rows: Any = [torch.randn(WIDTH) for _ in range(32)]
    if loader:
        rows = DataLoader(rows, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(9))
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4, "shuffle": not loader, "max_steps": 4, "progress": False,
        "output_dir": directory, "logging_steps": 1, "save_strategy": "no", "callbacks": [Counting()],
    }  # fmt: skip
    return Fit(MODULES[module](), rows, **{**defaults, **arguments})


def train(
    directory: str, fails: int = 0, at: int = 1, name: str | None = None, options: Any = None, measure: int = 0,
    resume: Any = None, **arguments: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train, by a strategy that is named or chosen, and return the bits of all that a run changes."""
    LEFT.update(attempts=fails, at=at)
    strategy = make_strategy(name, options) if name is not None else Auto(measure=measure) if measure else "auto"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = make(directory, strategy=strategy, **arguments)
        fit.train(resume_from_checkpoint=resume)
    strategy = fit.strategy
    state = strategy.optimizer_state()
    tensors = {name: p.detach() for name, p in strategy.named_parameters().items()}
    tensors |= {
        f"{n}/{key}": value for n, held in state.items() for key, value in held.items() if torch.is_tensor(value)
    }
    chosen = None if fit.choice is None else fit.choice.to_dict()
    return {
        "run": {
            "bits": {name: strategy.whole(each).double().sum().item().hex() for name, each in tensors.items()},
            "losses": [log["loss"] for log in fit.state.log_history if "loss" in log],
            "random": [torch.rand(()).item(), random.random(), numpy.random.rand()],
            "steps": fit.own_callbacks[0].steps,
            "state": fit.state.global_step,
            "strategy": repr(strategy),
            "gradient_checkpointing": fit.args.gradient_checkpointing,
        },
        "choice": chosen,
        "said": [str(each.message) for each in caught if "auto" in str(each.message)],
        "has_copy": fit.source.can_begin_again,
        "titles": [] if fit.choice is None else [each.figures.candidate.title for each in fit.choice.verdicts],
    }


KEPT = {"reshard_after_forward": False}
# On one rank the candidates are single, and the same with checkpointing; both fit. On two ranks ddp and kept shards
# send as much, and ddp comes first. Then ddp with checkpointing can't need less than kept shards: it holds more.
FALLS = [
    pytest.param(1, 1, 1, "single", {}, True, id="1 rank"),
    pytest.param(1, 1, 2, "single", {}, True, id="1 rank, second update"),
    pytest.param(2, 2, 1, "fsdp2", KEPT, True, id="2 ranks, twice"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "fails", "at", "name", "options", "again"), FALLS)
def test_the_next_candidate_takes_over_bitwise(
    ranks: dict[int, Ranks], tmp_path: Path, world: int, fails: int, at: int, name: str, options: Any, again: bool
) -> None:
    found = ranks[world].run(train, directory=str(tmp_path / "auto"), fails=fails, at=at, loader=world == 1)
    asked = ranks[world].run(
        train, directory=str(tmp_path / "named"), name=name, options=options, gradient_checkpointing=again,
        loader=world == 1,
    )  # fmt: skip
    assert [each["run"] for each in found] == [each["run"] for each in asked]
    assert found[0]["run"]["steps"] == found[0]["run"]["state"] == 4
    assert all(each["choice"] == found[0]["choice"] for each in found)
    assert not any(each["has_copy"] for each in found)  # the copy went with the first updates
    said = found[0]["said"]
    assert len(said) == fails and not any(each["said"] for each in found[1:])
    first = "single" if world == 1 else "ddp"
    assert said[0].startswith(f"strategy='auto': {first} {OUT_OF_MEMORY} ")
    assert f"Rank {world - 1} in forward" in said[0] and "tried to allocate 7 GiB" in said[0]
    assert f"begins again with {found[0]['titles'][0]}" in said[-1]
    failed = [each for each in found[0]["choice"]["candidates"] if each["sentence"] == OUT_OF_MEMORY]
    assert len(failed) == fails and all(each["number"] == each["figures"]["need"] for each in failed)
    assert "reshard_after_forward: false" in (tmp_path / "auto" / "config.yaml").read_text() or world == 1
    record = json.loads((tmp_path / "auto" / "run.json").read_text())
    assert record["choice"] == found[0]["choice"]


def gives_up(directory: str, fails: int, at: int = 1) -> tuple[str, str, int]:
    """What a run says in which nothing has enough memory."""
    try:
        train(directory, fails=fails, at=at)
    except Exception as error:
        return type(error).__name__, str(error), LEFT["attempts"]
    raise AssertionError("it found enough memory")


@pytest.mark.slow
def test_where_none_is_left_the_error_lists_what_was_tried(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    for world, tried in (
        (1, ["single (", "single + gradient checkpointing ("]),
        (2, ["ddp (", "fsdp2(reshard_after_forward=False) (", "fsdp2("]),
    ):
        found = ranks[world].run(gives_up, directory=str(tmp_path / str(world)), fails=20)
        assert {kind for kind, _, _ in found} == {"OutOfMemoryError"}
        assert len({said for _, said, _ in found}) == 1
        assert "no candidate is left" in found[0][1]
        places = [found[0][1].index(each) for each in tried]
        assert places == sorted(places)


@pytest.mark.slow
def test_after_the_first_updates_out_of_memory_ends_the_run(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    found = ranks[1].run(gives_up, directory=str(tmp_path), fails=1, at=3)
    assert found == [("OutOfMemoryError", "tried to allocate 7 GiB", 0)]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "fails"), [(1, 0), (2, 1)])
def test_what_was_measured_leaves_nothing(ranks: dict[int, Ranks], tmp_path: Path, world: int, fails: int) -> None:
    options = {"module": "slow", "fails": fails}
    found = ranks[world].run(train, directory=str(tmp_path / "auto"), measure=2, **options)
    chosen = found[0]["choice"]["chosen"]
    named = {"name": chosen["strategy"], "options": chosen["options"]}
    asked = ranks[world].run(
        train, directory=str(tmp_path / "named"), module="slow", **named,
        gradient_checkpointing=chosen["gradient_checkpointing"],
    )  # fmt: skip
    assert [each["run"] for each in found] == [each["run"] for each in asked]
    assert all(each["choice"] == found[0]["choice"] for each in found)
    timed = [each for each in found[0]["choice"]["candidates"] if each["unit"] == "s"]
    assert [each["number"] for each in timed] == sorted(each["number"] for each in timed)
    assert timed[0]["sentence"] == f"is the fastest of {len(timed)} that were measured, at"
    assert len(timed) == 2
    failed = [each for each in found[0]["choice"]["candidates"] if each["sentence"] == OUT_OF_MEMORY]
    assert len(failed) == fails
    assert sum(name.startswith("checkpoint") for name in os.listdir(tmp_path / "auto")) == 0


@pytest.mark.slow
def test_a_resumed_run_takes_the_choice_of_its_checkpoint(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    saves = {"directory": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    first = ranks[2].run(train, fails=1, **saves)
    state = json.loads((tmp_path / "checkpoint-2" / "state.json").read_text())
    assert state["choice"] == first[0]["choice"] and state["strategy"] == "fsdp2"
    assert " ".join(state["choice"]["chosen"]["words"]) == "--strategy fsdp2 --strategy.reshard_after_forward false"
    # The machine and the arguments are the same, so that ddp, which ran out of memory, isn't tried again.
    again = ranks[2].run(train, resume=str(tmp_path / "checkpoint-2"), **saves)
    assert not any(each["said"] for each in again)
    for before, now in zip(first, again, strict=True):
        assert now["choice"] == before["choice"]
        assert now["run"] == before["run"]


@pytest.mark.slow
def test_a_resumed_run_says_what_has_changed(
    ranks: dict[int, Ranks], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks[1].run(train, directory=str(tmp_path), save_strategy="steps", save_steps=2, fails=1)
    LEFT.update(attempts=0)
    fit = make(
        str(tmp_path), strategy="auto", per_device_train_batch_size=8, gradient_accumulation_steps=1, max_steps=6
    )
    fit.train(resume_from_checkpoint=True)
    said = capfd.readouterr().err
    assert "strategy='auto' chose strategy=\"single\", gradient_checkpointing=True there" in said
    assert 'and strategy="single" here, since single + gradient checkpointing needs' in said
