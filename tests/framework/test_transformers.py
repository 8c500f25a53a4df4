"""transformers models through TrainModule.wrap: the loss contract, saving for from_pretrained, options, evaluation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import LENGTH, VOCABULARY, llama, make, text_rows
from safetensors.torch import load_file
from stratagem import Callback, TrainModule
from tiny import MakeFit, Regressor, collate, parameters_of
from torch import Tensor, nn

SPLITS = [(8, 1), (4, 2), (2, 4)]  # micro-batch size and accumulation of one global batch of 8
ROWS = 21  # two groups of 8 and one of 5


def sum_of_losses(kind: str, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Cross entropy by hand, summed over labels, and how many those are."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"]
    if "llama" in kind:
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = logits.reshape(-1, logits.shape[-1])
    return nn.functional.cross_entropy(flat, labels.reshape(-1), reduction="sum"), int((labels != -100).sum())


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ["llama", "tied llama", "masked bert", "classifying bert"])
def test_an_update_is_one_mean_over_all_labels(make_fit: MakeFit, kind: str, split: tuple[int, int]) -> None:
    rows, reference, module = text_rows(ROWS, kind), make(kind), make(kind)
    for start in range(0, ROWS, 8):
        total, count = sum_of_losses(kind, reference, collate(rows[start : start + 8]))
        reference.zero_grad()
        (total / count).backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.5 * (0 if parameter.grad is None else parameter.grad)
    fit = make_fit(
        module,
        rows,
        optim="sgd",
        learning_rate=0.5,
        per_device_train_batch_size=split[0],
        gradient_accumulation_steps=split[1],
        num_train_epochs=1,
    )
    assert fit.train().global_step == 3
    torch.testing.assert_close(parameters_of(module), parameters_of(reference), rtol=1e-5, atol=2e-6)


def others() -> dict[str, nn.Module]:
    """Models that get to their loss in other ways."""
    import transformers as hf

    bart = {"encoder_layers": 1, "encoder_attention_heads": 2, "decoder_layers": 1, "decoder_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    t5 = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return {
        "gpt2": hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, **ids)),
        "t5": hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=30, **t5)),
        "bart": hf.BartForCausalLM(hf.BartConfig(d_model=16, decoder_ffn_dim=8, vocab_size=30, **bart)),
    }


def test_wrap_finds_out_whether_labels_are_shifted() -> None:
    models = {kind: make(kind) for kind in ("llama", "masked bert", "classifying bert", "lora")}
    models |= {name: TrainModule.wrap(model) for name, model in others().items()}
    assert {name: model.causal for name, model in models.items()} == {
        "llama": True,
        "masked bert": False,
        "classifying bert": False,
        "lora": True,
        "gpt2": True,
        "t5": False,  # its labels are of the decoder, which is given them one to the right
        "bart": False,  # has the head of a causal model, and shifts nothing
    }
    # The proof: a first label that counts changes a loss, and one that doesn't leaves it as it is.
    for name in ("llama", "gpt2", "bart"):
        tokens = torch.arange(4)[None] + 3
        first = torch.cat([torch.full((1, 1), -100), tokens[:, 1:]], dim=1)
        losses = [models[name].eval()(input_ids=tokens, labels=labels).loss for labels in (tokens, first)]
        assert bool(losses[0] == losses[1]) is models[name].causal
    assert TrainModule.wrap(llama(), causal=False).causal is False


def test_a_method_that_a_base_class_brings_is_a_clash_too() -> None:
    class Base(nn.Module):
        def loss(self) -> str:
            return "of another meaning"

    class Model(Base):
        pass

    with pytest.raises(TypeError, match=r"can't wrap Model: it has loss of its own"):
        TrainModule.wrap(Model())


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=collate(text_rows(4))["input_ids"]).logits


@pytest.mark.parametrize("kind", ["tied llama", "masked bert", "classifying bert"])
def test_what_is_saved_loads_with_from_pretrained(make_fit: MakeFit, tmp_path: Path, kind: str) -> None:
    module = make(kind)
    fit = make_fit(module, text_rows(8, kind), max_steps=2)
    before = logits_of(module)
    fit.train()
    module.save_pretrained(tmp_path / "own")  # type: ignore[operator]
    fit.save_pretrained(tmp_path / "fit")
    # The two lines that work where the model has no save_pretrained of its own.
    fit.export(tmp_path / "export" / "model.safetensors")
    module.config.save_pretrained(tmp_path / "export")  # type: ignore[operator,union-attr]
    assert not torch.equal(logits_of(module), before)
    for name in ("own", "fit", "export"):
        loaded = module.wraps.from_pretrained(tmp_path / name)  # type: ignore[operator,union-attr]
        assert torch.equal(logits_of(loaded), logits_of(module)), name
    if kind == "tied llama":
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert "lm_head.weight" not in load_file(tmp_path / "fit" / "model.safetensors")


def test_a_module_without_save_pretrained_is_told_what_works(make_fit: MakeFit, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Regressor has no save_pretrained.*fit\.export"):
        make_fit(Regressor()).save_pretrained(tmp_path)


class CountForwards(Callback):
    """Counts the forwards of a layer within an update."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.calls = 0
        layer = context["fit"].module.model.layers[0].mlp
        layer.register_forward_pre_hook(self.count)  # recomputing ends before the last layer does

    def count(self, *_: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize("reentrant", [None, True])
def test_gradient_checkpointing_is_the_models_own(make_fit: MakeFit, reentrant: bool | None) -> None:
    plain, module, calls = make("llama"), make("llama"), CountForwards()
    options = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    make_fit(plain, text_rows(16), max_steps=2).train()
    make_fit(module, text_rows(16), max_steps=2, gradient_checkpointing=True, callbacks=[calls], **options).train()
    assert calls.calls == 4  # in each update's forward and backward
    handed = module.model.layers[0]._gradient_checkpointing_func.keywords  # type: ignore[union-attr,index]
    assert handed == {"use_reentrant": bool(reentrant)}
    torch.testing.assert_close(parameters_of(module), parameters_of(plain), rtol=0, atol=0)


def test_neftune_finds_the_input_embeddings(make_fit: MakeFit) -> None:
    module, found = make("llama"), []

    class Look(Callback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            hooked = [layer for layer in module.modules() if isinstance(layer, nn.Embedding) and layer._forward_hooks]
            noisy = hooked[0](torch.zeros(1, 1, dtype=torch.long))
            found.append((hooked, (noisy - hooked[0].weight[0]).abs().max().item()))

    make_fit(module, text_rows(8), max_steps=1, neftune_noise_alpha=5.0, callbacks=[Look()]).train()
    [(hooked, noise)] = found
    assert hooked == [module.model.embed_tokens]  # type: ignore[union-attr]
    assert 0 < noise <= 5.0 / 32**0.5  # alpha / sqrt(1 position · 32 features)
    assert not hooked[0]._forward_hooks


def test_predictions_are_logits_without_the_cache(make_fit: MakeFit) -> None:
    rows = text_rows(6)
    fit = make_fit(make("llama"), per_device_eval_batch_size=4)
    predictions = fit.predict(rows).predictions
    assert {name: value.shape for name, value in predictions.items()} == {"logits": (6, LENGTH, VOCABULARY)}
    assert list(fit.predict(rows, ignore_keys=["logits"]).predictions) == ["past_key_values"]


def test_evaluation_is_the_mean_over_all_labels(make_fit: MakeFit) -> None:
    rows, module = text_rows(11), make("llama")
    total, count = sum_of_losses("llama", module, collate(rows))
    fit = make_fit(module, eval_data=rows, per_device_eval_batch_size=4)
    assert fit.evaluate()["eval_loss"] == pytest.approx(total.item() / count, rel=1e-6)
