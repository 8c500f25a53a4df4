"""transformers and peft models on ranks: the curve and the saved directory are one process's."""

import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from language_models import make, text_rows
from ranks import Ranks
from safetensors.torch import load_file
from stratagem import Fit
from training import curves, make_fit

OPTIONS: dict[str, Any] = {"max_steps": 5, "learning_rate": 0.02, "max_grad_norm": 0.1}
SAMPLES = 21  # updates of 8, 8 and 5

pytestmark = pytest.mark.slow


def fit_of(kind: str, strategy: str, seed: int = 0, **arguments: Any) -> Fit:
    """A Fit with 8 samples an update, by two micro-batches of each data-parallel rank."""
    sharing = 1 if strategy in ("single", "tp") else int(os.environ["WORLD_SIZE"])
    batches = {"per_device_train_batch_size": 4 // sharing, "gradient_accumulation_steps": 2}
    defaults = {**OPTIONS, **batches, "per_device_eval_batch_size": 4}
    rows = text_rows(SAMPLES, kind)
    return make_fit(make(kind, seed), rows, rows, strategy=strategy, **{**defaults, **arguments})


def train_all(kinds: list[str], directory: str, strategy: str, **arguments: Any) -> dict[str, Any]:
    """Train and save each kind; the curves and evaluation losses by kind."""
    found = {}
    for kind in kinds:
        # Every rank but the first begins with other weights, which must not matter.
        fit = fit_of(kind, strategy, seed=int(os.environ.get("RANK", "0")), **arguments)
        fit.train()
        evaluated = fit.evaluate()["eval_loss"]
        fit.save_pretrained(f"{directory}/{kind}")
        found[kind] = {**curves(fit), "eval_loss": evaluated}
    return found


@cache
def single(kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """One process's curves, and the weights in its directory."""
    with TemporaryDirectory() as directory:
        return train_all([kind], directory, "single")[kind], weights_in(Path(directory) / kind)


def weights_in(directory: Path) -> dict[str, torch.Tensor]:
    [file] = directory.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(
    ("strategy", "kinds"),
    [
        ("ddp", ["tied llama", "masked bert", "classifying bert", "lora", "qlora"]),
        ("fsdp1", ["tied llama", "masked bert", "classifying bert", "lora", "qlora in float32", "soft prompt"]),
        ("fsdp2", ["tied llama", "masked bert", "classifying bert", "lora", "qlora", "soft prompt"]),
        ("tp", ["llama", "tied llama"]),
    ],
)
def test_curves_and_directories(ranks: dict[int, Ranks], tmp_path: Path, strategy: str, kinds: list[str]) -> None:
    results = ranks[2].run(train_all, kinds=kinds, directory=str(tmp_path), strategy=strategy)
    assert results[0] == results[1]
    for kind, found in results[0].items():
        expected, expected_weights = single(kind)
        for name in ("loss", "grad_norm", "eval_loss"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), (kind, name)
        weights = weights_in(tmp_path / kind)
        assert weights.keys() == expected_weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected_weights[name], rtol=1e-3, atol=1e-3, msg=f"{kind}: {name}")
        loaded = load(kind, tmp_path / kind)
        for name, value in loaded.items():
            assert torch.equal(value, weights[name]), (kind, name)


def load(kind: str, directory: Path) -> dict[str, torch.Tensor]:
    """What ``from_pretrained`` makes of a directory, under the names in its file."""
    model: Any = make(kind)
    if not hasattr(model, "peft_config"):
        loaded = model.wraps.from_pretrained(directory).state_dict()
        return {name: value for name, value in loaded.items() if name in weights_in(directory)}
    from peft import PeftModel, get_peft_model_state_dict

    base = model.unload() if "lora" in kind else model.get_base_model()
    return get_peft_model_state_dict(PeftModel.from_pretrained(base, directory))


def test_a_loss_within_forward_stays_in_float32(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    # BERT computes its loss in the logits' dtype. Numbers of bfloat16 between 4 and 8 are 1/32 apart.
    frozen = {"precision": "bf16-mixed", "learning_rate": 0.0}
    expected = train_all(["masked bert"], str(tmp_path), "single", **frozen)["masked bert"]
    for strategy in ("fsdp1", "fsdp2"):
        kinds = ["masked bert"]
        found = ranks[2].run(train_all, kinds=kinds, directory=str(tmp_path), strategy=strategy, **frozen)
        assert found[0]["masked bert"]["loss"] == pytest.approx(expected["loss"], abs=1e-3)


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_recomputed_blocks_give_the_same_curve(ranks: dict[int, Ranks], tmp_path: Path, strategy: str) -> None:
    found = ranks[2].run(
        train_all,
        kinds=["tied llama", "lora"],
        directory=str(tmp_path),
        strategy=strategy,
        gradient_checkpointing=True,
    )
    for kind, logs in found[0].items():
        assert logs["loss"] == pytest.approx(single(kind)[0]["loss"], rel=1e-4)


def resume_adapters(kind: str, strategy: str, directory: str) -> bool:
    """Whether a run that was saved half way and continued ends with the bits of one that wasn't."""
    saves = {"save_strategy": "steps", "save_steps": 3, "save_only_trainable": True, "max_steps": 6}
    whole = fit_of(kind, strategy, output_dir=f"{directory}/{kind}", **saves)
    whole.train()
    whole.export(f"{directory}/{kind}.safetensors")
    resumed = fit_of(kind, strategy, output_dir=f"{directory}/{kind} resumed", **saves)
    resumed.train(resume_from_checkpoint=f"{directory}/{kind}/checkpoint-3")
    resumed.export(f"{directory}/{kind} resumed.safetensors")
    whole.strategy.barrier()
    expected, found = load_file(f"{directory}/{kind}.safetensors"), load_file(f"{directory}/{kind} resumed.safetensors")
    assert len(expected) == 8
    return expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("strategy", "kind"), [("fsdp1", "lora"), ("fsdp1", "qlora in float32"), ("fsdp2", "lora"), ("fsdp2", "qlora")]
)
def test_a_resume_from_adapters_alone_is_bitwise(
    ranks: dict[int, Ranks], tmp_path: Path, strategy: str, kind: str
) -> None:
    assert ranks[2].run(resume_adapters, kind=kind, strategy=strategy, directory=str(tmp_path)) == [True, True]
    # Another strategy continues it too, and recognises the frozen weights.
    checkpoint = tmp_path / kind / "checkpoint-3"
    fit = fit_of(kind, "single", output_dir=str(tmp_path / "single"), save_only_trainable=True, max_steps=6)
    fit.train(resume_from_checkpoint=checkpoint)
    fit.export(tmp_path / "single.safetensors")
    expected = load_file(tmp_path / f"{kind}.safetensors")
    for name, weight in load_file(tmp_path / "single.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)


def refusals(strategy: str, cases: list[tuple[str, str]]) -> list[str]:
    """What a run says of each (kind, precision)."""
    said = []
    for kind, precision in cases:
        try:
            fit_of(kind, strategy, precision=precision).train()
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


def test_combinations_that_cannot_work_are_refused_by_name(ranks: dict[int, Ranks]) -> None:
    cases = {
        ("fsdp1", "qlora", "32-true"): (
            "which is stored in torch.uint8: it lays all parameters of a block end to end, which takes one dtype, and "
            "the others are torch.float32. Quantize with quant_storage=torch.uint8 and use strategy='fsdp2', or with "
            "quant_storage=torch.float32."
        ),
        ("fsdp1", "qlora in bfloat16", "bf16-mixed"): "quant_storage=torch.float32 and use precision='32-true'.",
        ("fsdp1", "qlora in float32", "bf16-mixed"): "casts floating-point parameters to torch.bfloat16",
        (
            "fsdp2",
            "qlora in float32",
            "bf16-mixed",
        ): "would scramble its codes. Quantize with quant_storage=torch.uint8.",
        ("fsdp2", "qlora", "bf16-mixed"): "nothing",
        ("fsdp2", "qlora in bfloat16", "bf16-mixed"): "nothing",
        ("tp", "lora", "32-true"): "no adapters around them and no quantized ones. Use strategy='fsdp2'",
        ("tp", "qlora", "32-true"): "no adapters around them and no quantized ones. Use strategy='fsdp2'",
    }
    for strategy in ("fsdp1", "fsdp2", "tp"):
        asked = [(kind, precision) for name, kind, precision in cases if name == strategy]
        said = ranks[2].run(refusals, strategy=strategy, cases=asked)[0]
        for (kind, precision), text in zip(asked, said, strict=True):
            assert cases[strategy, kind, precision] in text, (strategy, kind, precision, text)
