"""Options of the optimizer by parameter name: a hand-made optimizer's numbers, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback, FitArguments, TrainModule, Turn, frozen
from stratagem.framework.optim.optimizers import make_optimizer
from tiny import MakeFit
from torch import Tensor, nn

BY_NAME = {
    "embed*": {"learning_rate": 1e-2, "weight_decay": 0.0},
    "blocks.0.*": {"learning_rate_scale": 0.5, "weight_decay": 0.3, "betas": [0.8, 0.9]},
    "blocks.*": {"learning_rate_scale": 0.1},
}


class Model(TrainModule):
    """Blocks, an embedding whose weight the head shares, a part that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.mix = nn.Linear(6, 6).requires_grad_(False)
        self.last = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.mix(self.embed(tokens))
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.last(x))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), batch["tokens"].flatten())


def rows(count: int = 40) -> list[dict[str, Tensor]]:
    return [{"tokens": torch.randint(7, (4,), generator=torch.Generator().manual_seed(i))} for i in range(count)]


def hand_made(model: nn.Module, rate: float, decay: float) -> torch.optim.Optimizer:
    """The groups that BY_NAME asks for, written out."""
    named: dict[str, Any] = dict(model.named_parameters())

    def those(*names: str) -> list[Any]:
        return [named[name] for name in names]

    first, others = "blocks.0", ("blocks.1", "blocks.2")
    groups = [
        {"params": those("last.weight"), "weight_decay": decay},
        {"params": those("last.bias"), "weight_decay": 0.0},
        {"params": those("embed.weight"), "lr": 1e-2, "weight_decay": 0.0},
        {"params": those(f"{first}.1.weight"), "lr": rate * 0.5, "weight_decay": 0.3, "betas": (0.8, 0.9)},
        {"params": those(f"{first}.0.weight", f"{first}.0.bias", f"{first}.1.bias"), "lr": rate * 0.5,
         "weight_decay": 0.0, "betas": (0.8, 0.9)},
        {"params": those(*(f"{other}.1.weight" for other in others)), "lr": rate * 0.1, "weight_decay": decay},
        {"params": those(*(f"{other}.{n}" for other in others for n in ("0.weight", "0.bias", "1.bias"))),
         "lr": rate * 0.1, "weight_decay": 0.0},
    ]  # fmt: skip
    return torch.optim.AdamW(groups, lr=rate, fused=True)


def test_it_is_an_optimizer_with_groups_by_hand_to_the_bit(make_fit: MakeFit) -> None:
    torch.manual_seed(1)
    model, rate, updates, batch = Model(), 1e-3, 5, 8
    torch.manual_seed(1)
    reference = Model()
    optimizer = hand_made(reference, rate, 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0 - update / updates)
    tokens = torch.stack([row["tokens"] for row in rows()])
    for part in tokens.split(batch):
        reference.loss(reference(part), {"tokens": part}).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    fit = make_fit(
        model, rows(), max_steps=updates, learning_rate=rate, weight_decay=0.1, parameter_options=BY_NAME,
        per_device_train_batch_size=batch, max_grad_norm=0.0, lr_scheduler_type="linear", logging_steps=1,
    )  # fmt: skip
    fit.train()
    for (name, weight), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(weight, expected), name
    found = fit.optimizer.param_groups
    assert [len(group["params"]) for group in found] == [1, 1, 1, 1, 3, 2, 6]
    assert [group["initial_lr"] for group in found] == [
        rate,
        rate,
        1e-2,
        rate * 0.5,
        rate * 0.5,
        rate * 0.1,
        rate * 0.1,
    ]
    rates = [log["learning_rate"] for log in fit.state.log_history if "loss" in log]
    assert rates[0] == pytest.approx(rate)  # that of the run, not of a pattern


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": {"learning_rate": 1.0}}, r"'head' matches none. Did you mean 'head\.\*'\?"),
        ({"heads.*": {"learning_rate": 1.0}}, r"'heads\.\*' matches none. Did you mean 'head"),
        ({"mix.*": {"learning_rate": 1.0}}, r"'mix\.\*' matches frozen parameters alone"),
        (
            {"blocks.*": {"learning_rate": 1.0}, "blocks.0.*": {"learning_rate": 2.0}, "no*": {"learning_rate": 1.0}},
            r"(?s)'blocks\.0\.\*' has no effect: .*'blocks\.\*' before it.*'no\*' matches none",
        ),
        ({"*bias": {"weight_decay": 0.1}}, r"'\*bias' has no effect: it matches norms and biases alone"),
        ({"embed*": {"momentum": 0.9}}, r"'embed\*': AdamW.* has no option 'momentum'.*betas"),
        ({"embed*": {"fused": True}}, r"'embed\*': AdamW.* has no option 'fused'"),
        ({"embed*": {"betas": [1.5, 0.9]}}, r"'embed\*': AdamW can't take that: Invalid beta"),
    ],
)
def test_what_has_no_effect_is_refused_by_name(make_fit: MakeFit, options: Any, message: str) -> None:
    fit = make_fit(Model(), rows(8), max_steps=1, parameter_options=options)
    with pytest.raises(ValueError, match=message):
        fit.train()


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"learning_rate": 1.0, "learning_rate_scale": 1.0}, "give one of them"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0, which must be a number that isn't negative"),
        ({"weight_decay": "0.1"}, "weight_decay='0.1'"),
        ({"lr": 1.0}, "has lr; write learning_rate"),
        ({}, "must have options by name"),
        (3.0, "must have options by name"),
    ],
)
def test_options_that_cannot_be_are_refused_with_the_arguments(own: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"'embed\\*' .*{message}"):
        FitArguments(parameter_options={"embed*": own})


def test_a_module_that_makes_its_own_optimizer_says_where_they_go(make_fit: MakeFit) -> None:
    class Own(Model):
        def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=args.learning_rate)

    class Extended(Model):
        def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
            return super().configure_optimizer(args.replace(optim="sgd"))

    options = {"embed*": {"learning_rate": 1e-2}}
    with pytest.raises(ValueError, match=r"lr=0.01 has no effect: SGD was made with .* super\(\)\.configure_optimizer"):
        make_fit(Own(), rows(8), max_steps=1, parameter_options=options).train()
    fit = make_fit(Extended(), rows(8), max_steps=1, parameter_options=options)
    fit.train()
    assert {group["initial_lr"] for group in fit.optimizer.param_groups} == {fit.args.learning_rate, 1e-2}


def test_muon_takes_its_own_options_and_those_of_its_adamw_by_name() -> None:
    model = Model()
    options = {"blocks.*.1.weight": {"momentum": 0.5, "learning_rate": 1e-2}, "embed*": {"betas": [0.5, 0.6]}}
    optimizer = make_optimizer(model, FitArguments(optim="muon", parameter_options=options))
    assert [(type(part).__name__, len(part.param_groups)) for part in optimizer.parts] == [("Muon", 2), ("AdamW", 2)]  # type: ignore[attr-defined]
    assert [group.get("momentum") for group in optimizer.param_groups] == [0.95, 0.5, None, None]
    assert optimizer.param_groups[3]["betas"] == (0.5, 0.6)


@pytest.mark.parametrize("optim", ["lomo", "adalomo"])
def test_lomo_follows_each_groups_rate(make_fit: MakeFit, optim: str) -> None:
    model = Model()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    options = {"blocks.*": {"learning_rate": 0.0}}
    make_fit(
        model, rows(8), max_steps=1, optim=optim, max_grad_norm=0.0, parameter_options=options, learning_rate=0.1
    ).train()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert torch.equal(weight, before[name]) == name.startswith("blocks"), name


def run(make_fit: MakeFit, options: Any, **arguments: Any) -> Any:
    torch.manual_seed(1)
    fit = make_fit(
        Model(), rows(), max_steps=4, learning_rate=1e-3, per_device_train_batch_size=8, parameter_options=options,
        logging_steps=1, **arguments,
    )  # fmt: skip
    fit.train()
    return fit


@pytest.mark.parametrize("other", [{}, {"last*": {"learning_rate": 0.5}}], ids=["none", "others"])
def test_a_resume_with_others_goes_on_as_with_another_learning_rate(
    make_fit: MakeFit, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: Any
) -> None:
    whole = run(make_fit, BY_NAME, save_strategy="steps", save_steps=2)
    losses = [log["loss"] for log in whole.state.log_history if "loss" in log]
    checkpoint = str(tmp_path / "output" / "checkpoint-2")

    def resumed(**arguments: Any) -> Any:
        fit = make_fit(
            Model(), rows(), max_steps=4, learning_rate=1e-3, per_device_train_batch_size=8, logging_steps=1,
            parameter_options=other, **arguments,
        )  # fmt: skip
        fit.train(resume_from_checkpoint=checkpoint)
        return fit

    fit = resumed(output_dir=str(tmp_path / "other"))
    assert [log["loss"] for log in fit.state.log_history if "loss" in log] == losses
    assert "parameter_options is" in capsys.readouterr().err
    assert len(fit.optimizer.param_groups) == 7

    own = resumed(output_dir=str(tmp_path / "own"), resume_with="arguments")
    base = own.optimizer.param_groups[0]["lr"]
    assert {group["lr"] / base for group in own.optimizer.param_groups if base} <= {1.0, 500.0}
    assert len(own.optimizer.param_groups) == (4 if other else 2)


def test_a_run_says_its_groups_where_they_were_asked_for(make_fit: MakeFit, capsys: pytest.CaptureFixture[str]) -> None:
    make_fit(Model(), rows(8), max_steps=1, parameter_options=BY_NAME, progress=True).train()
    printed = capsys.readouterr()
    said = printed.out + printed.err
    assert "embed*: 1 tensor, learning rate 0.01, weight decay 0" in said
    assert "blocks.0.*: 1 tensor," in said and "all others: 1 tensor," in said


def test_they_come_from_a_command_line_as_json() -> None:
    made = FitArguments(parameter_options=json.dumps(BY_NAME))  # type: ignore[arg-type]
    assert made.parameter_options == BY_NAME


def peaks(fit: Any) -> list[float]:
    return sorted({group["initial_lr"] for group in fit.optimizer.param_groups})


def test_a_trial_changes_options_of_the_same_patterns(make_fit: MakeFit) -> None:
    fit = make_fit(
        Model(), rows(8), max_steps=1, learning_rate=0.5, parameter_options={"embed*": {"learning_rate": 0.1}}
    )
    fit.train()
    assert peaks(fit) == [0.1, 0.5]
    fit.train(trial={"parameter_options": {"embed*": {"learning_rate": 0.2}}})
    assert peaks(fit) == [0.2, 0.5]
    with pytest.raises(ValueError, match=r"parameter_options=.*other groups.*module_init"):
        fit.train(trial={"parameter_options": {"last*": {"learning_rate": 0.2}}})


@pytest.mark.slow
def test_a_search_may_change_patterns_and_options(make_fit: MakeFit) -> None:
    pytest.importorskip("optuna")
    seen = []

    def space(trial: Any) -> dict[str, Any]:
        pattern = trial.suggest_categorical("pattern", ["embed*", "last*"])
        return {"parameter_options": {pattern: {"learning_rate_scale": trial.suggest_float("scale", 0.1, 0.9)}}}

    class Looking(Callback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            group = context["fit"].optimizer.param_groups[-1]
            seen.append((next(iter(args.parameter_options)), len(group["params"]), group["lr"]))

    fit = make_fit(Model(), rows(8), rows(8), max_steps=1, learning_rate=1.0, callbacks=[Looking()])
    fit.hyperparameter_search(space, n_trials=6)
    assert {pattern for pattern, _, _ in seen} == {"embed*", "last*"}
    assert all(count == 1 and 0.1 <= rate <= 0.9 for _, count, rate in seen)


class Pair(TrainModule):
    """Two parts that are trained in turns, and a frozen one that both ask."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        self.other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        self.judge = frozen(nn.Linear(4, 1), precision="bf16-true")

    def turns(self) -> list[Turn]:
        return [Turn("one", self.loss_of_one, "one", optim="sgd", learning_rate=0.1),
                Turn("other", self.loss_of_other, "other")]  # fmt: skip

    def loss_of_one(self, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.one(batch["x"]), self.judge(batch["x"]))

    def loss_of_other(self, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.other(batch["x"]), self.one(batch["x"]).detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x)


def test_each_turns_optimizer_has_those_of_its_parameters(make_fit: MakeFit) -> None:
    module, data = Pair(), [{"x": torch.randn(4)} for _ in range(8)]
    judge = {name: weight.clone() for name, weight in module.judge.state_dict().items()}
    options = {"*.0.*": {"learning_rate_scale": 0.5}, "other.1.*": {"betas": [0.5, 0.6]}}
    fit = make_fit(module, data, max_steps=2, learning_rate=0.01, parameter_options=options)
    fit.train()
    one, other = (fit.placement.optimizers[name].param_groups for name in ("one", "other"))
    assert [group["initial_lr"] for group in one] == [0.1, 0.1, 0.05, 0.05]
    assert [(group["initial_lr"], group["betas"]) for group in other] == [
        *[(0.005, (0.9, 0.999))] * 2,
        *[(0.01, (0.5, 0.6))] * 2,
    ]
    assert all(torch.equal(weight, judge[name]) for name, weight in module.judge.state_dict().items())
    with pytest.raises(ValueError, match=r"'one\.1\.\*': SGD.* has no option 'betas'"):
        make_fit(Pair(), data, max_steps=1, parameter_options={"one.1.*": {"betas": [0.5, 0.6]}}).train()
