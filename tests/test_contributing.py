"""What CONTRIBUTING.md says: one of each thing that can be added, added from outside the package, and trained with."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from stratagem import Callback, Control, Fit, FitArguments, Logger, TrainState
from stratagem.precision import PRECISIONS, register_precision
from stratagem.precision.full import Full
from stratagem.strategies import STRATEGIES, get_strategy, register_strategy
from stratagem.strategies.single import Single
from tiny import MakeFit, Regressor, parameters_of, regression_rows
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


class Scaled(Single):
    """A strategy: one device, and gradients that are half as large."""

    name = "scaled"

    def backward(self, loss: Tensor) -> None:
        super().backward(loss / 2)


class Rounded(Full):
    """A precision: parameters have whole numbers only when training begins."""

    name = "rounded"

    def convert_module(self, module: nn.Module) -> nn.Module:
        for parameter in module.parameters():
            parameter.data.round_()
        return super().convert_module(module)


@dataclass(frozen=True)
class MoreArguments(FitArguments):
    """An argument."""

    beta: float = 0.5


class Heard(Callback):
    """A callback: the argument's value at each update."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_step_end(self, args: Any, state: TrainState, control: Control, **context: Any) -> None:
        self.values.append(args.beta)


class Kept(Logger):
    """A logger: what was logged, by update."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.losses |= {step: metrics["loss"]} if "loss" in metrics else {}


OPTIMIZER = """
import torch


class Backwards(torch.optim.Optimizer):
    def __init__(self, params, lr, factor=1.0):
        super().__init__(params, {"lr": lr, "factor": factor})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.grad, alpha=group["factor"] * group["lr"])
"""


class Plain(Regressor):
    """A module with the optimizer that the arguments name."""

    def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
        return super(Regressor, self).configure_optimizer(args)


@pytest.fixture
def train(make_fit: MakeFit) -> Callable[..., tuple[Fit, dict[str, Tensor]]]:
    """Trains a module from the same weights, and gives its Fit and its weights afterwards."""

    def train(module: type[Regressor] = Regressor, **arguments: Any) -> tuple[Fit, dict[str, Tensor]]:
        torch.manual_seed(0)
        fit = make_fit(module(), regression_rows(16), **{"max_steps": 2, "logging_steps": 1, **arguments})
        fit.train()
        return fit, parameters_of(fit.module)

    return train


def moved(weights: dict[str, Tensor], begun: dict[str, Tensor]) -> Tensor:
    return torch.cat([(weights[name] - begun[name]).flatten() for name in begun])


def test_a_strategy(train: Any) -> None:
    torch.manual_seed(0)
    begun = parameters_of(Regressor())
    _, whole = train(max_steps=1)
    fit, halved = train(max_steps=1, strategy=Scaled())
    torch.testing.assert_close(moved(halved, begun) * 2, moved(whole, begun))
    assert fit.strategy.name == "scaled"


def test_a_precision(train: Any) -> None:
    fit, weights = train(precision=Rounded(), learning_rate=0.0)
    assert all(torch.equal(weight, weight.round()) for weight in weights.values())
    assert fit.strategy.precision.name == "rounded"


@pytest.fixture
def registered() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    strategies, precisions = STRATEGIES.copy(), PRECISIONS.copy()
    yield
    for table, before in ((STRATEGIES, strategies), (PRECISIONS, precisions)):
        table.clear()
        table.update(before)


@pytest.mark.usefixtures("registered")
def test_a_strategy_and_a_precision_by_their_names(train: Any, tmp_path: Path) -> None:
    assert register_strategy(Scaled) is Scaled and register_precision(Rounded) is Rounded
    fit, weights = train(strategy="scaled", precision="rounded", learning_rate=0.0, report=True)
    assert type(fit.strategy) is Scaled and type(fit.strategy.precision) is Rounded
    assert all(torch.equal(weight, weight.round()) for weight in weights.values())
    written = yaml.safe_load((tmp_path / "output" / "config.yaml").read_text())
    assert (written["strategy"], written["precision"]) == ("scaled", "rounded")
    with Fit.from_config(tmp_path / "output" / "config.yaml", Regressor(), regression_rows(16)) as again:
        assert type(again.strategy) is Scaled

    class Scaled2(Scaled):
        """What a cell of a notebook leaves that is run once more."""

        name = "scaled"

    register_strategy(Scaled2)
    assert type(get_strategy("scaled")) is Scaled2


@pytest.mark.usefixtures("registered")
def test_a_name_that_cannot_be_registered() -> None:
    class Nameless(Single):
        pass

    class Taken(Full):
        name = "bf16-mixed"

    class Alias(Full):
        name = "bf16"

    class Dotted(Single):
        name = "a.path"

    with pytest.raises(ValueError, match=r"Nameless has no name of its own .* name = 'nameless'"):
        register_strategy(Nameless)
    for kind in (Taken, Alias):
        with pytest.raises(ValueError, match=f"precision='{kind.name}' is stratagem's own"):
            register_precision(kind)
    with pytest.raises(ValueError, match="a name with a dot"):
        register_strategy(Dotted)
    with pytest.raises(TypeError, match="register_strategy takes a class that derives from Strategy"):
        register_strategy(Taken)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="Unknown strategy 'scaled'"):
        get_strategy("scaled")


def test_an_argument_and_a_callback_that_reads_it(train: Any) -> None:
    heard = Heard()
    fit, _ = train(args=MoreArguments(beta=0.25), callbacks=[heard])
    assert heard.values == [0.25, 0.25]
    assert fit.args.replace(seed=1).beta == 0.25


def test_a_logger(train: Any) -> None:
    kept = Kept()
    train(loggers=[kept])
    assert sorted(kept.losses) == [1, 2]


@pytest.mark.parametrize("by", ["class", "path"])
def test_an_optimizer(train: Any, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / f"added_by_{by}"
    package.mkdir()
    (package / "module.py").write_text(OPTIMIZER, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = f"{package.name}.module.Backwards"
    optim = path if by == "path" else import_module(f"{package.name}.module").Backwards
    fit, _ = train(Plain, optim=optim, optim_args={"factor": 2.0}, per_device_train_batch_size=16)
    assert type(fit.optimizer).__name__ == "Backwards"
    assert fit.optimizer.param_groups[0]["factor"] == 2.0
    losses = [line["loss"] for line in fit.state.log_history if "loss" in line]
    assert losses[1] > losses[0]  # it goes up


def test_the_files_that_contributing_names_exist() -> None:
    named = set(re.findall(r"`([\w./]+/|[\w./]+\.(?:py|md|txt))[` ]", CONTRIBUTING))
    assert {"strategies/registry.py", "precision/", "framework/loggers/__init__.py"} <= named
    assert not [name for name in named if not (ROOT / name).exists()]
    optimizers = [path for path in (ROOT / "framework").rglob("optimizers.py") if "OPTIMIZERS" in path.read_text()]
    assert len(optimizers) == 1


def test_contributing_is_one_page() -> None:
    assert len(CONTRIBUTING.splitlines()) <= 60
