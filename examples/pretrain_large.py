"""A Llama-like model that no rank ever holds: its layers are made in ``build()``, and each rank draws its own part.

python examples/pretrain_large.py                            # tiny, on made-up tokens: seconds
python examples/pretrain_large.py --strategy fsdp2 --devices 2
python examples/pretrain_large.py --size 8b --ranks 16 --dry-run    # what each rank would hold; allocates nothing
"""

import argparse

import torch
import torch.nn.functional as F
from stratagem import Fit, TrainModule
from torch import Tensor, nn

SIZES = {
    "tiny": {"layers": 2, "width": 64, "heads": 4, "groups": 2, "hidden": 176, "vocabulary": 64},
    "8b": {"layers": 32, "width": 4096, "heads": 32, "groups": 8, "hidden": 14336, "vocabulary": 128256},
}


class Block(nn.Module):
    """Attention whose keys and values are shared by groups of heads, then a gated feed-forward layer."""

    def __init__(self, width: int, heads: int, groups: int, hidden: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.attention_norm, self.norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.output = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(width, groups * self.head_width, bias=False) for _ in range(2))
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        features = (layer(normed) for layer in (self.query, self.key, self.value))
        query, key, value = (each.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for each in features)
        query, key = rotate(query, angles), rotate(key, angles)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(-2))
        normed = self.norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair of features by an angle that grows with the position."""
    (first, second), cos, sin = x.chunk(2, dim=-1), angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Llama(TrainModule):
    """The model. ``__init__`` only takes note of the sizes: nothing in it has parameters."""

    item_name = "tokens"
    speeds: Tensor

    def __init__(self, layers: int, vocabulary: int, **sizes: int) -> None:
        super().__init__()
        self.layers, self.vocabulary, self.sizes = layers, vocabulary, sizes

    def build(self) -> None:
        """Make the layers. Their parameters get memory when they are sharded; buffers are made here and now."""
        width = self.sizes["width"]
        self.embedding = nn.Embedding(self.vocabulary, width)
        self.blocks = nn.ModuleList(Block(**self.sizes) for _ in range(self.layers))  # each is gathered by itself
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, self.vocabulary, bias=False)
        exponents = torch.linspace(0, -1, width // self.sizes["heads"] // 2)
        self.register_buffer("speeds", 500_000.0**exponents, persistent=False)

    def init_weights(self, layer: nn.Module) -> None:
        """Fill one layer. It is called for each, with the same random numbers under every strategy."""
        if isinstance(layer, nn.Linear | nn.Embedding):
            nn.init.normal_(layer.weight, std=0.02)
        else:
            super().init_weights(layer)

    def forward(self, tokens: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(tokens.shape[1], device=tokens.device), self.speeds)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, angles)
        return self.head(self.norm(x))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1).float(), batch["labels"].flatten())


def dry_run(model: Llama, ranks: int) -> None:
    """Make the layers without memory, and print what a rank of fsdp2, which cuts first dimensions, holds in float32."""
    with torch.device("meta"):
        model.build()
    held = sum(-(-len(p) // ranks) * p.shape[1:].numel() for p in model.parameters())
    block = max(sum(p.numel() for p in unit.parameters()) for unit in model.shard_units())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {held:,} on each of {ranks} ranks")
    print(f"{16 * held / 2**30:.1f} GiB a rank: parameters, gradients and the two moments of AdamW")
    print(f"{8 * block / 2**30:.1f} GiB more while two blocks are whole, and activations")


def main() -> None:
    """Train, or say what it takes."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--ranks", type=int, default=8, help="for --dry-run")
    parser.add_argument("--strategy", default="single")
    parser.add_argument("--devices", type=int)
    options = parser.parse_args()
    model = Llama(**SIZES[options.size])
    if options.dry_run:
        dry_run(model, options.ranks)
        return
    rows = torch.arange(32) * torch.arange(256)[:, None] % model.vocabulary  # each row counts in steps of its own
    data = [{"tokens": row[:-1], "labels": row[1:]} for row in rows]
    Fit(model, data, strategy=options.strategy, devices=options.devices or "auto", max_steps=60, logging_steps=20,
        learning_rate=3e-3, save_strategy="no", output_dir="output/large").train()  # fmt: skip


if __name__ == "__main__":
    main()
