"""Schedule-free AdamW: gradients at its training weights; evaluation, checkpoints and exports at averaged ones.

The expected weights come from the package used by hand, as its documentation says: train() to train, eval() else.
"""

from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from safetensors.torch import load_file
from stratagem import Callback, Fit, FitArguments
from stratagem.framework.optim.optimizers import make_optimizer
from tiny import MakeFit, Regressor, collate, parameters_of, regression_rows
from torch import Tensor, nn

ROWS = regression_rows(32)
HELD_OUT = regression_rows(9)[4:]


class Model(Regressor):
    def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
        return make_optimizer(self, args)


class Watch(Callback):
    """Exports and predicts in the middle, and looks at the weights that updates find."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.before: dict[int, dict[str, Tensor]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.before[state.global_step] = parameters_of(context["fit"].module)

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if state.global_step == 4:
            fit: Fit = context["fit"]
            self.predicted = fit.predict(HELD_OUT).predictions
            fit.export(self.directory / "middle.safetensors")
        if state.global_step == 8:
            self.at_end = parameters_of(context["fit"].module)

    def on_train_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.finally_ = parameters_of(context["fit"].module)


def run(make_fit: MakeFit, initial: dict[str, Tensor], resume: Any = None, **options: Any) -> Fit:
    module = Model()
    module.load_state_dict(initial)
    defaults: dict[str, Any] = {
        "optim": "schedule_free_adamw",
        "learning_rate": 0.05,
        "weight_decay": 0.1,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    fit = make_fit(module, ROWS, HELD_OUT, **{**defaults, **options})
    fit.train(resume)
    return fit


def test_weights_are_switched_where_they_are_looked_at(make_fit: MakeFit, tmp_path: Path) -> None:
    initial, watch = parameters_of(Model()), Watch(tmp_path)
    fit = run(make_fit, initial, callbacks=[watch])

    module = Regressor()
    module.load_state_dict(initial)
    weights = [p for n, p in module.named_parameters() if not n.endswith("bias")]
    biases = [p for n, p in module.named_parameters() if n.endswith("bias")]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    optimizer = schedulefree.AdamWScheduleFree(groups, lr=0.05)
    optimizer.train()
    training, averaged, losses = [parameters_of(module)], [initial], []
    held_out = collate(HELD_OUT)
    for i in range(8):
        batch = collate(ROWS[4 * i : 4 * i + 4])
        optimizer.zero_grad()
        nn.functional.mse_loss(module(batch["x"]), batch["y"]).backward()
        optimizer.step()
        training.append(parameters_of(module))
        optimizer.eval()
        averaged.append(parameters_of(module))
        with torch.no_grad():
            losses.append(float(nn.functional.mse_loss(module(held_out["x"]), held_out["y"])))
        optimizer.train()

    def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
        return all(torch.allclose(found[name], value, rtol=1e-5, atol=1e-6) for name, value in expected.items())

    assert not same(training[4], averaged[4]) and not same(training[8], averaged[8])  # else nothing is shown here
    assert all(same(watch.before[i], training[i]) for i in range(8))
    evaluated = [line["eval_loss"] for line in fit.state.log_history if "eval_loss" in line]
    assert evaluated == pytest.approx(losses[1::2], rel=1e-5)
    assert same(load_file(tmp_path / "middle.safetensors"), averaged[4])
    module.load_state_dict(averaged[4])
    torch.testing.assert_close(watch.predicted, module(held_out["x"]).detach(), rtol=1e-5, atol=1e-6)
    saved: dict[str, Tensor] = {}
    for file in (Path(fit.args.output_dir) / "checkpoint-6" / "model").iterdir():
        saved |= load_file(file)
    assert same(saved, averaged[6])
    assert same(watch.at_end, training[8]) and same(watch.finally_, averaged[8])
    assert same(parameters_of(fit.module), averaged[8])
    fit.save_checkpoint()  # after training it changes nothing
    assert same(parameters_of(fit.module), averaged[8])


@pytest.mark.parametrize("in_background", [False, True])
def test_resume_is_bitwise(make_fit: MakeFit, in_background: bool) -> None:
    initial = parameters_of(Model())
    options: dict[str, Any] = {"async_save": in_background, "save_steps": 3}
    expected = parameters_of(run(make_fit, initial, **options).module)
    resumed = run(make_fit, initial, resume=f"{make_fit(Model()).args.output_dir}/checkpoint-3", **options)
    for name, value in expected.items():
        assert torch.equal(parameters_of(resumed.module)[name], value), name


def test_the_best_checkpoints_weights_are_those_that_were_evaluated(make_fit: MakeFit) -> None:
    fit = run(make_fit, parameters_of(Model()), load_best_model_at_end=True, save_steps=2)
    assert fit.state.best_metric == pytest.approx(fit.evaluate()["eval_loss"], rel=1e-6)


def test_a_second_training_begins_anew(make_fit: MakeFit) -> None:
    initial = parameters_of(Model())
    fit = run(make_fit, initial)
    once = parameters_of(fit.module)
    fit.module.load_state_dict(initial)
    fit.train()
    for name, value in parameters_of(fit.module).items():
        assert torch.equal(value, once[name]), name
