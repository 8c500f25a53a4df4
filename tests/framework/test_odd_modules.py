"""Modules, optimizers, schedules and outputs out of the ordinary, on one device: they train, or are refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Fit, FitArguments, TrainModule
from stratagem.framework.checkpoint import CheckpointError
from stratagem.framework.run.out_of_memory import is_out_of_memory
from stratagem.precision import Precision
from stratagem.strategies import Strategy
from tiny import MakeFit, Regressor, parameters_of, regression_rows
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


def losses(fit: Fit) -> list[float]:
    """The loss of each update."""
    return [log["loss"] for log in fit.state.log_history if "loss" in log]


# Optimizers.

OPTIMIZERS = [name for name in torch.optim.__all__ if name[0].isupper() and name != "Optimizer"]
OPTIONS: dict[str, dict[str, Any]] = {
    "LBFGS": {"lr": 0.5, "max_iter": 4, "history_size": 3, "line_search_fn": "strong_wolfe"},
    "Muon": {"lr": 0.01},
    "SparseAdam": {"lr": 0.1},
}


class Brings(Regressor):
    """A regressor with any of torch's optimizers."""

    optimizer = "SGD"
    main_input_name = "x"

    def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
        made_by = getattr(torch.optim, self.optimizer)
        matrices = [p for p in self.parameters() if p.ndim == 2]
        return made_by(matrices if self.optimizer == "Muon" else self.parameters(), **OPTIONS.get(self.optimizer, {}))


class Lookup(Brings):
    """Everything it trains has sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 1, sparse=True)
        self.hidden.requires_grad_(False)
        self.head.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x[:, 0] > 0).long() + (x[:, 1] > 0).long())

    def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)(self.table.parameters(), lr=0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_of_torchs_optimizers_trains_and_resumes_to_the_bit(make_fit: MakeFit, tmp_path: Path, name: str) -> None:
    def begin(directory: str) -> Fit:
        torch.manual_seed(1)
        module = Lookup() if name == "SparseAdam" else Brings()
        module.optimizer = name
        return make_fit(
            module,
            regression_rows(48),
            max_steps=6,
            logging_steps=1,
            save_strategy="steps",
            save_steps=3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            output_dir=str(tmp_path / directory),
        )

    whole = begin("whole")
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    resumed = begin("resumed")
    resumed.train(resume_from_checkpoint=tmp_path / "whole/checkpoint-3")
    assert losses(resumed) == losses(whole)
    after = parameters_of(resumed.module)
    for key, tensor in parameters_of(whole.module).items():
        assert torch.equal(after[key], tensor), key
    again = losses(whole)
    whole.train()  # begins where it began, but for the weights
    assert len(losses(whole)) == len(again)
    assert losses(whole)[0] < again[0]


def test_sparse_adam_names_dense_gradients(make_fit: MakeFit) -> None:
    module = Brings()
    module.optimizer = "SparseAdam"
    with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
        make_fit(module, regression_rows(8), max_steps=1).train()


def test_lbfgs_makes_the_steps_that_it_makes_by_hand(make_fit: MakeFit) -> None:
    """Micro-batches of unequal size, so that the closure must weigh them."""
    rows = regression_rows(11)
    module, alone = Brings(), Brings()
    module.optimizer = "LBFGS"
    alone.load_state_dict(module.state_dict())
    optimizer = torch.optim.LBFGS(alone.parameters(), **OPTIONS["LBFGS"])
    batch = {key: torch.stack([row[key] for row in rows]) for key in ("x", "y")}
    expected = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = alone.loss(alone(batch["x"]), batch)
        loss.backward()
        return loss.detach()

    for _ in range(5):
        expected.append(float(optimizer.step(closure)))
    fit = make_fit(
        module,
        rows,
        max_steps=5,
        logging_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        include_num_input_tokens_seen="all",
    )
    fit.train()
    assert losses(fit) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < 0.5 * expected[0]
    assert fit.state.num_input_tokens_seen == 5 * 11 * 3  # each sample once, however often it was computed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_grad_norm": 1.0}, r"LBFGS evaluates the loss several times.*clipped gradient.*max_grad_norm=0"),
        ({"precision": "16-mixed"}, r"LBFGS.*'16-mixed' scales the loss.*'32-true'"),
        ({"strategy": "ddp"}, r"LBFGS.*strategy='ddp' each rank.*strategy='single'"),
    ],
)
def test_lbfgs_is_refused_where_its_loss_would_be_another(
    make_fit: MakeFit, arguments: dict[str, Any], message: str
) -> None:
    module = Brings()
    module.optimizer = "LBFGS"
    fit = make_fit(module, regression_rows(8), max_steps=1, **arguments)
    with pytest.raises(ValueError, match=message):
        fit.train()
    fit.strategy.tear_down()


class Returns(Regressor):
    """Returns whatever it is told."""

    def __init__(self, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__()
        self.make_optimizer, self.make_scheduler = optimizer, scheduler

    def configure_optimizer(self, args: FitArguments) -> Any:
        own = super().configure_optimizer(args)
        return self.make_optimizer(own) if self.make_optimizer else own

    def configure_scheduler(self, optimizer: torch.optim.Optimizer, args: FitArguments) -> Any:
        return self.make_scheduler(optimizer) if self.make_scheduler else super().configure_scheduler(optimizer, args)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda own: [own, own], r"returned a list of 2 \(SGD, SGD\)\. Several optimizers are one with a group"),
        (lambda own: ([own], []), r"returned a tuple of 2 \(list, list\).*configure_scheduler\(self, optimizer"),
        (lambda own: {"optimizer": own, "lr_scheduler": 1}, r"a dict with 'optimizer', 'lr_scheduler'.*A schedule is"),
        (lambda own: None, r"returned None\. Its last line lacks a return"),
        (lambda own: torch.optim.SGD, r"returned the class SGD\. That is a class: return SGD\(self.parameters\(\)"),
        (lambda own: "adamw", r"returned a str\. Leave the method out, and optim='adamw'"),
    ],
)
def test_configure_optimizer_says_what_to_return(make_fit: MakeFit, make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=r"Returns\.configure_optimizer must return one torch.*" + message):
        make_fit(Returns(make), regression_rows(8), max_steps=1).train()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda optimizer: None, "returned None"),
        (lambda optimizer: [LambdaLR(optimizer, lambda _: 1.0)], r"returned a list of 1 \(LambdaLR\)"),
        (lambda optimizer: {"scheduler": 1, "interval": "step"}, "returned a dict with 'scheduler', 'interval'"),
        (lambda optimizer: LambdaLR, "returned the class LambdaLR"),
        (lambda optimizer: lambda step: 1.0, "returned a function"),
    ],
)
def test_configure_scheduler_says_what_to_return(make_fit: MakeFit, make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=r"configure_scheduler must return one schedule.*" + message):
        make_fit(Returns(scheduler=make), regression_rows(8), max_steps=1).train()


# Schedules.


class Halves:
    """A schedule of nobody's: halves the rate where a metric isn't below the last."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.last, self.seen = optimizer, float("inf"), []

    def step(self, metrics: float) -> None:
        self.seen.append(metrics)
        for group in self.optimizer.param_groups:
            group["lr"] *= 1.0 if metrics < self.last else 0.5
        self.last = metrics

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last, self.seen = state["last"], state["seen"]


def greedy(optimizer: torch.optim.Optimizer) -> Any:
    """transformers' schedule that follows a metric up and down."""
    return pytest.importorskip("transformers.optimization").GreedyLR(optimizer, patience=0, factor=0.5)


@pytest.mark.parametrize("make", [Halves, greedy])
def test_a_schedule_is_known_to_wait_for_a_metric_by_its_step(make_fit: MakeFit, make: Any) -> None:
    """At a rate of 1e-9 no evaluation is better than the one before."""
    rates = []
    module = Returns(scheduler=make)
    evaluating: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1}
    fit = make_fit(module, regression_rows(16), regression_rows(8), max_steps=4, logging_steps=1, **evaluating)
    fit.train()
    rates = [log["learning_rate"] for log in fit.state.log_history if "learning_rate" in log]
    evaluations = [log["eval_loss"] for log in fit.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 4
    if make is Halves:
        assert fit.scheduler.seen == evaluations
    else:
        assert fit.scheduler.last_epoch == 4
        assert rates[-1] != rates[0]


def test_a_schedule_that_waits_for_a_metric_needs_evaluations(make_fit: MakeFit) -> None:
    message = r"Halves is stepped with the metric of an evaluation, and the run has none\. Pass eval_data="
    with pytest.raises(ValueError, match=message):
        make_fit(Returns(scheduler=Halves), regression_rows(8), max_steps=1).train()
    with pytest.raises(ValueError, match=message):  # something to evaluate on, and no word of doing so
        make_fit(Returns(scheduler=Halves), regression_rows(8), regression_rows(8), max_steps=1).train()


# Names.


def test_a_strategy_without_a_name_is_told_to_have_one() -> None:
    class Mine(Strategy):
        pass

    with pytest.raises(TypeError, match=r'Mine is a Strategy without a name.*Write name = "mine" in the class'):
        Fit(Regressor(), regression_rows(8), strategy=Mine(), progress=False)


def test_a_precision_without_a_name_is_told_to_have_one() -> None:
    class Rough(Precision):
        pass

    with pytest.raises(TypeError, match=r'Rough is a Precision without a name.*Write name = "rough" in the class'):
        Fit(Regressor(), regression_rows(8), precision=Rough(), progress=False)


# Sparse gradients.


class Words(TrainModule):
    """An embedding beside a dense layer; it looks a word up twice, so that gradients must be added up."""

    sparse = True

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3, sparse=self.sparse)
        self.head = nn.Linear(3, 1)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(words)).sum(1))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(outputs, batch["y"])

    def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=args.learning_rate)


class DenseWords(Words):
    sparse = False


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_sparse_gradients_are_clipped_as_dense_ones(make_fit: MakeFit, precision: str) -> None:
    rows = [{"words": torch.tensor([i % 6, i % 6, (i + 1) % 6]), "y": torch.tensor([i / 3.0])} for i in range(24)]
    seen = []
    for made_by in (DenseWords, Words):
        torch.manual_seed(2)
        fit = make_fit(
            made_by(), rows, max_steps=4, logging_steps=1, max_grad_norm=0.5, precision=precision,
            gradient_accumulation_steps=2, per_device_train_batch_size=3,
        )  # fmt: skip
        fit.train()
        seen.append([(log["loss"], log["grad_norm"]) for log in fit.state.log_history if "grad_norm" in log])
    for dense, sparse in zip(*seen, strict=True):
        assert sparse == pytest.approx(dense, rel=1e-6)
    assert seen[0][0][1] > 0.5


# Memory.


@pytest.mark.parametrize("said", ["CUDA out of memory.", "HIP out of memory. Tried", "NPU Out Of Memory"])
def test_a_plain_runtime_error_may_say_that_memory_is_out(said: str) -> None:
    assert is_out_of_memory(RuntimeError(said))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError(said))


# Predictions of batches of other lengths.


class Lengths(TrainModule):
    """Gives back what it is given, in several forms."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        outer = tokens[:, :, None] * tokens[:, None, :]
        return {"scores": tokens * self.scale, "pairs": outer, "seen": tokens > 0}

    def loss(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return outputs["scores"].mean()


def ragged(count: int = 5) -> list[dict[str, Tensor]]:
    """Rows of another length each."""
    return [{"tokens": torch.arange(1, i + 2), "labels": torch.arange(1, i + 2)} for i in range(count)]


@pytest.mark.parametrize("pad_index", [-100, 0])
def test_predictions_of_other_lengths_are_filled_up(make_fit: MakeFit, pad_index: int) -> None:
    seen: list[Any] = []
    fit = make_fit(
        Lengths(),
        None,
        ragged(),
        per_device_eval_batch_size=1,
        pad_index=pad_index,
        compute_metrics=lambda predictions, labels: seen.append((predictions, labels)) or {"rows": len(labels)},
    )
    assert fit.evaluate()["eval_rows"] == 5
    expected = torch.tensor([[j + 1 if j <= i else pad_index for j in range(5)] for i in range(5)])
    predictions, labels = seen[0]
    assert torch.equal(labels, expected)
    assert torch.equal(predictions["scores"], expected.float())
    assert torch.equal(predictions["seen"], expected > 0)
    assert predictions["pairs"].shape == (5, 5, 5)
    assert predictions["pairs"][1].tolist()[:2] == [[1, 2, *[pad_index] * 3], [2, 4, *[pad_index] * 3]]
    again = fit.predict(ragged()).predictions
    assert torch.equal(again["scores"], expected.float())


def test_predictions_of_other_dimensions_are_refused(make_fit: MakeFit) -> None:
    class Squeezes(Lengths):
        def forward(self, tokens: Tensor) -> Tensor:
            return (tokens if tokens.shape[1] > 1 else tokens[None]) * self.scale

        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
            return outputs.mean()

    with pytest.raises(ValueError, match=r"outputs of batches can't be joined: their shapes are .*ignore_keys"):
        make_fit(Squeezes(), None, per_device_eval_batch_size=1).predict(ragged(3))


# The default units of sharding.


class Part(nn.Module):
    """A layer of more than one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Lists(TrainModule):
    """Blocks that are lists themselves, with a norm, a layer and an activation each."""

    def __init__(self, in_dict: bool) -> None:
        super().__init__()
        parts = [(nn.LayerNorm(3), Part(), nn.Tanh()) for _ in range(3)]
        names = ("norm", "part", "act")
        self.blocks = nn.ModuleList(
            nn.ModuleDict(dict(zip(names, part, strict=True))) if in_dict else nn.ModuleList(part) for part in parts
        )
        self.projections = nn.ModuleList(nn.ModuleList([nn.Linear(3, 3)]) for _ in range(2))
        self.plain = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))


@pytest.mark.parametrize("in_dict", [False, True])
def test_default_units_are_layers_that_are_called(in_dict: bool) -> None:
    module = Lists(in_dict)
    parts = [layer for layer in module.modules() if isinstance(layer, Part)]
    projections = [inner[0] for inner in module.projections]
    assert list(module.shard_units()) == [*parts, *projections, *module.plain]


# Parameters and buffers.


class Lazy(Regressor):
    """Its first layer waits for a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.LazyLinear(4)


def test_lazy_layers_are_refused_by_name_until_they_were_called(make_fit: MakeFit) -> None:
    with pytest.raises(ValueError, match=r"lazy layers.*hidden\.weight, hidden\.bias\. Call the module once"):
        make_fit(Lazy(), regression_rows(8), max_steps=1)
    module = Lazy()
    with torch.no_grad():
        module(torch.zeros(1, 3))
    make_fit(module, regression_rows(8), max_steps=1).train()


def test_an_optimizer_over_foreign_tensors_is_refused(make_fit: MakeFit) -> None:
    foreign = nn.Parameter(torch.ones(2, 5))
    made = Returns(lambda own: torch.optim.SGD([*own.param_groups[0]["params"], foreign], lr=0.1))
    with pytest.raises(ValueError, match=r"tensors that are no parameters of the module, of the shapes \(2, 5\)"):
        make_fit(made, regression_rows(8), max_steps=1).train()


class Remembers(Regressor):
    """A buffer that forward grows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.memory = torch.cat([self.memory, x[:1]])
        return super().forward(x)


def test_a_checkpoint_names_a_buffer_that_has_grown(make_fit: MakeFit, tmp_path: Path) -> None:
    rows = regression_rows(16)
    make_fit(Remembers(), rows, max_steps=2, save_strategy="steps", save_steps=2).train()
    again = make_fit(Remembers(), rows, max_steps=4)
    message = r"of another model: of another shape: memory \(0, 3\) \(checkpoint: \(2, 3\)\)\.$"
    with pytest.raises(CheckpointError, match=message):
        again.train(resume_from_checkpoint=tmp_path / "output/checkpoint-2")
