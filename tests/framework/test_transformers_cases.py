"""What transformers' Trainer does under an argument is done here under the same one: side by side, number by number."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback, Fit, FitArguments, TrainModule
from stratagem.framework.arguments_table import training_arguments_table
from stratagem.framework.fields.foreign_arguments import FOREIGN
from stratagem.framework.optim.greedy import GreedyLR
from stratagem.framework.optim.schedulers import SCHEDULERS, make_scheduler
from tiny import MakeFit, Regressor, lines_of, parameters_of, regression_rows
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler  # noqa: E402 (where it is installed)

# The real Trainer takes XLA's device wherever torch_xla is installed, and is compared with ours on the host.
pytestmark = pytest.mark.skipif(find_spec("torch_xla") is not None, reason="the Trainer would train on XLA's device")

DOCUMENT = Path(__file__).parents[2] / "docs" / "coming_from.md"


# Schedules.

WARMUP, TOTAL, PEAK = 6, 40, 0.02


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("linear", {}, {}),
        ("cosine", {}, {}),
        ("cosine", {"num_cycles": 1.5}, {"num_cycles": 1.5}),
        ("cosine_with_restarts", {"num_cycles": 3}, {"num_cycles": 3}),
        ("polynomial", {"lr_end": 1e-7}, {"lr_end": 1e-7}),
        ("polynomial", {"lr_end": 0.004, "power": 2.0}, {"lr_end": 0.004, "power": 2.0}),
        ("polynomial", {"lr_end": 0.004, "power": 0.5}, {"lr_end_rate": 0.2, "power": 0.5}),
        ("constant_with_warmup", {}, {}),
        ("inverse_sqrt", {}, {}),
        ("inverse_sqrt", {"timescale": 20}, {"timescale": 20}),
        ("cosine_with_min_lr", {"min_lr": 0.005}, {"min_lr": 0.005}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.3, "num_cycles": 1.0}, {"min_lr_rate": 0.3, "num_cycles": 1.0}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, {}),
        ("cosine_warmup_with_min_lr", {"min_lr": 0.005}, {"min_lr": 0.005}),
        (
            "cosine_warmup_with_min_lr",
            {"min_lr_rate": 0.2, "warmup_lr_rate": 0.1},
            {"min_lr_rate": 0.2, "warmup_lr_rate": 0.1},
        ),
        ("warmup_stable_decay", {"num_decay_steps": 10}, {"num_decay_steps": 10}),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 10, "min_lr_ratio": 0.1, "warmup_type": "cosine", "decay_type": "linear"},
            {"num_decay_steps": 10, "min_lr_ratio": 0.1, "warmup_type": "cosine", "decay_type": "linear"},
        ),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 12, "num_stable_steps": 9, "warmup_type": "1-sqrt", "decay_type": "1-sqrt"},
            {"num_decay_steps": 12, "num_stable_steps": 9, "warmup_type": "1-sqrt", "decay_type": "1-sqrt"},
        ),
    ],
)
@pytest.mark.parametrize("warmup", [0, WARMUP, 0.15])
@pytest.mark.filterwarnings("ignore:Both num_training_steps")
def test_a_schedule_has_transformers_rates(
    name: str, theirs: dict[str, Any], ours: dict[str, Any], warmup: float
) -> None:
    def rates(make: Callable[[torch.optim.Optimizer], Any]) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=PEAK)
        scheduler, found = make(optimizer), []
        for _ in range(TOTAL):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    args = FitArguments(
        learning_rate=PEAK, warmup_steps=warmup, lr_scheduler_type=name, lr_scheduler_kwargs=ours, max_steps=TOTAL
    )
    updates = WARMUP if warmup else 0  # 0.15 of 40
    expected = rates(lambda optimizer: get_scheduler(name, optimizer, updates, TOTAL, theirs))
    assert rates(lambda optimizer: make_scheduler(optimizer, args, TOTAL)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"patience": 1, "min_lr": 1e-4},
        {"patience": 0, "min_lr": 1e-4, "cooldown": 2, "warmup": 1, "factor": 0.5},
        {"patience": 1, "min_lr": 0.015, "max_lr": 0.03, "reset_start": 2, "factor": 0.7},
        {"patience": 1, "min_lr": 1e-4, "smooth": True, "window_size": 3, "threshold": 0.02, "threshold_mode": "rel"},
        {"patience": 1, "min_lr": 1e-4, "mode": "max", "threshold_mode": "rel", "threshold": 0.01},
    ],
)
def test_greedy_rates_are_transformers(options: dict[str, Any]) -> None:
    from transformers.optimization import GreedyLR as Theirs

    found = []
    for kind in (Theirs, GreedyLR):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=PEAK)
        scheduler: Any = kind(optimizer, **options)
        rates = []
        for i in range(60):
            # Falls, rises and stays in turn.
            scheduler.step([1.0 / (i + 1), 0.01 * i, 0.5][(i // 9) % 3])
            rates.append(optimizer.param_groups[0]["lr"])
            if kind is GreedyLR and i == 30:  # a checkpoint goes through JSON
                state = json.loads(json.dumps(scheduler.state_dict()))
                scheduler = GreedyLR(optimizer, **options)
                scheduler.load_state_dict(state)
        found.append(rates)
    assert found[1] == pytest.approx(found[0], abs=1e-15)
    assert len(set(found[0])) > 2


def test_greedy_steps_on_evaluations(make_fit: MakeFit) -> None:
    # Nothing moves at a rate of 1e-12, so that no evaluation but the first is better than the ones before.
    fit = make_fit(
        Regressor(),
        regression_rows(8),
        regression_rows(4),
        max_steps=8,
        learning_rate=1e-12,
        lr_scheduler_type="greedy",
        lr_scheduler_kwargs={"patience": 0, "factor": 0.5, "eps": 0.0, "min_lr": 0.0},
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
    )
    fit.train()
    rates = [line["learning_rate"] for line in fit.state.log_history if "learning_rate" in line]
    # The first evaluation improves on nothing, and doubles.
    assert rates == pytest.approx([1e-12] * 2 + [2e-12] * 2 + [1e-12] * 2 + [0.5e-12] * 2, rel=1e-9)


def test_every_schedule_of_transformers_is_there() -> None:
    assert {kind.value for kind in transformers.SchedulerType} == set(SCHEDULERS)


# Side by side with Trainer.


class Line(nn.Module):
    """A regression as transformers' models are written: labels in, a mapping with the loss out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.hidden = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.norm(torch.tanh(self.hidden(x))))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.mse_loss(logits, labels), "logits": logits}


class Wrapped(TrainModule):
    """The same, trained here."""

    def __init__(self) -> None:
        super().__init__()
        self.line = Line()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return self.line(x, labels)

    def loss(self, outputs: dict[str, Tensor], batch: Any) -> Tensor:
        return outputs["loss"]


def rows(count: int) -> list[dict[str, Tensor]]:
    return [{"x": row["x"], "labels": row["y"]} for row in regression_rows(count)]


TRAIN, EVAL = rows(24), rows(10)
SHARED: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 0.05,
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
    "save_strategy": "no",
}


def theirs(directory: Path, trainer: dict[str, Any] | None = None, **arguments: Any) -> tuple[Any, dict[str, Tensor]]:
    """A run of transformers', and its weights."""
    if arguments.get("max_grad_norm", 1.0) is None:  # transformers' own comparison with a number fails
        arguments["max_grad_norm"] = 0.0
    args = TrainingArguments(
        output_dir=str(directory), use_cpu=True, report_to="none", disable_tqdm=True, **{**SHARED, **arguments}
    )
    model = Line()
    done = Trainer(model, args, train_dataset=TRAIN, eval_dataset=EVAL, **(trainer or {}))
    try:
        done.train()
    finally:
        torch.use_deterministic_algorithms(False)  # it doesn't take it back
    if hasattr(done.optimizer, "eval"):
        done.optimizer.eval()
    return done, parameters_of(model)


def ours(directory: Path, fit: dict[str, Any] | None = None, **arguments: Any) -> tuple[Fit, dict[str, Tensor]]:
    """The same run here."""
    module = Wrapped()
    done = Fit(
        module,
        TRAIN,
        EVAL,
        output_dir=str(directory),
        progress=False,
        loggers=(),
        **{**SHARED, **arguments},
        **(fit or {}),
    )
    done.train()
    return done, parameters_of(module.line)


@pytest.mark.parametrize(
    "arguments",
    [
        {"optim": "adamw_torch"},
        {"optim": "adamw_torch_fused", "weight_decay": 0.3},
        {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true"},
        {"optim": "rmsprop", "optim_args": "alpha=0.9"},
        {"optim": "adagrad"},
        {"optim": "stable_adamw", "weight_decay": 0.1},
        {"optim": "grokadamw"},
        {"optim": "adamw_8bit"},
        {"optim": "adamw_bnb_8bit", "weight_decay": 0.1},
        {"optim": "ademamix"},
        {"optim": "lion_32bit"},
        {"optim": "lion_8bit"},
        {"optim": "rmsprop_bnb"},
        # transformers gives adam_epsilon to the projected weights alone; the package's default is 1e-6.
        {"optim": "apollo_adamw", "optim_target_modules": ["hidden"], "optim_args": "rank=2", "adam_epsilon": 1e-6},
        {
            "optim": "apollo_adamw",
            "optim_target_modules": ".*hid.*",
            "optim_args": "rank=2,scale_type=tensor",
            "adam_epsilon": 1e-6,
        },
        {"optim": "schedule_free_radam", "lr_scheduler_type": "constant"},
        {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
        {"optim": "schedule_free_sgd", "lr_scheduler_type": "constant"},
        {"max_grad_norm": 0.05},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": None},
        {"gradient_accumulation_steps": 4},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "warmup_steps": 0.3, "lr_scheduler_type": "cosine"},
        {"warmup_steps": 5, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-3},
        {"max_steps": 5},
        {"num_train_epochs": 1.5},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 5},
        {"full_determinism": True},
        {
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": {"patience": 0, "factor": 0.3},
            "eval_strategy": "steps",
            "eval_steps": 2,
        },
        {
            "lr_scheduler_type": "greedy",
            "lr_scheduler_kwargs": {"patience": 1, "min_lr": 0.001},
            "eval_strategy": "steps",
            "eval_steps": 1,
        },
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_the_curve_and_the_weights_are_trainers(tmp_path: Path, arguments: dict[str, Any]) -> None:
    expected, weights = theirs(tmp_path / "theirs", **arguments)
    fit, found = ours(tmp_path / "ours", **arguments)
    logs = [
        [line for line in history if "loss" in line] for history in (expected.state.log_history, fit.state.log_history)
    ]
    for name in ("loss", "learning_rate"):
        assert [line[name] for line in logs[1]] == pytest.approx([line[name] for line in logs[0]], rel=1e-4), name
    if arguments.get("max_grad_norm", 1.0):
        norms = [[line["grad_norm"] for line in lines] for lines in logs]
        assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    [total, ours_total] = [history[-1] for history in (expected.state.log_history, fit.state.log_history)]
    assert ours_total["train_loss"] == pytest.approx(total["train_loss"], rel=1e-5)


def kinds(history: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """(update, what was logged) of each log."""
    return [(line["step"], next(k for k in ("loss", "eval_loss", "train_loss") if k in line)) for line in history]


@pytest.mark.parametrize(
    "arguments",
    [
        {"eval_strategy": "steps", "eval_steps": 4},  # 18 updates: a last evaluation between two
        {"eval_strategy": "steps", "eval_steps": 6},  # 18 is one of them
        {"eval_strategy": "steps", "eval_steps": 4, "eval_delay": 9},
        {"eval_strategy": "steps", "eval_steps": 4, "eval_delay": 18},
        {"eval_strategy": "steps", "eval_steps": 4, "eval_delay": 19},
        {"eval_strategy": "epoch", "eval_delay": 2},
        {"eval_strategy": "epoch", "eval_delay": 1.5, "logging_strategy": "epoch"},
        {"eval_strategy": "steps", "eval_steps": 0.3, "logging_steps": 0.25},
        {"eval_strategy": "steps", "logging_steps": 5},  # eval_steps as logging_steps
        {
            "eval_strategy": "steps",
            "eval_steps": 7,
            "logging_steps": 9,
            "logging_first_step": True,
            "eval_on_start": True,
        },
        {"logging_strategy": "no"},
        {"logging_strategy": "epoch"},
        {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 7, "logging_steps": 3},
        {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5},
        {"eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 2},
        {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "best", "metric_for_best_model": "loss"},
        {
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_strategy": "best",
            "metric_for_best_model": "loss",
            "greater_is_better": True,
        },
        {
            "eval_strategy": "epoch",
            "save_strategy": "best",
            "metric_for_best_model": "loss",
            "learning_rate": 0.9,
            "load_best_model_at_end": True,
        },
    ],
    ids=str,
)
def test_logs_evaluations_and_checkpoints_fall_where_trainers_do(tmp_path: Path, arguments: dict[str, Any]) -> None:
    arguments = {"logging_steps": 6, **arguments}
    expected, _ = theirs(tmp_path / "theirs", **arguments)
    fit, _ = ours(tmp_path / "ours", **arguments)
    if arguments.get("logging_strategy") == "no" or "logging_steps" in arguments:
        # Ours logs what is left at the end of the run, too.
        final = fit.state.global_step
        without_last = [kind for kind in kinds(fit.state.log_history) if kind != (final, "loss")]
        assert without_last == [kind for kind in kinds(expected.state.log_history) if kind != (final, "loss")]
    saved = [{path.name for path in (tmp_path / name).glob("checkpoint-*")} for name in ("theirs", "ours")]
    assert saved[1] == saved[0]
    assert fit.state.best_global_step == expected.state.best_global_step or "metric_for_best_model" not in arguments
    assert fit.state.epoch == pytest.approx(expected.state.epoch)


def test_predictions_labels_and_metrics_are_trainers(tmp_path: Path) -> None:
    def keep(logits: Tensor, labels: Tensor) -> Tensor:
        assert logits.shape == labels.shape  # the logits themselves, not a mapping
        return torch.cat([logits, labels], dim=1)

    def measure_theirs(found: Any) -> dict[str, float]:
        return {"gap": float(abs(found.predictions[:, 0] - found.label_ids[:, 0]).max())}

    def measure_ours(predictions: Tensor, labels: Tensor) -> dict[str, float]:
        return {"gap": float((predictions[:, 0] - labels[:, 0]).abs().max())}

    asked = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    preprocess = {"preprocess_logits_for_metrics": keep}
    expected, _ = theirs(tmp_path / "theirs", {"compute_metrics": measure_theirs, **preprocess}, **asked)
    fit, _ = ours(tmp_path / "ours", {"compute_metrics": measure_ours, **preprocess}, **asked)
    wanted, found = expected.predict(EVAL), fit.predict(EVAL)
    predictions, label_ids, metrics = found
    torch.testing.assert_close(predictions, torch.tensor(wanted.predictions))
    torch.testing.assert_close(label_ids, torch.tensor(wanted.label_ids))
    for name in ("test_loss", "test_gap"):
        assert metrics[name] == pytest.approx(wanted.metrics[name], rel=1e-5)
    evaluated = next(line for line in expected.state.log_history if "eval_gap" in line)
    assert next(line for line in fit.state.log_history if "eval_gap" in line)["eval_gap"] == pytest.approx(
        evaluated["eval_gap"], rel=1e-5
    )


@pytest.mark.parametrize("batches", [None, 1, 2, 5])
def test_batches_of_predictions_may_wait_on_the_device(make_fit: MakeFit, batches: int | None) -> None:
    fit = make_fit(Wrapped(), per_device_eval_batch_size=3, eval_accumulation_steps=batches)
    found = fit.predict(EVAL)
    expected = torch.cat([fit.module(row["x"][None])["logits"] for row in EVAL])
    torch.testing.assert_close(found.predictions["logits"], expected.detach())
    assert torch.equal(found.label_ids, torch.stack([row["labels"] for row in EVAL]))
    assert make_fit(Wrapped()).predict([{"x": row["x"]} for row in EVAL]).label_ids is None


# Callbacks.


class Counting(Callback):
    def __init__(self) -> None:
        self.updates = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.updates += 1


class Marking(Callback):
    def on_log(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        context["logs"]["marked"] = 1.0


def test_callbacks_come_and_go(make_fit: MakeFit, capsys: pytest.CaptureFixture[str]) -> None:
    kept, gone = Counting(), Counting()
    fit = make_fit(Regressor(), regression_rows(8), max_steps=2, callbacks=[gone], progress=True, logging_steps=1)
    fit.add_callback(kept)
    fit.add_callback(Marking)
    assert fit.pop_callback(Counting) is gone  # the first of the class
    fit.train()
    assert (kept.updates, gone.updates) == (2, 0)
    assert all(line["marked"] == 1.0 for line in fit.state.log_history)
    assert "marked 1" in capsys.readouterr().out  # the display hears of what a later callback adds
    fit.remove_callback(kept)
    fit.remove_callback(Marking)
    assert fit.pop_callback(kept) is None
    fit.train()
    assert kept.updates == 2
    assert "marked" not in fit.state.log_history[0]
    with pytest.raises(TypeError, match=r"callbacks takes instances of stratagem\.Callback"):
        fit.add_callback(TrainerCallback())  # type: ignore[arg-type]


# A second train().


def test_a_second_run_of_module_init_begins_from_a_fresh_module(make_fit: MakeFit) -> None:
    fit = make_fit(None, regression_rows(8), module_init=lambda trial: Regressor(), max_steps=3, learning_rate=0.1)
    weights = []
    for _ in range(3):
        fit.train()
        weights.append(parameters_of(fit.module))
    for again in weights[1:]:
        assert all(torch.equal(again[name], value) for name, value in weights[0].items())


def test_a_second_run_of_a_module_goes_on_from_its_weights(make_fit: MakeFit) -> None:
    module = Regressor()
    fit = make_fit(module, regression_rows(8), max_steps=3, learning_rate=0.1, logging_steps=1)
    fit.train()
    first = parameters_of(module)
    last = [line["loss"] for line in fit.state.log_history if "loss" in line]
    fit.train()
    assert not torch.equal(first["hidden.weight"], module.hidden.weight)
    assert next(line["loss"] for line in fit.state.log_history) < last[0]


# Names.


def test_every_argument_of_transformers_is_ours_or_refused_with_a_word() -> None:
    known = {field.name for field in dataclasses.fields(FitArguments)}
    for field in dataclasses.fields(TrainingArguments):
        assert (field.name in known) != (field.name in FOREIGN), field.name
    assert not known & set(FOREIGN)


def test_the_document_lists_every_argument_of_transformers() -> None:
    table = training_arguments_table(field.name for field in dataclasses.fields(TrainingArguments))
    assert table in DOCUMENT.read_text()


@pytest.mark.parametrize("name", FOREIGN)
def test_a_name_from_elsewhere_says_what_is_written_here(name: str) -> None:
    for refuse in (lambda: FitArguments(**{name: True}), lambda: FitArguments().replace(**{name: True})):
        with pytest.raises(TypeError) as caught:
            refuse()
        assert str(caught.value) == f"Fit has no argument {name!r}. {FOREIGN[name]}"


def test_what_is_written_here_is_there() -> None:
    known = {field.name for field in dataclasses.fields(FitArguments)}
    elsewhere = {
        "loggers", "precision", "strategy", "devices", "train_data", "eval_data", "module_init", "compute_loss_func",
        "collate_fn", "config", "data_collator", "tensor_parallel", "context_parallel", "timeout",
        "resume_from_checkpoint",
    }  # fmt: skip
    written = {name for text in FOREIGN.values() for name in re.findall(r"\b(\w+)=", text)}
    assert {name for name in written if name not in known} <= elsewhere | {"CUDA_VISIBLE_DEVICES"}
    arguments = {name for text in FOREIGN.values() for name in re.findall(r"Write (\w+)(?:,|\.$|\. )", text)}
    assert {name for name in arguments if name not in known} == set()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"optim": "torch.optim.Nothing"}, "'torch.optim.Nothing' can't be imported"),
        ({"optim": "adamw_anyprecision"}, "no release for this torch; write optim='adamw'"),
        ({"optim": "adamw_torch_8bit"}, "write optim='adamw_8bit'"),
        ({"optim": "galore_adamw_layerwise"}, "write optim='lomo'"),
        ({"optim": "galore_adamw"}, "needs linear layers to project"),
        ({"optim_target_modules": "all-linear"}, "has no effect with optim='adamw'"),
        ({"optim": "torch.optim.NAdam", "adam_beta1": 0.5}, "write it in optim_args"),
        ({"warmup_steps": 2.5}, "a number of updates, or a fraction"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}, "below the peak"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6, "min_lr_rate": 0.1}},
            "say the same",
        ),
        ({"lr_scheduler_type": "greedy"}, "steps on an evaluation's metric"),
        ({"save_strategy": "best"}, "needs evaluations to tell which is best"),
        ({"eval_delay": 3}, "has no effect with eval_strategy='no'"),
        ({"eval_accumulation_steps": 0}, "must be at least 1, or None"),
        ({"max_grad_norm": -1.0}, "must not be negative"),
        ({"torch_compile_backend": "eager"}, "has no effect without torch_compile=True"),
        ({"torch_compile": True, "torch_compile_backend": "inductr"}, "must be one of"),
        (
            {"torch_compile": True, "torch_compile_backend": "eager", "torch_compile_mode": "max-autotune"},
            "is a mode of the backend 'inductor'",
        ),
        ({"train_sampling_strategy": "batch_rebalance"}, "must be one of 'random', 'sequential', 'group_by_length'"),
        ({"train_sampling_strategy": "group_by_length", "shuffle": False}, "leave one of them out"),
        ({"length_column_name": "len"}, "has no effect without train_sampling_strategy"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        FitArguments(**arguments)


def test_optimizers_of_transformers_are_ours_or_refused_by_name() -> None:
    from stratagem.framework.optim.optimizers import OPTIMIZERS, REFUSED
    from transformers.training_args import OptimizerNames

    for name in OptimizerNames:
        assert (name.value in OPTIMIZERS) != (name.value in REFUSED), name.value


@pytest.mark.parametrize("optim", [torch.optim.NAdam, "torch.optim.NAdam"])
def test_an_optimizer_is_a_class_or_its_path(make_fit: MakeFit, optim: Any) -> None:
    fit = make_fit(Wrapped(), TRAIN, max_steps=1, optim=optim, optim_args={"momentum_decay": 0.01}, learning_rate=0.3)
    fit.train()
    assert type(fit.optimizer) is torch.optim.NAdam
    assert (fit.optimizer.defaults["momentum_decay"], fit.optimizer.defaults["lr"]) == (0.01, 0.3)
    assert json.loads(json.dumps(fit.args.to_dict()))["optim"].startswith("torch.optim.")


def make_rprop(groups: Any, lr: float, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Rprop(groups, lr=lr, **options)


def test_an_optimizer_is_made_by_a_function(make_fit: MakeFit) -> None:
    fit = make_fit(Wrapped(), TRAIN, max_steps=1, optim=make_rprop)
    fit.train()
    assert type(fit.optimizer) is torch.optim.Rprop
    with pytest.raises(ValueError, match="Rprop has no such option"):
        make_fit(Wrapped(), TRAIN, max_steps=1, optim=make_rprop, weight_decay=0.1).train()
    with pytest.raises(ValueError, match="Define it at the top of a module"):
        FitArguments(optim=lambda groups, lr: torch.optim.SGD(groups, lr))  # type: ignore[arg-type]


def test_paged_optimizers_want_a_gpu(make_fit: MakeFit) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ValueError, match="Write optim='lion_8bit'"):
        make_fit(Wrapped(), TRAIN, optim="paged_lion_8bit")
    with pytest.raises(ValueError, match=r"this run is on 'cpu'.*precision='bf16-mixed'"):
        make_fit(Wrapped(), TRAIN, tf32=True)
    make_fit(Wrapped(), TRAIN, tf32=False, max_steps=1).train()


# From a command line.

PROGRAM = """
import json
from stratagem import FitArguments
from transformers import HfArgumentParser
[args] = HfArgumentParser(FitArguments).parse_args_into_dataclasses()
again = FitArguments(eval_strategy="no")  # the parser has left the class as it was
print(json.dumps(args.to_dict()))
"""


@pytest.mark.slow
def test_a_command_line_is_parsed_by_transformers(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    line = (
        "--learning_rate 1e-3 --max-steps 70 --no_shuffle --torch_compile --eval_strategy steps --eval_steps 0.1 "
        "--save_total_limit 3 --optim sgd --optim_args momentum=0.9,nesterov=True --warmup_steps 0.25 --tf32 false "
        '--lr_scheduler_type polynomial --lr_scheduler_kwargs {"power":2.0} --max_grad_norm 0'
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, str(program), *line.split()], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr
    expected = FitArguments(
        learning_rate=1e-3,
        max_steps=70,
        shuffle=False,
        torch_compile=True,
        eval_strategy="steps",
        eval_steps=0.1,
        save_total_limit=3,
        optim="sgd",
        optim_args={"momentum": 0.9, "nesterov": True},
        warmup_steps=0.25,
        tf32=False,
        lr_scheduler_type="polynomial",
        lr_scheduler_kwargs={"power": 2.0},
        max_grad_norm=0.0,
    )
    assert FitArguments(**json.loads(done.stdout.splitlines()[-1])) == expected


def test_every_argument_has_a_word_of_help() -> None:
    for field in dataclasses.fields(FitArguments):
        assert len(field.metadata["help"]) > 10, field.name


# Settings of the process, and the run's name.


def test_determinism_holds_in_the_run_and_no_longer(make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    # The real Trainer, which other tests in here run, leaves it switched on.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)

    class Look(Callback):
        def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic))

    for wanted in (True, False):
        fit = make_fit(Regressor(), regression_rows(8), max_steps=1, full_determinism=wanted, callbacks=[Look()])
        fit.train()
        assert not torch.are_deterministic_algorithms_enabled()
    assert seen == [(True, True), (False, False)]


def test_an_operation_without_a_deterministic_algorithm_ends_training(make_fit: MakeFit) -> None:
    class Put(Regressor):
        def forward(self, x: Tensor) -> Tensor:
            index = torch.zeros(2, dtype=torch.long)
            return super().forward(x) + torch.zeros(1).put_(index, torch.ones(2), accumulate=False)

    make_fit(Put(), regression_rows(8), max_steps=1).train()
    with pytest.raises(RuntimeError, match="deterministic"):
        make_fit(Put(), regression_rows(8), max_steps=1, full_determinism=True).train()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_is_called_by_its_name(make_fit: MakeFit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = make_fit(
        Regressor(),
        regression_rows(8),
        max_steps=1,
        run_name="tiny [1]",
        loggers=["jsonl", "tensorboard"],
        progress=True,
        output_dir=str(tmp_path),
        save_strategy="no",
    )
    fit.train()
    first = lines_of(tmp_path / "log.jsonl")[0]
    assert first == {"step": 0, "event": "begin", "max_steps": 1, "run_name": "tiny [1]"}
    assert list((tmp_path / "tiny [1]" / "train").glob("events*"))
    assert "tiny [1] update 1/1" in capsys.readouterr().out


def test_totals_are_the_last_log(make_fit: MakeFit, tmp_path: Path) -> None:
    fit = make_fit(Regressor(), regression_rows(8), max_steps=4, loggers=["jsonl"], output_dir=str(tmp_path))
    output = fit.train()
    last = lines_of(tmp_path / "log.jsonl")[-1]
    assert last["train_loss"] == output.training_loss == fit.state.log_history[-1]["train_loss"]
    assert last["train_runtime"] == output.metrics["train_runtime"]
    assert last["step"] == 4
