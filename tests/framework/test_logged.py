"""What modules log from forward and loss: means over items, micro-batches and updates, compared with sums by hand."""

import copy
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback, Fit, TrainModule
from stratagem.framework.logged import OF_LIGHTNING, RESERVED
from stratagem.framework.measures.logged_means import LoggedMeans
from stratagem.precision import FP16Mixed
from tiny import Dropping, MakeFit, Regressor, StopAt, Tagger, parameters_of, regression_rows, token_rows
from torch import Tensor, nn
from torch._dynamo.utils import counters

ROWS = token_rows(22)  # row i has i % 7 labels that count


def training_logs(fit: Fit) -> list[dict[str, Any]]:
    return [log for log in fit.state.log_history if "loss" in log]


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).float()


class Logging(Tagger):
    """Logs a mean over the labels that count, one over other items, and a number."""

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        self.log("size", logits.detach().abs().mean(), items=len(tokens))
        self.log("length", tokens.shape[1])
        return logits

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        labels = batch["labels"]
        self.log("accuracy", hits(outputs, labels)[labels != -100].mean())  # NaN where no label counts
        few = labels < 3  # -100 is among them
        self.log("accuracy_of_few", hits(outputs, labels)[few].mean(), items=few.sum())
        return super().loss(outputs, batch)


def whole(rows: list[dict[str, Tensor]], module: nn.Module) -> dict[str, float]:
    """The means over all of some rows, of a module as it is."""
    tokens, labels = (torch.stack([row[name] for row in rows]) for name in ("tokens", "labels"))
    with torch.no_grad():
        logits = module.head(module.embed(tokens))
    right, counts = hits(logits, labels), labels != -100
    return {
        "size": logits.abs().mean().item(),
        "length": tokens.shape[1],
        "accuracy": right[counts].mean().item(),
        "accuracy_of_few": right[labels < 3].mean().item(),
    }


class Before(Callback):
    """Copies the module as it was before each update."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
        self.modules.append(copy.deepcopy(fit.module))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_an_update_has_one_mean_over_its_items(make_fit: MakeFit, accumulation: int) -> None:
    before, size = Before(), 8 // accumulation
    fit = make_fit(
        Logging(), ROWS, ROWS[:13], per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=3, num_train_epochs=2, logging_steps=3, callbacks=[before],
    )  # fmt: skip
    fit.train()
    by_hand = [whole(ROWS[8 * (i % 3) : 8 * (i % 3) + 8], module) for i, module in enumerate(before.modules)]
    for log, first in zip(training_logs(fit), (0, 3), strict=True):
        for name in by_hand[0]:
            expected = sum(means[name] for means in by_hand[first : first + 3]) / 3
            assert log[name] == pytest.approx(expected, rel=1e-6), name
    metrics = fit.evaluate()
    expected = {f"eval_{name}": value for name, value in whole(ROWS[:13], fit.module).items()}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-6)


class Seldom(Regressor):
    """Logs twice in every second micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        self.calls += 1
        if self.calls % 2:
            self.log("call", self.calls, items=3)
            self.log("call", torch.tensor(100 * self.calls))  # of 1 item
            self.log("nothing", math.nan, items=0)
            self.log("broken", math.inf if self.calls == 3 else 1)
        return super().loss(outputs, batch)


def test_the_mean_is_over_what_was_logged(make_fit: MakeFit) -> None:
    def train(accumulation: int, **arguments: Any) -> list[dict[str, Any]]:
        fit = make_fit(
            Seldom(), regression_rows(8), per_device_train_batch_size=1, gradient_accumulation_steps=accumulation,
            max_steps=8 // accumulation, logging_steps=4 // accumulation, **arguments,
        )  # fmt: skip
        fit.train()
        return training_logs(fit)

    # Calls 1 and 3, and 5 and 7: updates of their own; each a mean of (3 * k + 100 * k) / 4.
    assert [log["call"] for log in train(1)] == [103 / 4 * 2, 103 / 4 * 6]
    assert [log["call"] for log in train(2)] == [103 / 4 * 2, 103 / 4 * 6]
    assert [log["broken"] for log in train(1)] == [1, 1]
    assert [log["broken"] for log in train(1, logging_nan_inf_filter=False)] == [math.inf, 1]
    assert [log["broken"] for log in train(4)] != [1, 1]  # all of that update's mean isn't finite
    assert "nothing" not in train(1)[0]


def test_many_calls_are_summed_up_and_none_is_lost(make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> list[dict[str, Any]]:
        fit = make_fit(seeded(Logging), ROWS, max_steps=11, logging_steps=11, per_device_train_batch_size=2)
        fit.train()
        return training_logs(fit)

    usual = train()
    monkeypatch.setattr(LoggedMeans, "FOLD", 3)
    assert train() == usual


class Blocks(Tagger):
    """Blocks that log by a method they were given, and draw; each call has a number."""

    def __init__(self, logs: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(self.log if logs else None) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class Block(nn.Module):
    def __init__(self, log: Callable[..., None] | None) -> None:
        super().__init__()
        self.layer, self.log = nn.Linear(5, 5), log
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.log is not None and not torch.compiler.is_compiling():
            self.calls += 1
            self.log("calls", self.calls)
        x = x + torch.tanh(self.layer(x))
        if self.log is not None:
            self.log("hidden", x.mean(), items=x.numel())
        return x


def trained(make_fit: MakeFit, module: TrainModule, **arguments: Any) -> Fit:
    options = {"max_steps": 6, "logging_steps": 2, "per_device_train_batch_size": 4, "shuffle": True}
    fit = make_fit(module, ROWS[1:21], ROWS[:4], **{**options, **arguments})
    fit.train()
    fit.evaluate()
    return fit


def seeded(make: Callable[[], TrainModule]) -> TrainModule:
    torch.manual_seed(1)
    return make()


def test_nothing_changes_where_something_is_logged(make_fit: MakeFit) -> None:
    quiet, logging = (trained(make_fit, seeded(lambda logs=logs: Blocks(logs))) for logs in (False, True))
    for name, value in parameters_of(quiet.module).items():
        assert torch.equal(parameters_of(logging.module)[name], value), name
    assert [log["loss"] for log in training_logs(logging)] == [log["loss"] for log in training_logs(quiet)]


def test_a_block_that_is_computed_again_is_counted_once(make_fit: MakeFit) -> None:
    once = trained(make_fit, seeded(Blocks))
    again = trained(make_fit, seeded(Blocks), gradient_checkpointing=True)
    assert [log["hidden"] for log in training_logs(again)] == [log["hidden"] for log in training_logs(once)]
    assert [log["calls"] for log in training_logs(once)] == [1.5, 3.5, 5.5]
    assert [log["calls"] for log in training_logs(again)] == [2, 6, 10]  # 1, 3, 5, ...: the second call is backward's


def test_a_closure_that_computes_again_is_counted_once(make_fit: MakeFit) -> None:
    class Closing(Logging):
        def configure_optimizer(self, args: Any) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    before = Before()
    fit = make_fit(Closing(), ROWS[1:9], max_steps=2, logging_steps=1, per_device_train_batch_size=8,
                   callbacks=[before])  # fmt: skip
    fit.train()
    for log, module in zip(training_logs(fit), before.modules, strict=True):
        assert log["accuracy"] == pytest.approx(whole(ROWS[1:9], module)["accuracy"])


COMPILED: dict[str, dict[str, Any]] = {
    "blocks": {"torch_compile": True},
    "checkpointed blocks": {"torch_compile": True, "gradient_checkpointing": True},
    "update": {"torch_compile": "update"},
}


class Inner(TrainModule):
    """A block that is a TrainModule, and logs by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.layer(x))
        self.log("hidden", x.mean(), items=x.numel())
        return x


class Outer(Blocks):
    def __init__(self, logs: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Inner() for _ in range(3))


class Late(Outer):
    """Whose blocks are there when it is placed."""

    def build(self) -> None:
        self.blocks = nn.ModuleList(Inner() for _ in range(3))


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (Outer, {}),
        (Late, {}),
        pytest.param(Outer, {"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow),
    ],
    ids=["as they are", "late", "compiled"],
)
def test_layers_that_are_train_modules_log_by_themselves(
    make_fit: MakeFit, module: type[TrainModule], arguments: dict[str, Any]
) -> None:
    fit = trained(make_fit, seeded(module), **arguments)
    assert len([log for log in training_logs(fit) if math.isfinite(log["hidden"])]) == 3
    if module is Outer:
        usual = seeded(Blocks)
        usual.load_state_dict(seeded(Outer).state_dict())
        expected = [log["hidden"] for log in training_logs(trained(make_fit, usual))]
        assert [log["hidden"] for log in training_logs(fit)] == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_what_is_compiled_logs_without_another_graph_or_break(make_fit: MakeFit, name: str) -> None:
    found: list[tuple[int, int]] = []
    fits = []
    for logs in (False, True):
        torch.compiler.reset()
        counters.clear()
        arguments = {"torch_compile_backend": "aot_eager", **COMPILED[name]}
        fits.append(trained(make_fit, seeded(lambda logs=logs: Blocks(logs)), **arguments))
        found.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    assert found[0] == found[1] and found[1][1] == 0
    usual = trained(make_fit, seeded(Blocks))
    for log, before, quiet in zip(training_logs(fits[1]), training_logs(usual), training_logs(fits[0]), strict=True):
        assert log["hidden"] == pytest.approx(before["hidden"], rel=1e-5)
        assert log["loss"] == quiet["loss"]
    of_evaluations = [fit.state.log_history[-1]["eval_hidden"] for fit in (fits[1], usual)]
    assert of_evaluations[0] == pytest.approx(of_evaluations[1], rel=1e-5)


@pytest.mark.slow
def test_two_modules_of_one_compiled_code_log_apart(make_fit: MakeFit) -> None:
    arguments = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    usual = trained(make_fit, seeded(Blocks))
    for _ in range(2):
        fit = trained(make_fit, seeded(Blocks), **arguments)
        assert [log["hidden"] for log in training_logs(fit)] == pytest.approx(
            [log["hidden"] for log in training_logs(usual)]
        )


def test_a_run_goes_on_in_the_middle_of_a_mean(make_fit: MakeFit, tmp_path: Path) -> None:
    def run(directory: str, stop: int | None = None, resume: bool = False) -> Fit:
        fit = make_fit(
            seeded(Logging), ROWS, max_steps=8, logging_steps=4, per_device_train_batch_size=2, save_strategy="steps",
            save_steps=2, output_dir=str(tmp_path / directory), callbacks=[StopAt(stop)] if stop else [],
        )  # fmt: skip
        fit.train(resume_from_checkpoint=resume)
        return fit

    run("stopped", stop=6)
    names = ("size", "accuracy", "accuracy_of_few", "length")
    expected = [[log[name] for name in names] for log in training_logs(run("whole"))]
    assert [[log[name] for name in names] for log in training_logs(run("stopped", resume=True))] == expected


def test_predictions_and_forwards_without_a_fit_log_nothing(make_fit: MakeFit) -> None:
    module = Logging()
    outputs = module(ROWS[1]["tokens"][None])
    module.loss(outputs, {"labels": ROWS[1]["labels"][None]})
    fit = make_fit(module, None, ROWS)
    assert set(fit.predict(ROWS).metrics) == {"test_loss"}
    module(ROWS[1]["tokens"][None])
    assert set(fit.evaluate()) > {"eval_loss", "eval_accuracy"}


# What can't be logged.


def log_as(*given: Any, **options: Any) -> type[TrainModule]:
    """A module that logs so."""

    class Wrong(Regressor):
        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
            self.log(*given, **options)
            return {"loss": super().loss(outputs, batch), "extra": outputs.mean()}

    return Wrong


@pytest.mark.parametrize(
    ("module", "error", "says"),
    [
        (log_as("x", torch.ones(2)), ValueError, r"log\('x'\): the value must be .* 0-dim.*tensor of shape \(2,\)"),
        (log_as("x", torch.ones((), dtype=torch.complex64)), ValueError, "complex tensor"),
        (log_as("x", "high"), TypeError, "Received: str"),
        (log_as("x", None), TypeError, "Received: NoneType"),
        (log_as("x", 1, items=torch.ones(3)), ValueError, "the items must be a number or a 0-dim tensor"),
        (log_as("x", 1, items=-1), ValueError, "at least 0 items"),
        (log_as("x", 1, items=math.nan), ValueError, "at least 0 items"),
        (log_as("", 1), TypeError, "takes a name and a value"),
        (log_as(1.0, "x"), TypeError, "takes a name and a value"),
        (log_as("extra", 1), ValueError, "'extra' is logged by log.., and an entry of the mapping"),
        *((log_as(name, 1), ValueError, f"a log has its own '{name}'") for name in ("loss", "grad_norm", "step")),
    ],
)
def test_what_cannot_be_logged_is_refused(
    make_fit: MakeFit, module: type[TrainModule], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        make_fit(module(), regression_rows(4), max_steps=1).train()
    with pytest.raises(error, match=says):
        make_fit(module(), None, regression_rows(4)).evaluate()


def test_a_name_of_a_metric_is_taken(make_fit: MakeFit) -> None:
    class Metered(log_as("error", 1)):  # type: ignore[misc]
        def metrics(self) -> Mapping[str, Any]:
            return {"error": nn.Identity()}  # never updated

    with pytest.raises(ValueError, match=r"'error' is logged by log\(\), and"):
        make_fit(Metered(), None, regression_rows(4)).evaluate()


def test_a_log_elsewhere_is_refused(make_fit: MakeFit) -> None:
    class Late(Callback):
        def on_step_end(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
            fit.module.log("late", 1)

    says = r"log\(\) is called in forward or loss.*In a callback, call fit.log"
    with pytest.raises(ValueError, match=says):
        make_fit(Regressor(), regression_rows(4), max_steps=1, callbacks=[Late()]).train()
    with pytest.raises(ValueError, match=says):
        Regressor().log("early", 1)


def test_what_a_log_has_by_itself_is_reserved(make_fit: MakeFit) -> None:
    class Counted(Tagger):
        main_input_name = "tokens"

    fit = make_fit(
        Counted(), ROWS, max_steps=2, logging_steps=1, max_grad_norm=1.0, include_num_input_tokens_seen="all",
        include_tokens_per_second=True, precision=FP16Mixed(initial_scale=2.0**60),
    )  # fmt: skip
    fit.train()
    assert {name for log in training_logs(fit) for name in log} <= RESERVED


@pytest.mark.parametrize("option", OF_LIGHTNING)
def test_lightnings_options_are_refused_with_ours(make_fit: MakeFit, option: str) -> None:
    with pytest.raises(TypeError, match=re.escape(f"log('x', ...): {option}=: {OF_LIGHTNING[option]}")):
        make_fit(log_as("x", 1, **{option: True})(), regression_rows(4), max_steps=1).train()


# A module's own names.


class OwnMethod(Regressor):
    def log(self, text: str) -> str:  # type: ignore[override]
        return text


class OwnLayers(Regressor):
    """Layers, a parameter, a buffer and attributes under our names."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        for name in ("log", "update_number", "epoch"):
            if kind == "layer":
                setattr(self, name, nn.Linear(1, 1))
            elif kind == "added layer":
                self.add_module(name, nn.Linear(1, 1))
            elif kind == "parameter":
                setattr(self, name, nn.Parameter(torch.ones(2)))
            elif kind == "buffer":
                self.register_buffer(name, torch.ones(2))
            else:
                setattr(self, name, 7)

    def forward(self, x: Tensor) -> Tensor:
        own = [self.log, self.update_number, self.epoch]
        total = sum(each(x[:, :1]).sum() if callable(each) else torch.as_tensor(each).sum() for each in own)
        return super().forward(x) + 0.01 * total


@pytest.mark.parametrize("kind", ["layer", "added layer", "parameter", "buffer", "attribute"])
def test_a_modules_own_names_come_first(make_fit: MakeFit, kind: str) -> None:
    module = OwnLayers(kind)
    fit = make_fit(module, regression_rows(8), max_steps=2)
    fit.train()
    own = [fit.module.log, fit.module.update_number, fit.module.epoch]
    assert all(
        isinstance(each, {"attribute": int, "buffer": Tensor}.get(kind, nn.Module | nn.Parameter)) for each in own
    )
    saved = {name.partition(".")[0] for name in fit.module.state_dict()}
    assert saved == {"hidden", "head"} | ({"log", "update_number", "epoch"} if kind != "attribute" else set())
    assert OwnMethod().log("mine") == "mine"


# The update and the epoch.


class Reading(Dropping):
    """Notes what it reads, as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, int, float]] = []

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        self.seen.append((self.training, int(self.update_number), round(float(self.epoch), 6)))
        return super().loss(outputs, batch)


def test_the_counters_are_those_of_the_state(make_fit: MakeFit, tmp_path: Path) -> None:
    def run(stop: int | None = None, resume: bool = False) -> Fit:
        fit = make_fit(
            Reading(), regression_rows(10), regression_rows(2), per_device_train_batch_size=2,
            gradient_accumulation_steps=2, num_train_epochs=2, save_strategy="steps", save_steps=1,
            eval_strategy="steps", eval_steps=3, callbacks=[StopAt(stop)] if stop else [],
        )  # fmt: skip
        assert (int(fit.module.update_number), float(fit.module.epoch)) == (0, 0.0)
        fit.train(resume_from_checkpoint=resume)
        return fit

    seen = run().module.seen
    # Two updates of two micro-batches of 2, and one of one, in each of two epochs.
    updates, epochs = [0, 0, 1, 1, 2, 3, 3, 4, 4, 5], [0, 0, 0.4, 0.4, 0.8, 1, 1, 1.4, 1.4, 1.8]
    in_training = [(True, update, epoch) for update, epoch in zip(updates, epochs, strict=True)]
    assert seen == [*in_training[:5], (False, 3, 1.0), *in_training[5:], (False, 6, 2.0)]
    run(stop=2)
    fit = run(resume=True)
    assert fit.module.seen == seen[4:]
    assert (int(fit.module.update_number), float(fit.module.epoch)) == (6, 2.0)
    assert fit.module.update_number.dtype == torch.int64 and fit.module.epoch.dtype == torch.float32
    assert {"update_number", "epoch"}.isdisjoint(fit.module.state_dict())
    assert not [name for name, _ in fit.module.named_buffers() if "norm" not in name]
    kept = copy.deepcopy(fit.module)
    fit.train()  # once more, which counts from 0
    assert (int(kept.update_number), fit.module.seen[-1][1:]) == (6, (6, 2.0))


class Fills(Callback):
    """Counts how often a tensor of one number is filled in each update."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.patches = pytest.MonkeyPatch()

    def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        fill = Tensor.fill_

        def counted(tensor: Tensor, *given: Any) -> Tensor:
            self.counts[-1] += tensor.numel() == 1
            return fill(tensor, *given)

        self.patches.setattr(Tensor, "fill_", counted)

    def on_step_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.counts.append(0)

    def on_train_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.patches.undo()


@pytest.mark.parametrize(("module", "each"), [(Dropping, 0), (Reading, 2)])
def test_counters_that_nothing_reads_cost_nothing(make_fit: MakeFit, module: type[TrainModule], each: int) -> None:
    fills = Fills()
    make_fit(module(), regression_rows(8), max_steps=4, gradient_accumulation_steps=2, callbacks=[fills]).train()
    # At the first read both are brought up to date once more.
    assert fills.counts == [2 * each, each, each, each]


class Annealed(Regressor):
    """Weighs its loss by both counters, and is compiled whole."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (1 + self.update_number)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        return super().loss(outputs, batch) * (1 + self.epoch)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, "update"])
def test_counters_are_compiled_once_and_read_anew(make_fit: MakeFit, compiled: bool | str) -> None:
    fits = []
    for arguments in ({}, {"torch_compile": compiled, "torch_compile_backend": "aot_eager"}):
        torch.compiler.reset()
        counters.clear()
        fit = make_fit(
            seeded(Annealed), regression_rows(12), max_steps=6, logging_steps=1, per_device_train_batch_size=4,
            **arguments,
        )  # fmt: skip
        fit.train()
        fits.append(fit)
    assert (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())) == (1, 0)
    for now, then in zip(*(parameters_of(fit.module).values() for fit in fits), strict=True):
        torch.testing.assert_close(now, then, atol=1e-6, rtol=1e-6)


def test_counters_keep_the_dtype_of_a_loss(make_fit: MakeFit) -> None:
    loss = torch.ones(())
    module = Annealed()
    make_fit(module, regression_rows(4))
    assert (loss * module.epoch).dtype == (loss * module.update_number).dtype == torch.float32


@pytest.mark.parametrize("name", ["log_dict", "current_epoch", "global_step"])
def test_lightnings_names_that_a_module_reads_are_warned_of(make_fit: MakeFit, name: str) -> None:
    body = f"def loss(self, outputs, batch):\n    return [self.{name} for _ in range(1)]"
    scope: dict[str, Any] = {}
    exec(body, scope)
    kind = type("Mine", (Regressor,), {"loss": scope["loss"]})
    with pytest.warns(UserWarning, match=rf"Mine reads self\.{name}: that is Lightning's name"):
        make_fit(kind(), regression_rows(2))
    own = kind()
    setattr(own, name, 3)
    make_fit(own, regression_rows(2))  # no warning, which would be an error
