"""Optimizers by name: they train, resume bitwise, spare norms and biases from decay, and name missing packages."""

import sys
from typing import Any

import pytest
import torch
from stratagem import FitArguments, TrainModule
from stratagem.framework.optim.optimizers import LOW_RANK, OPTIMIZERS, PAGED, make_optimizer, undecayed_names
from tiny import CLASSES, MakeFit, logs_of, parameters_of, token_rows
from torch import Tensor, nn

PACKAGES = {
    "lion": ("lion_pytorch", "lion-pytorch"),
    "adamw_8bit": ("bitsandbytes.optim", "bitsandbytes"),
    "schedule_free_adamw": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "galore_adamw": ("galore_torch", "galore-torch"),
    "apollo_adamw": ("apollo_torch", "apollo-torch"),
}
HERE = [name for name in OPTIMIZERS if name not in PAGED or torch.cuda.is_available()]


def options_of(name: str) -> dict[str, Any]:
    """Arguments beside the optimizer's name that so small a model wants."""
    if name in LOW_RANK:  # a new projection within each part of the run
        return {"optim_target_modules": "all-linear", "optim_args": {"rank": 2, "update_proj_gap": 4}}
    # Else so few numbers are kept in 32 bits.
    return {"optim_args": {"min_8bit_size": 8}} if "8bit" in name else {}


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


@pytest.mark.parametrize("name", HERE)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # grokadamw calls torch.cuda.amp.autocast
def test_it_trains_and_resumes_bitwise(name: str, make_fit: MakeFit) -> None:
    rows, initial = token_rows(14), parameters_of(Model())

    def run(resume: Any = None) -> tuple[Any, dict[str, Tensor]]:
        module = Model()
        module.load_state_dict(initial)
        options: dict[str, Any] = {"optim": name, "learning_rate": 0.02, "max_steps": 12, "logging_steps": 1}
        options |= options_of(name)
        fit = make_fit(module, rows, save_strategy="steps", save_steps=5, lr_scheduler_type="linear", **options)
        fit.train(resume_from_checkpoint=resume)
        return fit, parameters_of(module)

    fit, expected = run()
    losses = [line["loss"] for line in logs_of(fit)]
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
        make_optimizer(Model(), FitArguments(optim=name, **options_of(name)))


def test_galore_steps_as_its_package_does() -> None:
    """Three steps of our class and of the package's own, over the same gradients."""
    from galore_torch import GaLoreAdamW

    torch.manual_seed(0)
    module, twin = Model(), Model()
    twin.load_state_dict(module.state_dict())
    args = FitArguments(optim="galore_adamw", learning_rate=0.1, **options_of("galore_adamw"))
    ours = make_optimizer(module, args)
    groups = [
        {**group, "params": [dict(twin.named_parameters())[name] for name in names]}
        for group in ours.param_groups
        for names in [[name for name, p in module.named_parameters() if any(p is q for q in group["params"])]]
    ]
    theirs = GaLoreAdamW(groups, lr=0.1, eps=1e-8, no_deprecation_warning=True)
    assert [("rank" in group, len(group["params"])) for group in groups] == [(False, 1), (False, 4), (True, 2)]
    for _ in range(6):
        for mine, other in zip(module.parameters(), twin.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        ours.step()
        theirs.step()
    for mine, other in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("all-linear", ["hidden", "head"]),
        (["hid"], ["hidden"]),
        (".*ea.", ["head"]),
        ("all_linear", ["hidden", "head"]),
    ],
)
def test_linear_layers_are_chosen_by_name(targets: Any, names: list[str]) -> None:
    module = Model()
    optimizer = make_optimizer(module, FitArguments(optim="apollo_adamw", optim_target_modules=targets))
    projected = {id(p) for group in optimizer.param_groups if "rank" in group for p in group["params"]}
    assert [name for name, layer in module.named_children() if id(getattr(layer, "weight", None)) in projected] == names


def test_no_linear_layer_of_that_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optim_target_modules=\['attn'\] names no linear layer.*hidden, head"):
        make_optimizer(Model(), FitArguments(optim="apollo_adamw", optim_target_modules=["attn"]))


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
