"""Optimizers by name: they train, resume bitwise, spare norms and biases from decay, and name missing packages."""

import sys
from typing import Any

import pytest
import torch
from stratagem import FitArguments, TrainModule
from stratagem.framework.optimizers import OPTIMIZERS, make_optimizer, undecayed_names
from tiny import CLASSES, MakeFit, parameters_of, token_rows
from torch import Tensor, nn

PACKAGES = {
    "lion": ("lion_pytorch", "lion-pytorch"),
    "adamw_8bit": ("bitsandbytes.optim", "bitsandbytes"),
    "schedule_free_adamw": ("schedulefree", "schedulefree"),
}
OPTIONS: dict[str, dict[str, Any]] = {"adamw_8bit": {"min_8bit_size": 8}}  # else so small a model is kept in 32 bits


class Model(TrainModule):
    """An embedding, a hidden matrix, a norm and a head, with the optimizer that the arguments name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 8)
        self.hidden = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(torch.relu(self.hidden(self.embed(tokens)))))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_trains_and_resumes_bitwise(name: str, make_fit: MakeFit) -> None:
    rows, initial = token_rows(14), parameters_of(Model())

    def run(resume: Any = None) -> tuple[Any, dict[str, Tensor]]:
        module = Model()
        module.load_state_dict(initial)
        options: dict[str, Any] = {"optim": name, "learning_rate": 0.02, "max_steps": 12, "logging_steps": 1}
        options["optim_args"] = OPTIONS.get(name, {})
        fit = make_fit(module, rows, save_strategy="steps", save_steps=5, lr_scheduler_type="linear", **options)
        fit.train(resume_from_checkpoint=resume)
        return fit, parameters_of(module)

    fit, expected = run()
    losses = [line["loss"] for line in fit.state.log_history]
    assert sum(losses[-4:]) < sum(losses[:4])
    _, resumed = run(f"{fit.args.output_dir}/checkpoint-5")
    for key, value in expected.items():
        assert torch.equal(resumed[key], value), key


def test_norms_and_biases_are_not_decayed() -> None:
    module = Model()
    assert undecayed_names(module) == {"hidden.bias", "norm.weight", "norm.bias", "head.bias"}
    optimizer = make_optimizer(module, FitArguments(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for key, parameter in module.named_parameters():
        expected = 0.3 if key in ("embed.weight", "hidden.weight", "head.weight") else 0.0
        assert decay[id(parameter)] == expected, key


def test_muon_takes_hidden_matrices_alone() -> None:
    module = Model()
    optimizer: Any = make_optimizer(module, FitArguments(optim="muon"))
    muon, rest = optimizer.parts
    assert isinstance(muon, torch.optim.Muon)
    assert [p is module.hidden.weight for group in muon.param_groups for p in group["params"]] == [True]
    assert isinstance(rest, torch.optim.AdamW)
    assert sum(len(group["params"]) for group in rest.param_groups) == 6


def test_own_options_reach_the_optimizer() -> None:
    optimizer = make_optimizer(Model(), FitArguments(optim="sgd", optim_args={"momentum": 0.9, "nesterov": True}))
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert optimizer.param_groups[0]["nesterov"] is True


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, distribution = PACKAGES[name]
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    expected = rf"{name}.*{distribution}, which isn't installed.*pip install {distribution} .*stratagem\[optimizers\]"
    with pytest.raises(ValueError, match=expected):
        make_optimizer(Model(), FitArguments(optim=name))


def test_8_bit_adamw_keeps_its_moments_in_8_bits(make_fit: MakeFit) -> None:
    options: dict[str, Any] = {"optim": "adamw_8bit", "optim_args": {"min_8bit_size": 64}, "max_steps": 1}
    fit = make_fit(Model(), token_rows(4), **options)
    fit.train()
    state = fit.strategy.optimizer_state()
    kinds = {name: entries["state1"].dtype for name, entries in state.items()}
    assert kinds["hidden.weight"] == torch.uint8  # 64 numbers
    assert kinds["hidden.bias"] == torch.float32  # 8


def test_an_unknown_name_is_suggested() -> None:
    with pytest.raises(ValueError, match="Did you mean 'adamw'"):
        FitArguments(optim="adamww")
