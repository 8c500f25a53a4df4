"""find_learning_rate: a curve that leads to a rate, and a run that is, to the bit, what it would have been."""

import math
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from stratagem import Callback, Fit
from stratagem.framework.search.learning_rates import LearningRates
from tiny import Dropping, MakeFit, NoisyRows, Regressor, RowStream, logs_of, parameters_of, regression_rows
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

OPTIONS: dict[str, Any] = {
    "max_steps": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "shuffle": True,
    "logging_steps": 1, "lr_scheduler_type": "linear", "warmup_steps": 2, "max_grad_norm": 1.0, "learning_rate": 0.01,
}  # fmt: skip


class Counting(Dropping):
    """Also has a buffer that isn't saved, and counts its forwards in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        self.seen += 1
        return super().forward(x)


class Heard(Callback):
    """Counts what it hears."""

    def __init__(self) -> None:
        self.updates = 0

    def on_step_end(self, *context: Any, **_: Any) -> None:
        self.updates += 1


def own_sampler(rows: Any) -> DataLoader:
    return DataLoader(rows, batch_size=4, sampler=RandomSampler(rows, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        (regression_rows(40), {}),
        (NoisyRows(40), {"precision": "16-mixed"}),
        (NoisyRows(40), {"dataloader_num_workers": 1}),
        (RowStream(regression_rows(40), shuffle=True), {"precision": "bf16-mixed"}),
        (own_sampler(regression_rows(40)), {"optim": "adagrad"}),
        (regression_rows(40), {"optim": "lion", "gradient_accumulation_steps": 1}),
        (regression_rows(40), {"auto_find_batch_size": True, "neftune_noise_alpha": None}),
        (regression_rows(40), {"module_init": lambda trial: Counting()}),
    ],
    ids=["rows", "16-mixed", "workers", "stream", "generator", "lion", "batch size", "module_init"],
)
def test_a_run_is_what_it_would_have_been(make_fit: MakeFit, data: Any, arguments: dict[str, Any]) -> None:
    def run(looks: bool) -> tuple[Fit, Any]:
        torch.manual_seed(5)
        random.seed(5)
        numpy.random.seed(5)
        for part in (getattr(data, "sampler", None),):
            if part is not None:
                part.generator.manual_seed(3)
        heard = Heard()
        module = None if "module_init" in arguments else Counting()
        fit = make_fit(module, data, callbacks=[heard], **{**OPTIONS, **arguments})  # type: ignore[arg-type]
        if looks:
            before = parameters_of(fit.module)
            found = fit.find_learning_rate(updates=12, max=0.1)
            assert len(found.rates) == 12 and not found.diverged
            assert fit.module.forwards == 0 and fit.module.seen == 0  # type: ignore[operator]
            for name, tensor in parameters_of(fit.module).items():
                assert torch.equal(tensor, before[name]), name
            assert fit.state.global_step == 0 and fit.state.log_history == [] and heard.updates == 0
        drawn = [random.random(), float(numpy.random.rand()), torch.rand(()).item()]
        fit.train()
        assert heard.updates == 8
        return fit, drawn

    (plain, drawn), (looked, drawn_after) = run(False), run(True)
    assert drawn == drawn_after
    assert logs_of(plain) == logs_of(looked)
    expected = parameters_of(plain.module)
    for name, tensor in parameters_of(looked.module).items():
        assert torch.equal(tensor, expected[name]), name
    states = [
        {
            f"{name}.{key}": value
            for name, entry in fit.strategy.optimizer_state().items()
            for key, value in entry.items()
        }
        for fit in (plain, looked)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(torch.as_tensor(states[0][key]), torch.as_tensor(states[1][key])) for key in states[0])
    assert not Path(looked.args.output_dir).exists()


def test_a_sweep_leaves_no_file_where_the_run_has_a_report(make_fit: MakeFit) -> None:
    fit = make_fit(Regressor(), regression_rows(8), report=True)
    fit.find_learning_rate(updates=12, max=0.1)
    assert not Path(fit.args.output_dir).exists()


def test_the_rates_rise_evenly_and_the_loss_is_the_one_at_each(make_fit: MakeFit) -> None:
    """Against the same sweep by hand."""
    torch.manual_seed(0)
    rows = regression_rows(40)
    fit = make_fit(Regressor(), rows, per_device_train_batch_size=8)
    by_hand = Regressor()
    by_hand.load_state_dict(fit.module.state_dict())
    found = fit.find_learning_rate(min=1e-3, max=1.0, updates=10)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=1.0)
    for update, (rate, loss) in enumerate(zip(found.rates, found.losses, strict=True)):
        assert rate == pytest.approx(1e-3 * 1000 ** (update / 9))
        batch = [rows[i % 40] for i in range(8 * update, 8 * update + 8)]
        inputs = {key: torch.stack([row[key] for row in batch]) for key in ("x", "y")}
        expected = by_hand.loss(by_hand(inputs["x"]), inputs)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        optimizer.zero_grad()
        expected.backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()


def test_groups_keep_their_ratio(make_fit: MakeFit) -> None:
    class Grouped(Regressor):
        seen: list[list[float]] = []

        def configure_optimizer(self, args: Any) -> torch.optim.Optimizer:
            head = {"params": self.head.parameters(), "lr": 3 * args.learning_rate}
            return torch.optim.SGD([{"params": self.hidden.parameters()}, head], lr=args.learning_rate)

        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
            if fit.strategy.optimizer is not None:
                self.seen.append([group["lr"] for group in fit.strategy.optimizer.param_groups])
            return super().loss(outputs, batch)

    fit = make_fit(Grouped(), regression_rows(40), learning_rate=0.5)
    fit.find_learning_rate(min=1e-3, max=1e-2, updates=10)
    assert [rates[1] for rates in Grouped.seen] == pytest.approx([3 * rates[0] for rates in Grouped.seen])
    assert Grouped.seen[0][0] == pytest.approx(1e-3) and Grouped.seen[9][0] == pytest.approx(1e-2)


def test_it_ends_where_the_loss_diverges(make_fit: MakeFit) -> None:
    fit = make_fit(Regressor(), regression_rows(40), per_device_train_batch_size=8, max_grad_norm=0.0)
    found = fit.find_learning_rate(min=1e-3, max=1e6, updates=100)
    assert found.diverged and len(found.rates) < 100
    assert found.suggestion is not None and 1e-2 < found.suggestion < 3.0
    fit.train(trial={"max_steps": 3})
    assert fit.state.global_step == 3


def test_a_suggestion_is_where_the_curve_falls_fastest() -> None:
    """A curve whose steepest place is known: half of a fall by a sigmoid around 1e-3, and a rise beyond 1e-1."""
    rates = [10 ** (-7 + 8 * i / 199) for i in range(200)]
    logs = [math.log10(rate) for rate in rates]
    losses = [3.0 - 2.0 / (1.0 + math.exp(-4.0 * (x + 3.0))) + 50.0 * max(0.0, x + 1.0) ** 2 for x in logs]
    noise = torch.Generator().manual_seed(1)
    noisy = [loss + 0.02 * torch.randn((), generator=noise).item() for loss in losses]
    for curve in (losses, noisy, [-5.0 + loss for loss in losses], [*losses[:-3], math.inf, math.nan, math.nan]):
        found = LearningRates(tuple(rates), tuple(curve), True)
        assert found.suggestion is not None
        assert abs(math.log10(found.suggestion) + 3.0) < 0.35
    assert LearningRates((1e-3, 1e-2, 1e-1, 1.0), (1.0, 1.1, 1.2, 1.3), False).suggestion is None


def test_it_draws_its_picture(tmp_path: Path) -> None:
    found = LearningRates((1e-3, 1e-2, 1e-1, 1.0), (1.0, 0.8, 0.5, math.nan), True)
    path = found.plot(tmp_path / "pictures" / "rates.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_it_comes_before_the_run(make_fit: MakeFit) -> None:
    fit = make_fit(Regressor(), regression_rows(8), regression_rows(8), max_steps=1)
    fit.evaluate()
    with pytest.raises(ValueError, match=r"placed already\. Call it before train"):
        fit.find_learning_rate()
    with pytest.raises(ValueError, match="no train_data"):
        make_fit(Regressor(), eval_data=regression_rows(8)).find_learning_rate()


@pytest.mark.parametrize(
    "options", [{"min": 0.0}, {"min": 1.0, "max": 0.1}, {"updates": 3}, {"updates": 50.0}, {"diverged": 1.0}]
)
def test_a_sweep_that_cant_be_made_is_refused(make_fit: MakeFit, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)) + "="):
        make_fit(Regressor(), regression_rows(8)).find_learning_rate(**options)


def test_what_fails_in_a_sweep_leaves_the_run_as_it_was(make_fit: MakeFit) -> None:
    class Failing(Regressor):
        fails = True

        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
            if self.fails:
                raise ZeroDivisionError
            return super().loss(outputs, batch)

    fit = make_fit(Failing(), regression_rows(8), max_steps=2)
    with pytest.raises(ZeroDivisionError):
        fit.find_learning_rate()
    Failing.fails = False
    assert fit.train().global_step == 2
