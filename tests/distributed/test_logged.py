"""What modules log on several ranks: the means of one device, whichever ranks have a name, and in what a log sends."""

import os
from typing import Any

import pytest
import torch
from ranks import Ranks
from stratagem import TrainModule
from test_collectives import Message, listen
from test_context_parallel import Writer, text_rows
from test_strategies import SequenceParallel
from torch import Tensor
from training import PLACEMENTS, Tagger, make_fit, share_of_16, token_rows

RANK = int(os.environ.get("RANK", "0"))


class Logging(Tagger):
    """Logs values of forward and loss over labels, over other items, and a counter."""

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        self.log("size", logits.abs().mean(), items=len(tokens))
        return logits

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        labels = batch["labels"]
        right = (outputs.argmax(-1) == labels).float()
        self.log("accuracy", right[labels != -100].mean())  # NaN where no label counts
        few = labels > 8
        self.log("accuracy_of_few", right[few].mean(), items=few.sum())
        self.log("update", self.update_number)
        self.log("passes", self.epoch)
        return super().loss(outputs, batch)


NAMES = ("size", "accuracy", "accuracy_of_few", "update", "passes")


def logs(module: type[Tagger] = Logging, **arguments: Any) -> list[dict[str, Any]]:
    """The training logs, and an evaluation's metrics."""
    torch.manual_seed(RANK)
    fit = make_fit(module(), token_rows(43), token_rows(21), max_steps=8, logging_steps=2, **arguments)
    fit.train()
    found = [log for log in fit.state.log_history if "loss" in log]
    return [*found, {name.removeprefix("eval_"): value for name, value in fit.evaluate().items()}]


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    return logs(per_device_train_batch_size=16)


EVERYWHERE = [
    *((*placement, {}) for placement in PLACEMENTS),
    (2, "ddp", {}, {"gradient_accumulation_steps": 2}),
    (2, "fsdp2", {}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
    (2, "deepspeed_stage_2", {}, {}),
    (2, "deepspeed_stage_3", {}, {}),
]


@pytest.mark.parametrize(("world", "strategy", "options", "arguments"), EVERYWHERE, ids=str)
def test_the_means_are_those_of_one_device(
    ranks: dict[int, Ranks], alone: list[dict[str, Any]], world: int, strategy: str, options: dict[str, Any],
    arguments: dict[str, Any],
) -> None:  # fmt: skip
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    size = share_of_16(strategy, world, options) // arguments.get("gradient_accumulation_steps", 1)
    found = ranks[world].run(
        logs, strategy=strategy, options=options, per_device_train_batch_size=size, per_device_eval_batch_size=4,
        **arguments,
    )  # fmt: skip
    for of_rank in found:
        assert of_rank == found[0]
        # The third update of an epoch of 43 has 11 samples: ranks with fewer than others.
        for log, expected in zip(of_rank, alone, strict=True):
            assert {name: log[name] for name in NAMES} == pytest.approx(
                {name: expected[name] for name in NAMES}, rel=2e-4
            )


class OfText(Writer):
    """Logs what each rank computes of its own part of a sequence."""

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        labels, best = batch["labels"], outputs.argmax(-1)
        self.log("accuracy", (best == labels)[labels != -100].float().mean())
        self.log("size", outputs.detach().abs().mean(), items=best.numel())
        return super().loss(outputs, batch)


class CutByClass(SequenceParallel):
    """Logs values of logits that are cut by class over the ranks."""

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        self.log("size", outputs.square().mean())
        self.log("total", outputs.sum(), items=1)
        return super().loss(outputs, batch)


def logs_of(module: type[TrainModule], text: bool, **arguments: Any) -> list[dict[str, Any]]:
    """The training logs, and an evaluation's metrics."""
    torch.manual_seed(RANK)
    rows = text_rows(20) if text else token_rows(20)
    fit = make_fit(module(), rows, rows[:7], max_steps=4, logging_steps=2, **arguments)
    fit.train()
    found = [log for log in fit.state.log_history if "loss" in log]
    return [*found, {name.removeprefix("eval_"): value for name, value in fit.evaluate().items()}]


@pytest.mark.parametrize(
    ("module", "names", "options"),
    [
        (OfText, ("accuracy", "size"), {"context_parallel": 2}),
        (CutByClass, ("size", "total"), {"tensor_parallel": 2, "loss_parallel": True}),
    ],
    ids=["sequences", "classes"],
)
def test_what_a_rank_has_a_part_of_is_logged_whole(
    ranks: dict[int, Ranks], module: type[TrainModule], names: tuple[str, ...], options: dict[str, int]
) -> None:
    arguments = {"module": module, "text": module is OfText, "per_device_train_batch_size": 8}
    alone = logs_of(**arguments)
    for of_rank in ranks[2].run(logs_of, strategy="fsdp2", options=options, **arguments):
        for log, expected in zip(of_rank, alone, strict=True):
            assert [log[name] for name in names] == pytest.approx([expected[name] for name in names], rel=2e-4)


class OnSomeRanks(Tagger):
    """Logs names that this rank alone has, in some updates alone."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        self.calls += 1
        if RANK == 1:
            self.log("second_rank", self.calls)
        if RANK == 0 and self.calls >= 3:
            self.log("later ä", torch.tensor(10.0 * self.calls))
        if (RANK + self.calls) % 2:
            self.log("in_turns", 100 * RANK + self.calls, items=1)
        return super().loss(outputs, batch)


def some_ranks(**arguments: Any) -> list[dict[str, float]]:
    """What the training logs have of those names, and then an evaluation."""
    fit = make_fit(
        OnSomeRanks(), token_rows(64), token_rows(8), max_steps=6, logging_steps=2, per_device_train_batch_size=4,
        per_device_eval_batch_size=4, **arguments,
    )  # fmt: skip
    fit.train()
    logs = [log for log in fit.state.log_history if "loss" in log]
    logs.append({name.removeprefix("eval_"): value for name, value in fit.evaluate().items()})
    return [{name: log[name] for name in ("second_rank", "later ä", "in_turns") if name in log} for log in logs]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_names_of_some_ranks_are_means_over_those(ranks: dict[int, Ranks], strategy: str) -> None:
    # Odd calls are in turns on rank 0, even ones on rank 1.
    expected = [
        {"second_rank": 1.5, "in_turns": (1 + 102) / 2},
        {"second_rank": 3.5, "later ä": 35.0, "in_turns": (3 + 104) / 2},
        {"second_rank": 5.5, "later ä": 55.0, "in_turns": (5 + 106) / 2},
        {"second_rank": 7.0, "later ä": 70.0, "in_turns": 7.0},
    ]
    assert ranks[2].run(some_ranks, strategy=strategy) == [expected] * 2


def test_names_of_some_tensor_parallel_ranks_hang_nobody(ranks: dict[int, Ranks]) -> None:
    # Both ranks compute the same samples, so that each has a log of its own; that of rank 0 is written.
    first, second = ranks[2].run(some_ranks, strategy="tp")
    assert first[2] == {"later ä": 55.0, "in_turns": 5.0}
    assert second[2] == {"second_rank": 5.5, "in_turns": 106.0}


class Mean(Tagger):
    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        self.log("mean", outputs.mean())
        self.log("size", outputs.abs().mean(), items=len(outputs))
        return super().loss(outputs, batch)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_what_is_logged_rides_in_what_a_log_sends(ranks: dict[int, Ranks], strategy: str) -> None:
    quiet = ranks[2].run(listen, strategy=strategy)
    for messages, before in zip(ranks[2].run(listen, module=Mean, strategy=strategy), quiet, strict=True):
        everything: dict[str, list[Message]] = {**messages}
        before = {where: sent for where, sent in before.items() if where not in ("after 4", "after 8")}
        # Two names are new on the first log, once in the run: their lengths, themselves, and their sums.
        assert everything.pop("after 4") == [
            ("allreduce", "float64", 4 + 3), ("allreduce", "float64", 2),
            ("allreduce", "float64", 2 * len("mean\0size")), ("allreduce", "float64", 2 * 2 * 4),
        ]  # fmt: skip
        assert everything.pop("after 8")[:1] == [("allreduce", "float64", 4 + 3 + 2 * 2 * 4)]
        assert everything == before
