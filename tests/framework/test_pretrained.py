"""Models wrapped by their directory: equal to from_pretrained to the bit, refused by name where files don't fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import CLASSES, bert_options, classifying_bert, llama, text_rows, with_adapters
from pretrained_models import MODELS, loaded, save
from safetensors.torch import load_file, save_file
from stratagem import TrainModule
from tiny import MakeFit
from torch import Tensor, nn


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where each model lies; it is written when a test first asks for it."""
    directory, paths = tmp_path_factory.mktemp("models"), dict[str, Path]()

    def find(name: str) -> Path:
        if name not in paths:
            paths[name] = save(name, directory)
        return paths[name]

    return find


def copied(path: Path, to: Path, change: Callable[[dict[str, Tensor]], None], **config: Any) -> Path:
    """A model's directory whose tensors and configuration were changed."""
    to.mkdir()
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors")
    (to / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | config))
    return to


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters under each name, and all buffers."""
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", MODELS)
def test_a_directory_is_what_from_pretrained_loads(
    make_fit: MakeFit, saved: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    ours, theirs = TrainModule.wrap(saved(name)), TrainModule.wrap(loaded(saved(name)))
    assert all(parameter.is_meta for parameter in ours.parameters())
    assert ours.causal == theirs.causal and type(ours).__name__ == type(theirs).__name__
    fits = [make_fit(module) for module in (ours, theirs)]
    for fit in fits:
        fit.place()
    assert_equal(tensors_of(ours), tensors_of(theirs))
    fits[0].save_pretrained(tmp_path / "again")
    assert_equal(tensors_of(loaded(tmp_path / "again")), tensors_of(loaded(saved(name))))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_directory_in_16_bits_keeps_its_numbers(make_fit: MakeFit, name: str, tmp_path: Path) -> None:
    """Its rotary frequencies and other buffers are those that from_pretrained computes."""
    path = save(name, tmp_path, torch.bfloat16)
    for dtype in (None, torch.float16):
        ours = TrainModule.wrap(path, dtype=dtype)
        theirs = TrainModule.wrap(type(loaded(path)).from_pretrained(path, dtype=dtype or "auto"))
        assert ours.config.dtype == theirs.config.dtype == (dtype or torch.bfloat16)
        for module in (ours, theirs):
            make_fit(module).place()
        assert_equal(tensors_of(ours), tensors_of(theirs))


def test_it_trains_as_the_loaded_model_does(make_fit: MakeFit, saved: Callable[[str], Path]) -> None:
    losses = []
    for module in (TrainModule.wrap(saved("llama")), TrainModule.wrap(loaded(saved("llama")))):
        fit = make_fit(module, text_rows(8), max_steps=3, learning_rate=0.01)
        losses.append(fit.train().training_loss)
    assert losses[0] == losses[1]


def test_adapters_are_put_on_a_base_that_has_no_memory(
    make_fit: MakeFit, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    module = TrainModule.wrap(lambda: with_adapters(llama()), weights=saved("llama"))
    adapters = {name: p for name, p in module.named_parameters() if not p.is_meta}
    assert len(adapters) == 8 and all("lora_" in name for name in adapters)
    assert all(p.any() == ("lora_A" in name) for name, p in adapters.items())
    fit = make_fit(module, text_rows(8), max_steps=2, learning_rate=0.05, save_only_trainable=True)
    fit.train()
    fit.save_pretrained(tmp_path / "adapters")
    again: Any = PeftModel.from_pretrained(loaded(saved("llama")), tmp_path / "adapters")
    assert_equal(tensors_of(again), tensors_of(module))
    # A layer that peft copies is read into both.
    config = LoraConfig(target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    module = TrainModule.wrap(lambda: get_peft_model(classifying_bert(), config), weights=saved("classifying bert"))
    make_fit(module).place()
    names = [name for name, _ in module.named_parameters() if name.endswith("classifier.weight")]
    weights = [p for name, p in module.named_parameters() if "classifier" in name and name.endswith("weight")]
    expected = load_file(saved("classifying bert") / "model.safetensors")["classifier.weight"]
    assert len(weights) == 2 and all(torch.equal(weight, expected) for weight in weights), names


def test_adapters_that_need_the_base_are_refused(saved: Callable[[str], Path]) -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    def adapted(config: Any) -> TrainModule:
        return TrainModule.wrap(lambda: get_peft_model(llama(), config), weights=saved("llama"))

    lora: dict[str, Any] = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    with pytest.raises(ValueError, match="'default' has use_dora=True"):
        adapted(LoraConfig(**lora, use_dora=True))
    with pytest.raises(ValueError, match="type PROMPT_TUNING"):
        adapted(PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))


def test_another_head_is_initialised_and_said(
    make_fit: MakeFit, saved: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    path = saved("masked bert")
    kept = TrainModule.wrap(classifying_bert, weights=path, new_layers=["bert.pooler"])
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense\.weight, bert\.pooler\.dense\.bias of the model, which"):
        TrainModule.wrap(classifying_bert, weights=path)  # the base model itself lacks a layer
    make_fit(kept).place()
    said = capfd.readouterr().err
    assert "bert.pooler.dense, classifier not in the files and initialised; cls.predictions" in said
    assert said.count("\n") == 1
    tensors = tensors_of(kept)
    assert torch.equal(tensors["classifier.bias"], torch.zeros(CLASSES))
    assert 0.01 < tensors["classifier.weight"].std() < 0.03  # the configuration's 0.02
    expected = load_file(path / "model.safetensors")
    assert all(torch.equal(tensor, expected[n]) for n, tensor in tensors.items() if n in expected)


def test_a_layer_begins_anew_where_it_is_asked_for(make_fit: MakeFit, saved: Callable[[str], Path]) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    def more_classes() -> Any:
        return BertForSequenceClassification(BertConfig(**bert_options(), num_labels=CLASSES + 1))

    with pytest.raises(ValueError, match=r"classifier.weight has the shape \(4, 32\) in the model and \(3, 32\)"):
        TrainModule.wrap(more_classes, weights=saved("classifying bert"))
    module = TrainModule.wrap(more_classes, weights=saved("classifying bert"), new_layers=["classifier"])
    make_fit(module).place()
    assert module.get_parameter("classifier.weight").shape == (4, 32)


def test_a_model_from_nothing_has_its_own_initial_values(make_fit: MakeFit) -> None:
    """GPT-2 draws the projections that add to the sum of the blocks smaller, by a rule of the layer around them."""
    module: Any = TrainModule.wrap(MODELS["gpt2"])
    make_fit(module).place()
    block = module.transformer.h[0]
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4**0.5, rel=0.1)
    assert block.ln_1.weight.eq(1).all() and block.mlp.c_fc.bias.eq(0).all()


def drop_norm(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.input_layernorm.weight"]


def add_layer(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.input_layernorm.weight"] = torch.ones(32)


def cut_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:60].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_norm, r"model\.layers\.1\.input_layernorm\.weight of the model, which the files don't hold"),
        (add_layer, r"model\.layers\.2\.input_layernorm\.weight of the files, which the model has no place for"),
        (cut_head, r"lm_head\.weight has the shape \(64, 32\) in the model and \(60, 32\) in the files"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    saved: Callable[[str], Path], tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrainModule.wrap(copied(saved("llama"), tmp_path / "changed", change))


def test_tied_weights_may_be_stored_twice_if_they_are_equal(
    make_fit: MakeFit, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    def store_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def store_another(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    for change in (store_head, rename):
        module: Any = TrainModule.wrap(copied(saved("tied llama"), tmp_path / change.__name__, change))
        make_fit(module).place()
        assert module.lm_head.weight is module.model.embed_tokens.weight
        assert torch.equal(module.lm_head.weight, loaded(saved("tied llama")).lm_head.weight)
    differing = TrainModule.wrap(copied(saved("tied llama"), tmp_path / "differing", store_another))
    with pytest.raises(ValueError, match=r"lm_head\.weight .* different numbers"):
        make_fit(differing).place()


def test_arguments_that_cannot_work_are_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    path = saved("llama")
    with pytest.raises(ValueError, match="no directory 'nobody/nothing', and the cache of huggingface_hub has no"):
        TrainModule.wrap("nobody/nothing")
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        (tmp_path / "config.json").write_text((path / "config.json").read_text())
        TrainModule.wrap(tmp_path)
    with pytest.raises(ValueError, match="is quantized"):
        quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        TrainModule.wrap(copied(path, tmp_path / "q", lambda tensors: None, quantization_config=quantized))
    with pytest.raises(ValueError, match="calls from_pretrained"):
        TrainModule.wrap(lambda: loaded(path), weights=path)
    with pytest.raises(ValueError, match="names two directories"):
        TrainModule.wrap(path, weights=path)
    with pytest.raises(ValueError, match="which is made"):
        TrainModule.wrap(nn.Linear(1, 1), weights=path)
    with pytest.raises(ValueError, match="has no effect on what the function makes"):
        TrainModule.wrap(llama, weights=path, dtype=torch.float16)
    with pytest.raises(TypeError, match="Received: 5"):
        TrainModule.wrap(5)  # type: ignore[arg-type]


def test_the_cache_of_the_hub_is_read(
    make_fit: MakeFit, saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    model = tmp_path / "models--someone--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("a" * 40)
    (model / "snapshots").mkdir()
    (model / "snapshots" / ("a" * 40)).symlink_to(saved("llama"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    module = TrainModule.wrap("someone/tiny")
    make_fit(module).place()
    assert_equal(tensors_of(module), tensors_of(loaded(saved("llama"))))
