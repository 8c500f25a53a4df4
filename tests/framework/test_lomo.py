"""LOMO and AdaLOMO: updates made in backward, against the same updates worked out by hand."""

import math
from typing import Any

import numpy
import pytest
import torch
from stratagem import Callback, FitArguments, TrainModule
from stratagem.framework.optim.lomo import AdaLomo, Lomo, check_update_in_backward
from stratagem.precision import get_precision
from stratagem.strategies import get_strategy
from tiny import MakeFit, Regressor, collate, logs_of, parameters_of, regression_rows
from torch import Tensor, nn


class Lomoed(Regressor):
    """The small regressor with the optimizer that the arguments name."""

    configure_optimizer = TrainModule.configure_optimizer


def by_hand(initial: dict[str, Tensor], rates: list[float], decay: float, cut: float | None = None) -> Any:
    """Gradient descent over batches of 4 rows in order; weights decay, biases don't."""
    module = Regressor()
    module.load_state_dict(initial)
    rows = regression_rows(4 * len(rates))
    for i, rate in enumerate(rates):
        batch = collate(rows[4 * i : 4 * i + 4])
        loss = nn.functional.mse_loss(module(batch["x"]), batch["y"])
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        with torch.no_grad():
            for (name, p), gradient in zip(module.named_parameters(), gradients, strict=True):
                bounded = gradient if cut is None else gradient.clamp(-cut, cut)
                p.copy_(p * (1 - rate * (0.0 if name.endswith("bias") else decay)) - rate * bounded)
    return parameters_of(module)


@pytest.mark.parametrize("cut", [None, 0.05])
def test_lomo_is_gradient_descent_at_the_scheduled_rate(make_fit: MakeFit, cut: float | None) -> None:
    module = Lomoed()
    initial = parameters_of(module)
    fit = make_fit(
        module,
        regression_rows(16),
        optim="lomo",
        optim_args={"clip_grad_value": cut},
        learning_rate=0.4,
        weight_decay=0.5,
        lr_scheduler_type="linear",
        max_steps=4,
        per_device_train_batch_size=4,
        logging_steps=1,
    )
    fit.train()
    rates = [0.4, 0.3, 0.2, 0.1]  # linear, from the peak down to 0 after the last
    assert [line["learning_rate"] for line in logs_of(fit)] == pytest.approx(rates)
    expected = by_hand(initial, rates, decay=0.5, cut=cut)
    torch.testing.assert_close(parameters_of(module), expected, rtol=1e-5, atol=1e-7)


def test_one_gradient_at_a_time_is_in_memory(make_fit: MakeFit) -> None:
    module, alive = Lomoed(), []

    class Watch(Callback):
        def on_train_begin(self, *args: Any, **context: Any) -> None:
            for p in module.parameters():  # called after the optimizer's own, which came first
                p.register_post_accumulate_grad_hook(lambda _: alive.append(count()))

        def on_pre_optimizer_step(self, *args: Any, **context: Any) -> None:
            assert count() == 0

    def count() -> int:
        return sum(p.grad is not None for p in module.parameters())

    make_fit(module, regression_rows(4), optim="adalomo", max_steps=1, callbacks=[Watch()]).train()
    assert alive == [0] * 4


def test_a_backward_outside_of_training_accumulates(make_fit: MakeFit) -> None:
    module, rows = Lomoed(), regression_rows(4)
    fit = make_fit(module, rows, optim="lomo", max_steps=1)
    fit.train()
    trained, batch = parameters_of(module), collate(rows)
    module.loss(module(batch["x"]), batch).backward()
    assert all(p.grad is not None for p in module.parameters())
    torch.testing.assert_close(parameters_of(module), trained, rtol=0, atol=0)


def test_a_second_trial_updates_once(make_fit: MakeFit) -> None:
    # Each trial asks the module for an optimizer, to know its options; only the first is the run's.
    module, rows = Lomoed(), regression_rows(8)
    options: dict[str, Any] = {"optim": "lomo", "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.4}
    fit = make_fit(module, rows, **options)
    fit.train()
    middle = parameters_of(module)
    fit.train(trial={"learning_rate": 0.2})
    expected = by_hand(middle, [0.2, 0.2], decay=0.0)
    torch.testing.assert_close(parameters_of(module), expected, rtol=1e-5, atol=1e-7)


def adalomo_by_hand(
    parameter: Any, gradients: list[Any], rates: list[float], decay: float, eps: float = 1e-30, least: float = 1e-3
) -> Any:
    """The paper's algorithm in numpy, in double precision."""
    theta, row, column, square = numpy.array(parameter, dtype=float), 0.0, 0.0, 0.0
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        g = numpy.array(gradient, dtype=float)
        beta, g2 = 1 - t**-0.8, g * g + eps
        if g.ndim == 2:
            row = beta * row + (1 - beta) * g2.mean(axis=1)
            column = beta * column + (1 - beta) * g2.mean(axis=0)
            second = numpy.outer(row, column) / numpy.mean(row)
        else:
            square = beta * square + (1 - beta) * g2
            second = square
        u = g / numpy.sqrt(second)
        u = u / max(1.0, math.sqrt((u * u).mean()))
        step = rate * max(least, math.sqrt((theta * theta).mean()))
        theta = theta * (1 - step * decay) - step * u
    return theta


@pytest.mark.parametrize("shape", [(2, 3), (5,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_adalomo_is_the_papers_algorithm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.randn(shape).to(dtype))
    gradients = [torch.randn(shape).to(dtype) for _ in range(4)]
    before, rates = parameter.detach().double().numpy().copy(), [0.4, 0.3, 0.2, 0.1]
    optimizer = AdaLomo([parameter], lr=1.0, weight_decay=0.3)
    optimizer.train()
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        (parameter * gradient).sum().backward()
        optimizer.step()
    expected = adalomo_by_hand(before, [g.double().numpy() for g in gradients], rates, 0.3)
    rtol = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    found = parameter.detach().double().numpy()
    numpy.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * abs(expected).max())


def test_adalomo_keeps_a_number_for_each_row_and_column_also_of_convolutions(make_fit: MakeFit) -> None:
    kernel = nn.Parameter(torch.randn(4, 3, 5, 2))
    optimizer = AdaLomo([kernel])
    optimizer.train()
    kernel.square().sum().backward()
    shapes = {name: tuple(value.shape) for name, value in optimizer.state[kernel].items() if name != "step"}
    assert shapes == {"row": (4, 3, 5), "column": (4, 3, 2)}


# What can't work.


@pytest.mark.parametrize("name", ["lomo", "adalomo"])
def test_clipping_and_accumulation_are_refused_together(name: str) -> None:
    with pytest.raises(ValueError, match="can't work") as caught:
        FitArguments(optim=name, gradient_accumulation_steps=2, auto_find_batch_size=True)
    said = str(caught.value)
    assert "max_grad_norm=1.0: LOMO and AdaLOMO update a parameter before the norm" in said
    assert "gradient_accumulation_steps=2: LOMO and AdaLOMO update with every backward" in said
    assert f"auto_find_batch_size=True: accumulates what a smaller batch leaves out, and optim={name!r} can't" in said


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2", "tp", "dp"])
def test_strategies_that_reduce_gradients_later_are_refused(strategy: str) -> None:
    placed = get_strategy(strategy)
    placed.precision = get_precision("32-true")
    with pytest.raises(ValueError, match=rf"consumes gradients in backward.*strategy='{strategy}'.*'single'"):
        check_update_in_backward("optim='lomo'", placed, FitArguments(max_grad_norm=0.0))


def test_loss_scaling_is_refused_at_construction(make_fit: MakeFit) -> None:
    with pytest.raises(ValueError, match=r"optim='lomo' consumes.*precision='16-mixed'.*use 'bf16-mixed'"):
        make_fit(Lomoed(), regression_rows(4), optim="lomo", precision="16-mixed")


def test_one_that_the_module_makes_is_checked_too(make_fit: MakeFit) -> None:
    class Own(Regressor):
        def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
            return Lomo(self.parameters(), lr=args.learning_rate)

    fit = make_fit(Own(), regression_rows(4), max_steps=1, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"Lomo consumes gradients in backward.*set max_grad_norm=0"):
        fit.train()
