"""Ready plans of tensor parallelism: a model that has one trains as on one device, and no other model is cut by it."""

import os
from functools import cache
from typing import Any

import pytest
import torch
from language_models import text_rows
from ranks import Ranks
from stratagem import Fit, TrainModule
from stratagem.strategies.plans.ready_plans import TESTED_DECODERS, TESTED_HEADS
from torch import Tensor
from training import curves, make_fit

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE, PATCHES = 63, 4  # the token that stands for a patch of a picture, and how many each has

KINDS = [name.removesuffix("ForCausalLM") for name in sorted(TESTED_HEADS) if name.endswith("ForCausalLM")]
QUICK = ("Qwen3", "Gemma3")  # run without -m slow, too
HALVED = {"num_key_value_heads": 2}


def decoder(kind: str, **options: Any) -> Any:
    """A causal model of transformers."""
    import transformers

    config = getattr(transformers, f"{'Gemma3Text' if kind == 'Gemma3' else kind}Config")
    return getattr(transformers, f"{kind}ForCausalLM")(config(**{**SIZES, **options}))


def llava() -> Any:
    """A decoder behind a vision tower whose layers bear the decoder's names."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=16)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config)


def rows(kind: str) -> list[dict[str, Tensor]]:
    """Text of unequal lengths; with a picture before each row where the model sees."""
    found = text_rows(28)
    if kind != "Llava":
        return found
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(len(found), 3, 8, 8, generator=generator)
    patches, unlabelled = torch.full((PATCHES,), IMAGE), torch.full((PATCHES,), -100)
    return [
        {
            "input_ids": torch.cat([patches, row["input_ids"] % IMAGE]),
            "attention_mask": torch.cat([torch.ones_like(patches), row["attention_mask"]]),
            "labels": torch.cat([unlabelled, row["labels"].where(row["labels"] < 0, row["labels"] % IMAGE)]),
            "pixel_values": picture,
        }
        for row, picture in zip(found, pictures, strict=True)
    ]


def fit_of(kind: str, strategy: str, sharing: int = 1, model: dict[str, Any] | None = None, **arguments: Any) -> Fit:
    """A Fit with 8 samples an update, by two micro-batches, that clips."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    module = TrainModule.wrap(llava() if kind == "Llava" else decoder(kind, **(model or {})))
    batches = {"per_device_train_batch_size": 4 // sharing, "gradient_accumulation_steps": 2}
    defaults = {"max_steps": 6, "max_grad_norm": 0.5, "optim": "sgd", "learning_rate": 0.05, **batches}
    return make_fit(module, rows(kind), strategy=strategy, **{**defaults, **arguments})


def train(kinds: list[str], strategy: str, **arguments: Any) -> dict[str, Any]:
    """The curves by kind."""
    found = {}
    for kind in kinds:
        fit = fit_of(kind, strategy, **arguments)
        fit.train()
        found[kind] = curves(fit)
    return found


@cache
def single(kind: str, heads: int = 4) -> dict[str, Any]:
    return train([kind], "single", model={"num_key_value_heads": heads})[kind]


def check(found: list[dict[str, Any]], heads: int = 4) -> None:
    assert found == [found[0]] * len(found)
    for kind, logs in found[0].items():
        expected = single(kind, heads)
        assert len(logs["loss"]) == 6
        assert logs["loss"] == pytest.approx(expected["loss"], rel=1e-5), kind
        assert logs["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5), kind


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in (*KINDS, "Llava")]
)
def test_losses_and_norms_are_one_devices(ranks: dict[int, Ranks], kind: str) -> None:
    check(ranks[2].run(train, kinds=[kind], strategy="tp"))


@pytest.mark.slow
def test_on_a_mesh_and_with_as_many_ranks_as_heads(ranks: dict[int, Ranks]) -> None:
    kinds = ["Llama", "Qwen3", "Gemma3", "Llava"]
    check(ranks[4].run(train, kinds=kinds, strategy="fsdp2", options={"tensor_parallel": 2}, sharing=2))
    check(ranks[4].run(train, kinds=kinds, strategy="tp"))
    check(ranks[2].run(train, kinds=["Qwen3"], strategy="tp", model=HALVED), heads=2)


def refusals(cases: list[tuple[str, dict[str, Any]]], strategy: str) -> list[str]:
    """What constructing a Fit says to each (kind, options of the model)."""
    said = []
    for kind, model in cases:
        try:
            fit_of(kind, strategy, model=model)
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


def test_models_without_a_tested_plan_are_refused_at_construction(ranks: dict[int, Ranks]) -> None:
    cases = [("Olmo2", {}), ("Phi3", {}), ("Qwen3", HALVED)]
    found = ranks[4].run(refusals, cases=cases, strategy="tp")
    assert found == [found[0]] * 4
    olmo2, phi3, qwen3 = found[0]
    assert "Olmo2ForCausalLM is none of them" in olmo2  # its norms are over all heads, which no rank has
    assert '"*layers.*.self_attn.q_proj": "colwise",' in olmo2
    assert "Phi3ForCausalLM is none of them" in phi3  # it has one layer for queries, keys and values
    assert "q_proj" not in phi3
    assert "num_key_value_heads=2 of Qwen3Model can't be dealt out to 4 ranks" in qwen3


def test_every_tested_head_holds_a_tested_decoder() -> None:
    for name in KINDS:
        model = decoder(name)
        assert type(model).__name__ in TESTED_HEADS
        assert type(model.model).__name__ in TESTED_DECODERS
    assert type(llava().model.language_model).__name__ in TESTED_DECODERS
    assert len(TESTED_DECODERS) == len(KINDS)
