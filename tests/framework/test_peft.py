"""peft models: adapters train alone, checkpoints and exports hold them alone, and quantized base weights survive."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import llama, make, quantized, text_rows, with_adapters, with_soft_prompt
from safetensors.torch import load_file
from stratagem import Callback, TrainModule
from stratagem.framework.checkpoint import CheckpointError
from stratagem.framework.checkpoint.tensors import read_table
from tiny import Float64, MakeFit, Regressor, StopAt, collate, logs_of, parameters_of, regression_rows
from torch import Tensor, nn

ADAPTERS = 8  # A and B beside the query and value projections of two layers


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=collate(text_rows(4))["input_ids"]).logits


def dropping_lora(seed: int = 0, **options: Any) -> TrainModule:
    """With dropout, so that a resume that lost its random state shows."""
    torch.manual_seed(seed)
    return TrainModule.wrap(with_adapters(llama(**options), dropout=0.3))


def is_adapter(name: str) -> bool:
    return "lora_" in name


def test_adapters_train_alone_and_load_with_from_pretrained(make_fit: MakeFit, tmp_path: Path) -> None:
    from peft import PeftModel

    module = make("lora")
    before, start = parameters_of(module), logits_of(module)
    fit = make_fit(module, text_rows(16), max_steps=3, learning_rate=0.05)
    fit.train()
    changed = {name for name, value in parameters_of(module).items() if not torch.equal(value, before[name])}
    assert len(changed) == ADAPTERS and all(map(is_adapter, changed))
    fit.save_pretrained(tmp_path / "adapters")
    assert len(load_file(tmp_path / "adapters" / "adapter_model.safetensors")) == ADAPTERS
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapters")  # the base as make() draws it
    assert torch.equal(logits_of(loaded), logits_of(module))
    assert not torch.equal(logits_of(module), start)


def test_checkpoints_and_exports_hold_the_trainable_part_alone(make_fit: MakeFit, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_only_trainable": True}
    module = make("lora")
    fit = make_fit(module, text_rows(16), **options)
    fit.train()
    checkpoint = tmp_path / "output" / "checkpoint-2"
    names = {name for name in parameters_of(module) if is_adapter(name)}
    assert read_table(checkpoint).stored("model").keys() == names
    frozen = json.loads((checkpoint / "state.json").read_text())["frozen"]
    assert frozen.keys() == dict(module.named_parameters()).keys() - names
    # A sum over bits, worked out by another library.
    weight = module.get_input_embeddings().weight.detach().numpy()  # type: ignore[operator,union-attr]
    entry = frozen["base_model.model.model.embed_tokens.weight"]
    assert entry == {"shape": [64, 32], "dtype": "torch.float32", "sum": int(weight.view("int32").sum(dtype="int64"))}
    exported = load_file(fit.export(tmp_path / "adapters.safetensors"))
    assert exported.keys() == names
    assert all(torch.equal(value, parameters_of(module)[name]) for name, value in exported.items())


def test_a_resume_from_adapters_alone_is_bitwise(make_fit: MakeFit, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "learning_rate": 0.02,
        "shuffle": True,
        "save_only_trainable": True,
    }
    whole, first, second = dropping_lora(), dropping_lora(), dropping_lora()
    uninterrupted = make_fit(whole, text_rows(30), output_dir=str(tmp_path / "whole"), **options)
    uninterrupted.train()
    make_fit(first, text_rows(30), callbacks=[StopAt(3)], **options).train()
    with torch.no_grad():  # the adapters come from the checkpoint, the base from the module
        for name, parameter in second.named_parameters():
            if is_adapter(name):
                parameter.fill_(0.5)
    resumed = make_fit(second, text_rows(30), **options)
    assert resumed.train(resume_from_checkpoint=True).global_step == 6
    for name, value in parameters_of(whole).items():
        assert torch.equal(parameters_of(second)[name], value), name
    expected, found = uninterrupted.strategy.optimizer_state(), resumed.strategy.optimizer_state()
    assert expected.keys() == found.keys() and len(found) == ADAPTERS
    for name, entries in expected.items():
        assert all(torch.equal(found[name][key], value) for key, value in entries.items()), name


def test_other_frozen_weights_are_refused_by_name(make_fit: MakeFit, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_only_trainable": True}
    options["optim"] = "sgd"  # keeps nothing in the parameters' dtype, which changes below
    make_fit(make("lora"), text_rows(16), **options).train()
    other = make("lora")
    changed = "base_model.model.model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        other.get_parameter(changed)[0, 0] += 1e-3
    with pytest.raises(CheckpointError, match=rf"frozen ones have other values: {changed}\. Build it from the same"):
        make_fit(other, text_rows(16), **options).train(resume_from_checkpoint=True)
    wider = TrainModule.wrap(with_adapters(llama(vocab_size=66)))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight \(66, 32\) \(checkpoint: \(64, 32\)\)"):
        make_fit(wider, text_rows(16), **options).train(resume_from_checkpoint=True)
    higher = TrainModule.wrap(with_adapters(llama(), rank=2))
    with pytest.raises(CheckpointError, match=r"lora_A\.default\.weight \(2, 32\) \(checkpoint: \(4, 32\)\)"):
        make_fit(higher, text_rows(16), **options).train(resume_from_checkpoint=True)
    # In another dtype the values can't be compared; the run goes on.
    again = make_fit(make("lora"), text_rows(16), precision=Float64(), **{**options, "max_steps": 3})
    assert again.train(resume_from_checkpoint=True).global_step == 3


def test_a_checkpoint_of_everything_serves_a_run_that_saves_less(make_fit: MakeFit) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    make_fit(make("lora"), text_rows(16), max_steps=2, **options).train()
    fit = make_fit(make("lora", seed=1), text_rows(16), max_steps=4, save_only_trainable=True, **options)
    assert fit.train(resume_from_checkpoint=True).global_step == 4
    expected = parameters_of(make("lora"))
    for name, value in parameters_of(fit.module).items():
        assert is_adapter(name) or torch.equal(value, expected[name])


class Normalised(Regressor):
    """A frozen layer whose statistics move all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


def test_buffers_of_frozen_layers_are_saved(make_fit: MakeFit, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_only_trainable": True}
    make_fit(Normalised(), regression_rows(16), **options).train()
    assert set(read_table(tmp_path / "output" / "checkpoint-2").stored("model")) == {
        "hidden.weight",
        "hidden.bias",
        "head.weight",
        "head.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }


def test_the_best_adapters_come_back(make_fit: MakeFit) -> None:
    rows = text_rows(16)
    fit = make_fit(
        make("lora"),
        rows,
        rows,
        max_steps=4,
        learning_rate=30.0,  # makes it worse after the first evaluation
        optim="sgd",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        save_only_trainable=True,
    )
    fit.train()
    losses = [line["eval_loss"] for line in fit.state.log_history if "eval_loss" in line]
    assert min(losses) < losses[-1]
    assert fit.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_saving_only_what_trains_needs_something_frozen(make_fit: MakeFit) -> None:
    with pytest.raises(ValueError, match="save_only_trainable=True has no effect: Regressor has no frozen parameters"):
        make_fit(Regressor(), regression_rows(4), max_steps=1, save_only_trainable=True).train()


def test_soft_prompts_need_the_word_on_first_labels(make_fit: MakeFit, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"can't tell whether PeftModelForCausalLM predicts each row's first label"):
        TrainModule.wrap(with_soft_prompt(llama()))
    module, rows = make("soft prompt"), text_rows(12)
    before = parameters_of(module)
    fit = make_fit(
        module, rows, rows, max_steps=2, per_device_train_batch_size=3, gradient_accumulation_steps=2, optim="sgd"
    )
    # One mean over all labels, those in first place included.
    batch = collate(rows)
    logits = module(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
        :, 2:-1
    ]  # three prompts in front
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item()
    assert fit.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    fit.train()
    changed = [name for name, value in parameters_of(module).items() if not torch.equal(value, before[name])]
    assert changed == ["prompt_encoder.default.embedding.weight"]
    fit.save_pretrained(tmp_path / "prompt")
    saved = load_file(tmp_path / "prompt" / "adapter_model.safetensors")
    assert torch.equal(saved["prompt_embeddings"], parameters_of(module)[changed[0]])


# Quantized base weights.


class Dequantize(Callback):
    """Notes what the quantized weights stand for, at the beginning and at the end."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def note(self, module: nn.Module) -> None:
        from bitsandbytes.functional import dequantize_4bit

        layers = {name: layer for name, layer in module.named_modules() if hasattr(layer, "quant_state")}
        self.seen.append({name: dequantize_4bit(x.weight.data, x.weight.quant_state) for name, x in layers.items()})

    def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.note(context["fit"].module)

    on_train_end = on_train_begin


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_quantized_weights_are_neither_cast_nor_trained(
    make_fit: MakeFit, storage: torch.dtype, precision: str
) -> None:
    original = llama(64)
    weights = parameters_of(original)
    module, noted = TrainModule.wrap(with_adapters(quantized(original, storage))), Dequantize()
    fit = make_fit(
        module, text_rows(16), max_steps=3, learning_rate=0.05, precision=precision, callbacks=[noted], logging_steps=1
    )
    fit.train()
    before, after = noted.seen
    assert len(before) == 14  # seven in each of two layers
    for name, value in before.items():
        assert torch.equal(after[name], value)
        plain = weights[name.removeprefix("base_model.model.").removesuffix(".base_layer") + ".weight"]
        # Four bits come this close; scrambled ones are further off than zeros.
        assert (value - plain).abs().mean() < 0.12 * plain.abs().mean()
    first, *_, last = [line["loss"] for line in logs_of(fit)]
    assert first != last


def test_an_evaluation_leaves_quantized_layers_trainable(make_fit: MakeFit) -> None:
    rows, results = text_rows(16), []
    for evaluates in (False, True):
        fit = make_fit(make("qlora"), rows, rows, max_steps=3, learning_rate=0.05)
        if evaluates:
            fit.evaluate()
        fit.train()
        results.append({name: value for name, value in parameters_of(fit.module).items() if is_adapter(name)})
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


def test_quantized_weights_stay_out_of_checkpoints_and_exports(make_fit: MakeFit, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    fit = make_fit(make("qlora"), text_rows(16), max_steps=2, **options)
    fit.train()
    saved = read_table(tmp_path / "output" / "checkpoint-2").stored("model")
    assert not [name for name in saved if "proj" in name and not is_adapter(name)]
    assert "base_model.model.lm_head.weight" in saved  # frozen, not quantized, and not left out without being asked
    with pytest.raises(ValueError, match=r"proj\.weight'\) can't be written as plain weights.*save_only_trainable"):
        fit.export(tmp_path / "weights.safetensors")
    fit.save_pretrained(tmp_path / "adapters")
    assert len(load_file(tmp_path / "adapters" / "adapter_model.safetensors")) == ADAPTERS
    again = make_fit(make("qlora"), text_rows(16), max_steps=4, **options)
    assert again.train(resume_from_checkpoint=True).global_step == 4
    with pytest.raises(CheckpointError, match=r"other values: .*layers\.0\.self_attn\.q_proj\.base_layer\.weight"):
        make_fit(make("qlora", seed=1), text_rows(16), max_steps=4, **options).train(resume_from_checkpoint=True)
