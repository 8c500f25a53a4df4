"""Models whose activations are planned and measured: tests/framework/test_plan.py."""

from typing import Any

import torch
from stratagem import TrainModule


def build_llama() -> dict[str, Any]:
    """A transformers Llama, with fewer heads of keys than of queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, use_cache=False,
    )  # fmt: skip
    ids = torch.arange(64 * 32).reshape(32, 64) % 512
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return {"module": TrainModule.wrap(lambda: LlamaForCausalLM(config)), "train_data": rows}


def build_vit() -> dict[str, Any]:
    """A transformers ViT."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    rows = [{"pixel_values": torch.ones(3, 32, 32), "labels": torch.tensor(number % 10)} for number in range(32)]
    return {"module": TrainModule.wrap(lambda: ViTForImageClassification(config)), "train_data": rows}


class Choosing(TrainModule):
    """Goes another way for other numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.layer(x)
        return made if made.sum() > 0 else -made

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return outputs.square().mean()


def build_choosing() -> dict[str, Any]:
    return {"module": Choosing(), "train_data": [torch.ones(4) for _ in range(16)]}


def build_on_gpu() -> dict[str, Any]:
    return {"module": Choosing().to("cuda"), "train_data": [torch.ones(4)]}
