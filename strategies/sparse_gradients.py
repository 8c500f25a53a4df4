"""Layers whose gradients are sparse, which sharding can't reduce."""

from torch import nn


def check_dense(module: nn.Module, strategy: str) -> None:
    """Refuse embeddings with sparse gradients.

    Args:
        module: whole.
        strategy: its name, for the message.

    Raises:
        ValueError: names the layers, and what works.
    """
    found = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse and layer.weight.requires_grad
    ]
    if found:
        raise ValueError(
            f"strategy={strategy!r} can't shard the gradients of {', '.join(found)}: made with sparse=True, they hold "
            "the rows that were looked up, and shards have rows of their own. Leave sparse out, or use "
            "strategy='single' or 'ddp'."
        )
