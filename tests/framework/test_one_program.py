"""Tests of torch_compile="update": an update as one program, with the numbers of the usual way.

Most of them have the same graph run operation by operation (aot_eager), since inductor takes seconds for each program.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback, Fit, FitArguments, TrainModule
from stratagem.framework.fields.compilation import NEEDED_FOR_UPDATE, OUTSIDE_ONE_PROGRAM
from stratagem.framework.optim.traced_step import CannotTraceError
from stratagem.framework.run.program import CannotCompileError
from stratagem.framework.steps import Steps
from tiny import (
    Dropping,
    MakeFit,
    Regressor,
    Tagger,
    logs_of,
    parameters_of,
    regression_rows,
    token_rows,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters

pytestmark = pytest.mark.skipif(torch.__version__ < NEEDED_FOR_UPDATE, reason="an older torch is refused")

QUICK: dict[str, Any] = {"torch_compile": "update", "torch_compile_backend": "aot_eager"}


class Network(Regressor):
    """The two layers, under the optimizer that the arguments name."""

    configure_optimizer = TrainModule.configure_optimizer


class Words(Tagger):
    """The same, for tokens."""

    configure_optimizer = TrainModule.configure_optimizer


class Transformer(TrainModule):
    """Two blocks of a transformer, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 16)
        # The bias of keys changes no attention: its gradient is rounding, which AdamW would blow up to whole steps.
        block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, bias=False)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(tokens)))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten())


def trained(make_fit: MakeFit, make: Callable[[], TrainModule], rows: Any, **arguments: Any) -> Fit:
    torch.manual_seed(3)
    usual = {"max_steps": 50, "learning_rate": 0.01, "logging_steps": 5, "save_strategy": "no", "max_grad_norm": 1.0}
    fit = make_fit(make(), rows, **{**usual, **arguments})
    fit.train()
    return fit


def check_same(fit: Fit, other: Fit, tolerance: float = 1e-6) -> None:
    """Parameters and logs of two runs are the same within a tolerance."""
    now, then = parameters_of(fit.module), parameters_of(other.module)
    for name in then:
        torch.testing.assert_close(now[name], then[name], atol=tolerance, rtol=0.0, msg=name)
    for line, before in zip(logs_of(fit), logs_of(other), strict=True):
        line = {name: value for name, value in line.items() if name != "first_step_seconds"}
        assert line == pytest.approx(before, abs=10 * tolerance, rel=1e-5)


def stats() -> tuple[int, int]:
    """Graphs that torch.compile has captured, and what it couldn't."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "rows", "programs"),
    [(Network, regression_rows(40), 1), (Transformer, token_rows(38)[2:], 1), (Network, regression_rows(42), 2)],
    ids=["mlp", "transformer", "short last batch"],
)
def test_a_compiled_update_has_the_numbers_of_the_usual_one(
    make_fit: MakeFit, make: Any, rows: Any, programs: int
) -> None:
    arguments: dict[str, Any] = {
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "per_device_train_batch_size": 4,
    }
    usual = trained(make_fit, make, rows, **arguments)
    counters.clear()
    compiled = trained(make_fit, make, rows, torch_compile="update", **arguments)
    assert stats() == (programs, 0)
    check_same(compiled, usual)


def bad_rows() -> list[dict[str, Tensor]]:
    """Forty rows, of which one is infinite."""
    rows = regression_rows(40)
    rows[13] = {"x": rows[13]["x"] * float("inf"), "y": rows[13]["y"]}
    return rows


class Summing(Words):
    """A loss that divides by the items itself."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor], num_items_in_batch: Any = None) -> Any:
        flat = outputs.flatten(0, 1), batch["labels"].flatten()
        return {"loss": nn.functional.cross_entropy(*flat, reduction="sum") / num_items_in_batch, "size": outputs.std()}


class Partial(Network):
    """A frozen parameter, and some that have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden.weight.requires_grad_(False)
        self.unused = nn.Linear(2, 2)


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "adamw": (Network, regression_rows(40), {"weight_decay": 0.1}),
    "sgd": (Network, regression_rows(40), {"optim": "sgd"}),
    "momentum": (Network, regression_rows(40), {"optim": "sgd", "optim_args": {"momentum": 0.9}}),
    "rmsprop": (Network, regression_rows(40), {"optim": "rmsprop"}),
    "adagrad": (Network, regression_rows(40), {"optim": "adagrad"}),
    "nadam": (Network, regression_rows(40), {"optim": "torch.optim.NAdam"}),
    "muon": (Network, regression_rows(40), {"optim": "muon"}),
    "unclipped": (Network, bad_rows(), {"max_grad_norm": 0.0, "shuffle": False}),
    "not finite": (Network, bad_rows(), {"shuffle": False}),
    "double": (Network, regression_rows(40), {"precision": "64-true"}),
    "padding alone": (Words, token_rows(1) * 4 + token_rows(36), {"shuffle": False}),
    "items and extras": (Summing, token_rows(38)[2:], {}),
    "smoothed": (Words, token_rows(38)[2:], {"label_smoothing_factor": 0.1}),
    "frozen": (Partial, regression_rows(40), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_else_a_run_asks_for_is_in_the_program(make_fit: MakeFit, name: str) -> None:
    make, rows, arguments = CASES[name]
    arguments = {"max_steps": 20, "per_device_train_batch_size": 4, **arguments}
    usual = trained(make_fit, make, rows, **arguments)
    counters.clear()
    compiled = trained(make_fit, make, rows, **QUICK, **arguments)
    assert stats() == (1, 0)
    check_same(compiled, usual, tolerance=1e-3 if name == "muon" else 1e-6)  # Muon computes in bfloat16
    skipped = 2 if name in ("unclipped", "not finite") else 0
    assert (compiled.state.skipped_updates, usual.state.skipped_updates) == (skipped, skipped)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_resumed_run_is_the_same_to_the_bit(make_fit: MakeFit, tmp_path: Path, backend: str) -> None:
    """Dropout draws, batch norm's statistics, the optimizer's moments and the schedule go on where they stood."""
    arguments: dict[str, Any] = {
        **QUICK, "torch_compile_backend": backend, "max_steps": 12, "save_strategy": "steps", "save_steps": 5,
        "per_device_train_batch_size": 4, "logging_steps": 1,
    }  # fmt: skip
    whole = trained(make_fit, Dropping, regression_rows(18), output_dir=str(tmp_path), **arguments)
    torch.manual_seed(4)
    again = make_fit(
        Dropping(), regression_rows(18), output_dir=str(tmp_path), learning_rate=0.01, max_grad_norm=1.0, **arguments
    )
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-5")
    expected = parameters_of(whole.module)
    for name, value in parameters_of(again.module).items():
        assert torch.equal(value, expected[name]), name
    compared = [{k: v for k, v in line.items() if k != "first_step_seconds"} for line in logs_of(whole)[5:]]
    assert [{k: v for k, v in line.items() if k != "first_step_seconds"} for line in logs_of(again)[5:]] == compared


@pytest.mark.parametrize(("first", "second"), [(QUICK, {}), ({}, QUICK)], ids=["to the usual way", "from it"])
def test_a_checkpoint_is_one_of_the_usual_way(
    make_fit: MakeFit, tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    arguments: dict[str, Any] = {"max_steps": 20, "per_device_train_batch_size": 4}
    usual = trained(make_fit, Network, regression_rows(40), **arguments)
    saving = {**arguments, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 10}
    trained(make_fit, Network, regression_rows(40), **first, **saving)
    torch.manual_seed(3)
    options: dict[str, Any] = {"learning_rate": 0.01, "logging_steps": 5, "max_grad_norm": 1.0}
    resumed = make_fit(Network(), regression_rows(40), **options, **second, **saving)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-10")
    check_same(resumed, usual)


class Reading(Callback):
    """Reads gradients before the step."""

    def on_pre_optimizer_step(self, *args: Any, **context: Any) -> None:
        """Would read them."""


class Counting(Network):
    """Changes with a number of Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1.0 + 0.1 * self.calls)


class Deciding(Network):
    """Looks at a number of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum().item() > 0 else super().forward(-x)


class Cycling(Network):
    """A schedule that moves the momentum."""

    def configure_scheduler(self, optimizer: Any, args: FitArguments) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=args.max_steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "arguments", "error", "reason"),
    [
        (Network, {"callbacks": [Reading()]}, CannotCompileError, "Reading hears on_pre_optimizer_step"),
        (Counting, {}, CannotCompileError, "a Python value that forward or loss reads keeps changing"),
        (Deciding, {}, CannotCompileError, "item"),
        (Cycling, {}, CannotCompileError, "OneCycleLR with cycle_momentum"),
        (Network, {"optim": "adafactor"}, CannotTraceError, "a step of Adafactor can't be part of one"),
        (Network, {"optim": "schedule_free_adamw"}, CannotTraceError, "moves parameters outside of its step"),
        (Network, {"optim": "grokadamw"}, CannotTraceError, "GrokAdamW changes 'step', a number on the host"),
        (Network, {"optim": "lomo", "max_grad_norm": 0.0}, CannotTraceError, "moves parameters outside of its step"),
    ],
    ids=["callback", "number", "branch", "momentum", "adafactor", "schedule_free", "grokadamw", "lomo"],
)
def test_what_no_program_can_hold_is_refused_by_name(
    make_fit: MakeFit, make: Any, arguments: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason) as refusal:
        trained(make_fit, make, regression_rows(40), per_device_train_batch_size=4, **{**QUICK, **arguments})
    assert "torch_compile=True" in str(refusal.value)


def test_arguments_that_leave_no_single_program_are_refused() -> None:
    others: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "gradient_accumulation_schedule": {1: 2},
        "auto_find_batch_size": True,
        "spike_updates": 4.0,
        "gradient_checkpointing": True,
        "contrastive_chunks": 2,
        "past_index": 1,
        "debug": "underflow_overflow",
    }
    assert others.keys() == OUTSIDE_ONE_PROGRAM.keys()
    for name, value in others.items():
        with pytest.raises(ValueError, match=f"{name}=.*torch_compile='update'"):
            FitArguments(torch_compile="update", **{name: value})
    with pytest.raises(ValueError, match="must be True, False or 'update'"):
        FitArguments(torch_compile="everything")
    with pytest.raises(ValueError, match="must be one of inductor, aot_eager"):
        FitArguments(torch_compile="update", torch_compile_backend="eager")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"strategy": "dp"}, "strategy='dp' does more in it"),
        ({"precision": "bf16-true"}, "precision='bf16-true' takes part in backward or step"),
        ({"precision": "16-mixed"}, "precision='16-mixed' takes part in backward or step"),
    ],
)
def test_strategies_and_precisions_that_do_more_are_refused(
    make_fit: MakeFit, arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        make_fit(Network(), regression_rows(8), torch_compile="update", **arguments)


def test_an_overridden_step_is_refused(tmp_path: Path) -> None:
    class Own(Fit):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            return Steps.training_step(self, model, inputs, num_items_in_batch)

    with pytest.raises(ValueError, match=r"doesn't call Own\.training_step"):
        Own(Network(), regression_rows(8), torch_compile="update", output_dir=str(tmp_path))
