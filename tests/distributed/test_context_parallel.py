"""Context parallelism: a sequence that several ranks hold is trained on and evaluated as one device does."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from safetensors.torch import load_file
from stratagem import TrainModule, read_predictions
from stratagem.framework.module import IGNORED_LABEL
from stratagem.precision import get_precision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import curves, make_fit, make_strategy

LENGTH = 16
WIDTH = 8
HEADS = 2
VOCABULARY = 11
SAMPLES = 41  # two updates of 16 and one of 9, in which one of two data-parallel ranks has an empty micro-batch
UPDATES = 12
TOLERANCE = 1e-5

# (ranks, options, samples per data-parallel rank, micro-batches): always 16 samples an update. Of micro-batches of one
# sample, the rank with the middle of the sequences has many without a label.
PLACEMENTS: dict[str, tuple[int, dict[str, Any], int, int]] = {
    "context-2": (2, {"context_parallel": 2}, 8, 2),
    "context-2-by-one": (2, {"context_parallel": 2}, 1, 16),
    "context-4": (4, {"context_parallel": 4}, 8, 2),
    "shard-2-context-2": (4, {"context_parallel": 2}, 4, 2),
    "replicas-2-context-2": (4, {"context_parallel": 2, "replicas": 2}, 4, 2),
    "context-2-tensor-2": (4, {"context_parallel": 2, "tensor_parallel": 2}, 8, 2),
}


def placements(*names: str) -> Any:
    """A test for each placement; all but one are slow."""
    marks = {name: () if name == "context-2" else pytest.mark.slow for name in names}
    return pytest.mark.parametrize("placement", [pytest.param(name, marks=marks[name]) for name in names])


class Block(nn.Module):
    """Causal attention and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        # Without biases: that of the keys has no gradient but rounding, which AdamW makes steps of.
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (
            layer(normed).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(self.attend(query, key, value).transpose(1, 2).flatten(2))
        return x + self.down(torch.tanh(self.up(x)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class Writer(TrainModule):
    """A causal transformer with a table of positions."""

    Block: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        if positions is None:
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        x = self.embed(tokens) + self.place(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten())

    def tensor_parallel_plan(self) -> dict[str, str]:
        cut = {f"blocks.*.{name}": "colwise" for name in ("query", "key", "value", "up")}
        return {**cut, "blocks.*.out": "rowwise", "blocks.*.down": "rowwise"}


class CountedWriter(Writer):
    """Divides by the global count itself."""

    def loss(self, outputs: Tensor, batch: Any, num_items_in_batch: Any = None) -> Tensor:  # type: ignore[override]
        labels = batch["labels"].flatten()
        return F.cross_entropy(outputs.flatten(0, 1), labels, reduction="sum") / num_items_in_batch


class Recomputed(Block):
    """Keeps no activations; its attention runs again in backward."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class RecomputedWriter(Writer):
    Block = Recomputed


class Encoder(Writer):
    """The same task by torch's own layers, which evaluate in a fused kernel unless told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 3 * WIDTH, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2)  # type: ignore[assignment]

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        if positions is None:
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.blocks(self.embed(tokens) + self.place(positions), mask, is_causal=True))


def text_rows(count: int = SAMPLES, length: int = LENGTH) -> list[dict[str, Tensor]]:
    """Tokens, and labels that depend on the token and the first one, so that attention has something to do. From one to
    all of a row's labels count, the first ones: the rank with the middle of a sequence has fewer than that with its
    ends, and often none.
    """
    generator = torch.Generator().manual_seed(5)
    rows = []
    for i in range(count):
        tokens = torch.randint(VOCABULARY, (length,), generator=generator)
        labels = (tokens + tokens[0] + torch.arange(length)) % VOCABULARY
        labels[1 + (i * 7) % length :] = IGNORED_LABEL
        rows.append({"tokens": tokens, "labels": labels})
    return rows


def train(
    module: type[TrainModule] = Writer,
    *,
    export: Path | None = None,
    resume: Path | None = None,
    precision: str = "32-true",
    **arguments: Any,
) -> dict[str, Any]:
    """Train and then evaluate, in the test's process or on a rank; the curves, with "eval_loss"."""
    torch.manual_seed(0)
    rows = text_rows()
    more = {"max_steps": UPDATES, "per_device_eval_batch_size": 3, **arguments}
    fit = make_fit(module(), rows, rows[:11], precision=precision, **more)
    fit.train(resume_from_checkpoint=resume)
    if export is not None:
        fit.export(export)
    return {**curves(fit), **fit.evaluate(), "items": fit.state.items_seen, "batch": fit.stream.global_micro_batch}


@cache
def single(module: type[TrainModule] = Writer, precision: str = "32-true") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Curves and final weights of one device."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "single.safetensors"
        logs = train(module, per_device_train_batch_size=16, export=path, precision=precision)
        return logs, load_file(path)


def train_on_ranks(ranks: dict[int, Ranks], placement: str, **arguments: Any) -> dict[str, Any]:
    """What ``train`` returns under a placement; the same on every rank."""
    world, options, batch, accumulation = PLACEMENTS[placement]
    found = ranks[world].run(
        train,
        strategy="fsdp2",
        options=options,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **arguments,
    )
    assert found == [found[0]] * world
    return found[0]


@placements(*PLACEMENTS)
def test_one_curve(ranks: dict[int, Ranks], tmp_path: Path, placement: str) -> None:
    expected, expected_weights = single()
    found = train_on_ranks(ranks, placement, export=tmp_path / "ranks.safetensors")
    assert len(found["loss"]) == UPDATES
    assert found["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=10 * TOLERANCE)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=TOLERANCE)
    assert found["items"] == expected["items"]
    assert found["loss"][-1] < 0.9 * found["loss"][0]
    weights = load_file(tmp_path / "ranks.safetensors")
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("module", [RecomputedWriter, CountedWriter])
def test_other_writers(ranks: dict[int, Ranks], module: type[TrainModule]) -> None:
    expected, _ = single()
    found = train_on_ranks(ranks, "context-2", module=module)
    assert found["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)


@pytest.mark.slow
def test_torch_layers(ranks: dict[int, Ranks]) -> None:
    expected, _ = single(Encoder)
    found = train_on_ranks(ranks, "context-2", module=Encoder)
    assert found["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=TOLERANCE)


@pytest.mark.slow
def test_checkpoints_move(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    expected, _ = single()
    saving = {"save_strategy": "steps", "save_steps": 5}
    alone, together = tmp_path / "alone", tmp_path / "together"
    train(per_device_train_batch_size=16, output_dir=str(alone), **saving)
    train_on_ranks(ranks, "context-2", output_dir=str(together), **saving)
    resumed = train(per_device_train_batch_size=16, resume=together / "checkpoint-5")
    assert resumed["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    resumed = train_on_ranks(ranks, "shard-2-context-2", resume=alone / "checkpoint-5")
    assert resumed["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    # The same placement goes on bit by bit.
    resumed = train_on_ranks(ranks, "context-2", resume=together / "checkpoint-5")
    assert resumed["loss"] == train_on_ranks(ranks, "context-2")["loss"]


def predict(**arguments: Any) -> list[Any]:
    """Predictions for samples of which the ranks get unequal shares."""
    torch.manual_seed(0)
    fit = make_fit(Writer(), None, per_device_eval_batch_size=2, **arguments)
    return fit.predict(text_rows(5)).predictions.tolist()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_predictions_are_whole_and_in_order(ranks: dict[int, Ranks], world: int) -> None:
    expected = torch.tensor(predict())
    for found in ranks[world].run(predict, strategy="fsdp2", options={"context_parallel": 2}):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=1e-5)


def write_predictions(output: str, **arguments: Any) -> None:
    torch.manual_seed(0)
    fit = make_fit(Writer(), None, per_device_eval_batch_size=2, **arguments)
    fit.predict(text_rows(5), output=output)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_written_predictions_are_whole_and_in_order(ranks: dict[int, Ranks], tmp_path: Path, world: int) -> None:
    expected = torch.tensor(predict())
    ranks[world].run(
        write_predictions, output=str(tmp_path / "d"), strategy="fsdp2", options={"context_parallel": 2}
    )  # on four ranks the second pair has no rows in the last batch
    torch.testing.assert_close(read_predictions(tmp_path / "d")["predictions"], expected, rtol=1e-5, atol=1e-5)


# Batches.


class Places(Writer):
    def forward(self, tokens: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return super().forward(tokens, position_ids)


class Triple(NamedTuple):
    tokens: Any
    positions: Any
    labels: Any


KINDS: dict[str, Any] = {"mapping": dict, "tuple": lambda named: tuple(named.values()), "named": lambda n: Triple(**n)}


def split(batch: dict[str, Any], kind: str = "mapping", module: type[TrainModule] = Writer) -> tuple[str, Any]:
    """This rank's part of a batch: its type, and the tensors as lists."""
    strategy = make_strategy("fsdp2", {"context_parallel": 2})
    strategy.set_up(get_precision("32-true"))
    strategy.place(module(), None)
    part = strategy.split_batch(KINDS[kind]({name: torch.tensor(value) for name, value in batch.items()}))
    if isinstance(part, dict):
        return "dict", {name: value.tolist() for name, value in part.items()}
    return type(part).__name__, [value.tolist() for value in part]


ROW = list(range(10, 18))
ENDS, MIDDLE = [10, 11, 16, 17], [12, 13, 14, 15]


@pytest.mark.parametrize("name, module", [("positions", Writer), ("position_ids", Places)])
def test_positions_are_added(ranks: dict[int, Ranks], name: str, module: type[TrainModule]) -> None:
    whole = {"weight": [1, 2], "speaker": [[1, 2, 3], [4, 5, 6]]}  # have no sequence
    batch = {"tokens": [ROW, ROW], "labels": [ROW, ROW], **whole}
    first, second = ranks[2].run(split, batch=batch, module=module)
    assert first == ("dict", {"tokens": [ENDS] * 2, "labels": [ENDS] * 2, **whole, name: [[0, 1, 6, 7]] * 2})
    assert second == ("dict", {"tokens": [MIDDLE] * 2, "labels": [MIDDLE] * 2, **whole, name: [[2, 3, 4, 5]] * 2})


def test_given_positions_are_kept(ranks: dict[int, Ranks]) -> None:
    first, second = ranks[2].run(split, batch={"tokens": [ROW], "positions": [ROW]})
    assert first == ("dict", {"tokens": [ENDS], "positions": [ENDS]})
    assert second == ("dict", {"tokens": [MIDDLE], "positions": [MIDDLE]})


@pytest.mark.parametrize("kind, type_name", [("tuple", "tuple"), ("named", "Triple")])
def test_tuples_stay_what_they_are(ranks: dict[int, Ranks], kind: str, type_name: str) -> None:
    batch = {"tokens": [ROW], "positions": [ROW], "labels": [ROW]}
    assert ranks[2].run(split, batch=batch, kind=kind) == [(type_name, [[ENDS]] * 3), (type_name, [[MIDDLE]] * 3)]


# What can't work is refused, on every rank.


class Placeless(Writer):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)


class ByKeyword(Writer):
    def forward(self, tokens: Tensor, *, positions: Tensor | None = None) -> Tensor:
        return super().forward(tokens, positions)


def writer(attend: Callable[..., Tensor]) -> type[Writer]:
    """A Writer with an attention of its own."""

    class OwnBlock(Block):
        def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attend(query, key, value)

    return type("OwnWriter", (Writer,), {"Block": OwnBlock})


def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.mT
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1) @ value


def with_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def bidirectional(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def with_dropout(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=0.1)


def to_a_few(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key[:, :, :2], value[:, :, :2], is_causal=True)


# Name to (module, rows, message).
REFUSED: dict[str, tuple[Callable[[], type[TrainModule]], Callable[[], list[Any]], str]] = {
    "length": (
        lambda: Writer,
        lambda: text_rows(4, 10),
        "'labels' has a length of 10. Pad sequences to a multiple of 4",
    ),
    "kind": (lambda: Writer, lambda: [row["tokens"] for row in text_rows(4)], "the batch is a Tensor"),
    "label for each sample": (lambda: Writer, lambda: [{**row, "labels": 1} for row in text_rows(4)], r"shape \(4,\)"),
    "unshifted": (
        lambda: Writer,
        lambda: [{**row, "tokens": row["tokens"].new_zeros(LENGTH + 1)} for row in text_rows(4)],
        "nothing else in the batch has a length of 16",
    ),
    "nothing to cut": (lambda: Writer, lambda: [{"tokens": row["tokens"][0]} for row in text_rows(4)], "none that has"),
    "no positions": (lambda: Placeless, text_rows, "Placeless.forward can't tell which. Give it a parameter named"),
    "no positions in a tuple": (
        lambda: ByKeyword,
        lambda: [(row["tokens"], row["labels"]) for row in text_rows(4)],
        "the batch doesn't hold them",
    ),
    "own attention": (lambda: writer(by_hand), text_rows, "which forward never called"),
    "mask": (lambda: writer(with_mask), text_rows, "Received: an attn_mask"),
    "not causal": (lambda: writer(bidirectional), text_rows, "Received: is_causal=False"),
    "dropout": (
        lambda: writer(with_dropout),
        text_rows,
        "Use dropout_p=0.0",
    ),
    "cross attention": (lambda: writer(to_a_few), text_rows, "of one length. Received"),
}


def refuse(name: str) -> str:
    """The message with which a run ends."""
    module, rows, _ = REFUSED[name]
    attention = F.scaled_dot_product_attention
    fit = make_fit(module()(), rows(), strategy="fsdp2", options={"context_parallel": 2}, per_device_train_batch_size=4)
    try:
        fit.train()
    except (TypeError, ValueError) as error:
        assert F.scaled_dot_product_attention is attention
        return str(error)
    return "trained"


@pytest.mark.parametrize("name", REFUSED)
def test_refused(ranks: dict[int, Ranks], name: str) -> None:
    for message in ranks[2].run(refuse, name=name):
        assert message.startswith("context_parallel=2")
        assert re.search(REFUSED[name][2], message), message


def refuse_world() -> str:
    try:
        make_fit(Writer(), text_rows(), strategy="fsdp2", options={"context_parallel": 3})
    except ValueError as error:
        return str(error)
    return "made"


def test_world_that_is_no_multiple(ranks: dict[int, Ranks]) -> None:
    assert ranks[2].run(refuse_world)[0].startswith("FSDP2 can't cut 2 ranks by context_parallel=3")
