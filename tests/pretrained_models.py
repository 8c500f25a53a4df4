"""Tiny transformers models in directories, as save_pretrained writes them: ``from pretrained_models import save``.

transformers takes seconds to import, so it is imported where a model is made.
"""

import json
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from language_models import classifying_bert, llama, masked_bert, tied_llama


def qwen2() -> Any:
    """A decoder whose projections have biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return Qwen2ForCausalLM(
        Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    )


def gpt2() -> Any:
    """A decoder of Conv1D layers, whose weights are transposed, with a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))


def vit() -> Any:
    """An encoder of images, which a file holds under names of the past."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8))


def qwen3_moe() -> Any:
    """A decoder whose experts lie in a file one by one, and in two tensors in the model."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts=12, moe_intermediate_size=16))


def resnet() -> Any:
    """Convolutions, and buffers that a file holds."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "tied llama": tied_llama,
    "qwen2": qwen2,
    "gpt2": gpt2,
    "masked bert": masked_bert,
    "classifying bert": classifying_bert,
    "vit": vit,
    "qwen3-moe": qwen3_moe,
    "resnet": resnet,
}


def save(name: str, directory: Path, dtype: torch.dtype = torch.float32, shard_size: str = "1GB") -> Path:
    """Write a model with random weights, none of which is where it was when it was made; return its directory."""
    torch.manual_seed(1)
    model = MODELS[name]().to(dtype)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if "running" in n)):
            tensor.add_(torch.rand_like(tensor), alpha=0.1)
    path = directory / name.replace(" ", "_")
    model.save_pretrained(path, max_shard_size=shard_size)
    return path


def loaded(path: Path) -> Any:
    """The model as transformers loads it."""
    import transformers

    return getattr(transformers, transformers.AutoConfig.from_pretrained(path).architectures[0]).from_pretrained(path)


ROW = 64  # values at the beginning of each tensor of a big model that aren't zero


def marked_values(name: str, shape: Sequence[int]) -> torch.Tensor:
    """The first values of a tensor of a big model."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(min(ROW, math.prod(shape)), generator=generator, dtype=torch.bfloat16)


def save_big(directory: Path, **sizes: Any) -> int:
    """Write a Llama in bfloat16 whose tensors are zero but for their first values, so that a file system keeps little
    of them; return its number of parameters.
    """
    import transformers

    directory.mkdir()
    config = transformers.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(directory)
    with torch.device("meta"):
        parameters = dict(transformers.LlamaForCausalLM(config).named_parameters())
    header, end = dict[str, Any](), 0
    for name, parameter in parameters.items():
        offsets = [end, end + 2 * parameter.numel()]
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, parameter in parameters.items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(marked_values(name, parameter.shape).view(torch.uint8).numpy().tobytes())
        file.truncate(8 + len(text) + end)
    return end // 2
