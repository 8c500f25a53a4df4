"""Ready plans of tensor parallelism, for the models of transformers that they were tested on."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from torch import nn

DECODER_PLAN: Mapping[str, str] = {
    "embed_tokens": "embedding",
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
"""For decoders that name their layers as transformers' Llama does. Norms on heads are found (cut_features.py)."""

LLAMA_PLAN: Mapping[str, str] = {
    **{f"*{name}": style for name, style in DECODER_PLAN.items()},
    "*lm_head": "colwise_gather",
}
"""The same for a whole model with its head: to start a ``tensor_parallel_plan()`` of your own from."""

TESTED_DECODERS = frozenset(
    (
        "LlamaModel",
        "MistralModel",
        "Qwen2Model",
        "Qwen3Model",
        "GemmaModel",
        "Gemma2Model",
        "Gemma3TextModel",
        "SmolLM3Model",
        "GraniteModel",
        "HeliumModel",
    )
)
"""Classes of transformers that DECODER_PLAN cuts: losses, gradients and weights of each were one device's."""

TESTED_HEADS = frozenset(
    (
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "SmolLM3ForCausalLM",
        "GraniteForCausalLM",
        "HeliumForCausalLM",
        "LlavaForConditionalGeneration",
    )
)
"""Classes of transformers that hold such a decoder, and whose ``lm_head`` is cut with it."""


def ready_plan(module: nn.Module, degree: int) -> dict[str, str]:
    """The plan for the tested decoders in a module, by layer name. What is around them, such as the vision tower of
    Llava, stays whole: a decoder takes whole features and gives them. Empty where there is none.

    Args:
        module: of transformers, or holds such a model.
        degree: tensor-parallel ranks.

    Raises:
        ValueError: the decoder's heads can't be dealt out to so many ranks.
    """
    plan: dict[str, str] = {}
    for name, layer in named_layers_of(module, TESTED_DECODERS):
        check_heads(layer, degree)
        plan |= {f"{name}{pattern}": style for pattern, style in DECODER_PLAN.items()}
    if plan:
        for name, layer in named_layers_of(module, TESTED_HEADS):
            if isinstance(getattr(layer, "lm_head", None), nn.Module):
                plan[f"{name}lm_head"] = "colwise_gather"
    return plan


def named_layers_of(module: nn.Module, classes: frozenset[str]) -> Iterator[tuple[str, nn.Module]]:
    """The layers of those very classes of transformers, with the beginning of their parts' names ("model.")."""
    for name, layer in module.named_modules():
        kind = type(layer)
        if kind.__name__ in classes and kind.__module__.startswith("transformers.models."):
            yield f"{name}." if name else "", layer


def check_heads(decoder: nn.Module, degree: int) -> None:
    """Refuse to cut a head in two.

    Raises:
        ValueError: names the numbers of heads.
    """
    config = decoder.config
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % degree:
            raise ValueError(
                f"Tensor parallelism deals out whole heads, and the {name}={heads} of {type(decoder).__name__} can't "
                f"be dealt out to {degree} ranks. Use a degree that divides {heads} (FSDP2(tensor_parallel=...) shards "
                "over the other ranks), or strategy='fsdp2'."
            )


def refusal(module: nn.Module) -> str:
    """What to say of a module that has no plan; with the lines that match its names, to start from."""
    name = type(module).__name__
    names = [n for n, _ in module.named_modules()]
    matching = {pattern: style for pattern, style in LLAMA_PLAN.items() if any(fnmatchcase(n, pattern) for n in names)}
    if len(matching) < len(LLAMA_PLAN) // 2:
        return (
            f"Tensor parallelism needs to know how {name} is cut. Write tensor_parallel_plan(self), "
            'e.g. return {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}; or use strategy="fsdp2", which needs '
            "no plan."
        )
    lines = "\n".join(f'      "{pattern}": "{style}",' for pattern, style in matching.items())
    return (
        f"Tensor parallelism needs to know how {name} is cut. There are ready plans for "
        f"{', '.join(sorted(TESTED_DECODERS))} of transformers, and {name} is none of them, nor holds one. Layers of "
        "it bear the names of Llama's; start from\n\n"
        f"  def tensor_parallel_plan(self):\n    return {{\n{lines}\n    }}\n\n"
        "and compare it with one device by `stratagem parity` before you train; or use strategy='fsdp2', which needs "
        "no plan."
    )
