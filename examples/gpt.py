"""A byte-level GPT, trained on Python's own standard library: text that every machine with Python already has.

    python examples/gpt.py              # about three minutes on two CPU cores
    python examples/gpt.py --resume     # goes on from the newest checkpoint
    python examples/gpt.py --help       # every option of the run
    stratagem fit examples/gpt.py:build --max_steps 100 --strategy fsdp2 --devices 2    # the same, without the sample

It ends with its loss on files it never saw, in bits per byte, and with a continuation of ``--sample.prompt``.
Watch it with ``tensorboard --logdir output``.
"""

import math
import sysconfig
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_model
from stratagem import Fit, TrainModule, configure
from torch import Tensor, nn
from torch.utils.data import Dataset

VOCABULARY = 256  # a token is a byte, so there is no tokenizer to train, to store or to explain
FILE_BEGINS = b"\0"  # stands before every file; no Python source holds this byte

# The model.


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair of features by an angle that grows with the position (rotary embedding, Su et al., 2021).

    The product of a query and a key then depends on how far apart they are, not on where they stand.
    """
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Attention(nn.Module):
    """Every position gathers values from itself and the positions before it."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        # Three layers, not one of three times the width: cut by columns, each still holds whole heads.
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        def heads(features: Tensor) -> Tensor:  # the number of heads is left open: tensor-parallel ranks hold a part
            return features.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

        query, key = rotate(heads(self.query(x)), angles), rotate(heads(self.key(x)), angles)
        mixed = F.scaled_dot_product_attention(query, key, heads(self.value(x)), is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention, then a feed-forward layer. Each adds to its own input, and normalizes only what it reads (pre-norm):
    the sum itself stays a straight path for gradients from the last block to the first.
    """

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, head_width)
        self.feed_forward_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles)
        return x + self.down(F.gelu(self.up(self.feed_forward_norm(x))))


class GPT(TrainModule):
    """A decoder-only transformer over bytes (Radford et al., 2019), with rotary positions.

    Args:
        context: the most positions it can look back on, itself included.
        layers: number of blocks.
        width: features per position.
        heads: attention heads; they share the width.
    """

    item_name = "tokens"
    angles: Tensor

    def __init__(self, context: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"width must be a multiple of twice the heads. Received: width={width}, heads={heads}")
        self.context = context
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, width // heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight  # a byte read and a byte predicted are the same byte
        speeds = 10_000.0 ** -torch.linspace(0, 1, width // heads // 2)
        self.register_buffer("angles", torch.outer(torch.arange(context), speeds), persistent=False)
        self.initialize(layers)

    def initialize(self, layers: int) -> None:
        """Small random weights. What is added to the sum of the blocks begins smaller, so that its size doesn't grow
        with the number of blocks.
        """
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                adds = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if adds else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of every next byte: (batch, positions) to (batch, positions, 256)."""
        angles = self.angles[: tokens.shape[1]]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, angles)
        return self.head(self.norm(x))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Mean negative log-likelihood of the bytes that came next, in nats."""
        return F.cross_entropy(outputs.flatten(0, 1).float(), batch["labels"].flatten())

    def shard_units(self) -> list[nn.Module]:
        """What fully sharded strategies gather and free one after another."""
        return list(self.blocks)

    def tensor_parallel_plan(self) -> dict[str, str]:
        """How tensor-parallel strategies cut the layers."""
        return {
            "embedding": "embedding",
            "blocks.*.attention.[qkv]*": "colwise",
            "blocks.*.attention.output": "rowwise",
            "blocks.*.up": "colwise",
            "blocks.*.down": "rowwise",
            "head": "colwise_gather",
        }

    @torch.no_grad()
    def generate(self, prompt: bytes, length: int, temperature: float = 0.8, seed: int = 0) -> bytes:
        """Continue a prompt byte by byte, each drawn from the model's own prediction."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.tensor([list(FILE_BEGINS + prompt)])
        for _ in range(length):
            scores = self(tokens[:, -self.context :])[0, -1].float()
            drawn = torch.multinomial(F.softmax(scores / temperature, dim=-1), 1, generator=generator)
            tokens = torch.cat((tokens, drawn[None]), dim=1)
        return bytes(tokens[0, 1:].tolist())


def build(context: int = 256, layers: int = 4, width: int = 128, heads: int = 4) -> GPT:
    """The model, for tools that train, time or export it.

    Args:
        context: bytes in a window.
        layers: transformer blocks.
        width: features per position.
        heads: attention heads.
    """
    return GPT(context, layers, width, heads)


# The data.


def standard_library() -> dict[str, bytes]:
    """Every source file of the running Python's standard library, by its name relative to the library's folder."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}  # tests are long tables, not prose
    files = sorted((path.relative_to(root), path) for path in root.rglob("*.py"))
    return {name.as_posix(): path.read_bytes() for name, path in files if skipped.isdisjoint(name.parts)}


class Windows(Dataset):
    """A text cut into pieces of ``context`` bytes, each with the bytes that follow as its labels.

    Args:
        text: joined files.
        context: bytes in a piece.
        limit: keep at most so many pieces, evenly spread over the text; None keeps all.
    """

    def __init__(self, text: bytes, context: int, limit: int | None = None) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.context = context
        pieces = (len(text) - 1) // context  # the last byte is a label only
        kept = min(pieces, limit or pieces)
        self.pieces = [number * pieces // kept for number in range(kept)]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = self.pieces[index] * self.context
        piece = self.text[start : start + self.context + 1].long()
        return {"tokens": piece[:-1], "labels": piece[1:]}


def data(context: int = 256, eval_windows: int | None = 256) -> tuple[Windows, Windows]:
    """Training and held-out windows of the standard library.

    Whole files are held out, one in twenty by a checksum of their name: a model can't have seen the other half of a
    function it is asked about, and the same files are held out on every machine and in every run.

    Args:
        context: bytes in a window.
        eval_windows: held-out windows that an evaluation reads, at most.
    """
    train, held_out = bytearray(), bytearray()
    for name, content in standard_library().items():
        part = held_out if zlib.crc32(name.encode()) % 20 == 0 else train
        part += FILE_BEGINS + content
    return Windows(bytes(train), context), Windows(bytes(held_out), context, eval_windows)


def parity_data() -> Windows:
    """Short training windows, for ``stratagem parity examples/gpt.py:build``."""
    return data(context=64)[0]


# The run.

ARGUMENTS = {
    "loggers": ["jsonl", "tensorboard"],
    "output_dir": "output/gpt",
    "max_steps": 2000,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # of the run
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "logging_steps": 50,
    "eval_strategy": "steps",
    "eval_steps": 200,
    "save_steps": 200,
    "save_total_limit": 2,
}
"""What Fit is given, unless the command line or a file says otherwise."""


def sample(model: GPT, /, prompt: str = "def ", length: int = 300) -> str:
    """Continue a prompt.

    Args:
        model: trained.
        prompt: what the trained model continues.
        length: bytes that it adds to the prompt.
    """
    return model.eval().generate(prompt.encode(), length).decode(errors="replace")


def main() -> None:
    """Train, evaluate and sample."""
    run = configure(build, data, ARGUMENTS, sample=sample)
    fit = Fit.from_config(run)
    train, held_out = fit.train_data, fit.eval_data
    if fit.strategy.is_main:
        parameters = sum(parameter.numel() for parameter in fit.module.parameters())
        print(f"{parameters:,} parameters, {len(train.text):,} bytes to learn from, {len(held_out.text):,} held out,")
        print(f"of which {len(held_out) * held_out.context:,} in {len(held_out)} windows are evaluated")
    fit.train(resume_from_checkpoint=run.resume)

    # A mean over bytes in nats, divided by ln 2, is in bits: what this model would compress Python to.
    bits_per_byte = fit.evaluate()["eval_loss"] / math.log(2)
    weights = fit.export(Path(fit.args.output_dir) / "weights.safetensors")
    if fit.strategy.is_main:
        # Exported weights are whole and plain however the run was sharded: one process samples from a fresh model.
        model = build(**run.section("build"))
        load_model(model, weights)
        print(f"\nheld-out loss: {bits_per_byte:.3f} bits per byte\n\n{sample(model, **run.own['sample'])}")


if __name__ == "__main__":
    main()
