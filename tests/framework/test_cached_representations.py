"""Cached representations: a micro-batch in pieces has the gradients of the whole, and the memory of one piece."""

import copy
import random
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy
import pytest
import torch
from stratagem import Callback, Fit, TrainModule
from stratagem.framework.random_state import Moment
from stratagem.strategies import DDP
from tiny import Float64, MakeFit, collate, logs_of
from torch import Tensor, nn

FEATURES, ROWS, PIECES = 6, 10, 3
SIZES = (4, 3, 3)  # of 10 rows in 3 pieces


class Block(nn.Module):
    """With dropout, and an intermediate value much wider than what goes in and out."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(torch.tanh(self.up(x))))


class Towers(TrainModule):
    """Two encoders, and a temperature that the loss alone uses."""

    hidden = 64

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (
            nn.Sequential(nn.Linear(FEATURES, 8), Block(8, self.hidden), Block(8, self.hidden)) for _ in range(2)
        )
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, left: Tensor, right: Tensor) -> Any:
        return nn.functional.normalize(self.left(left)), nn.functional.normalize(self.right(right))

    def loss(self, outputs: Any, batch: Any) -> Any:
        left, right = outputs
        logits = self.scale.exp() * left @ self.gather(right).T
        own = torch.arange(len(left))
        return (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2

    def count_items(self, batch: Any) -> int:
        return len(batch["left"])

    def configure_optimizer(self, args: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=args.learning_rate)

    def shard_units(self) -> list[nn.Module]:
        return [layer for layer in self.modules() if isinstance(layer, Block)]


class WithBatchNorm(Towers):
    """Its statistics are of one piece each, and its running ones follow those."""

    def __init__(self) -> None:
        super().__init__()
        self.left.append(nn.BatchNorm1d(8))


class Drawing(Towers):
    """Its loss draws random numbers, too."""

    def loss(self, outputs: Any, batch: Any) -> Any:
        left, right = outputs
        return super().loss((left + 0.1 * torch.randn(left.shape), right), batch)


class Logging(Towers):
    """Its outputs are a mapping with more than the loss uses, and its loss reports an extra number."""

    def forward(self, left: Tensor, right: Tensor) -> Any:
        outputs = super().forward(left, right)
        return {"pair": list(outputs), "size": left.norm(dim=1), "kind": "pair", "order": right.argmax(dim=1)}

    def loss(self, outputs: Any, batch: Any) -> Any:
        assert outputs["order"].equal(batch["right"].argmax(dim=1)) and outputs["kind"] == "pair"
        return {"loss": super().loss(outputs["pair"], batch), "size": outputs["size"].mean()}


def pairs(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        {side: torch.randn(FEATURES, generator=generator, dtype=dtype) for side in ("left", "right")}
        for _ in range(count)
    ]  # fmt: skip


class Seeded(Callback):
    """Draws the same random numbers in each update, and keeps the gradients of all."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.drawn: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        torch.manual_seed(100 + state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
        self.gradients.append({name: gradient.clone() for name, gradient in fit.strategy.full_gradients()})
        self.drawn.append(torch.rand(()).item())


def by_hand(module: TrainModule, updates: list[list[list[dict[str, Tensor]]]], rate: float = 0.1) -> Seeded:
    """Each micro-batch's pieces with graphs, one after another, and one backward from the loss of them all.

    Args:
        module: trained in place.
        updates: the rows of each micro-batch of each update.
        rate: of plain gradient descent.
    """
    module.gather = lambda rows, pad_to=None: rows  # type: ignore[method-assign]
    kept = Seeded()
    for number, micro_batches in enumerate(updates):
        torch.manual_seed(100 + number)
        module.zero_grad()
        for rows in micro_batches:
            size, begin, parts = len(rows), 0, []
            for piece in range(PIECES):
                end = begin + size // PIECES + (piece < size % PIECES)
                parts.append(module(**collate(rows[begin:end])))
                begin = end
            outputs = torch.utils._pytree.tree_map(
                lambda *each: torch.cat(each) if isinstance(each[0], Tensor) else each[0], *parts
            )
            loss = module.loss(outputs, collate(rows))
            loss = loss["loss"] if isinstance(loss, dict) else loss
            (loss * size / sum(map(len, micro_batches))).backward()
        kept.gradients.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
        kept.drawn.append(torch.rand(()).item())
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
    return kept


def assert_alike(found: Seeded, expected: Seeded, tolerance: float = 1e-12) -> None:
    assert found.drawn == expected.drawn  # the generator stands where it would
    assert len(found.gradients) == len(expected.gradients)
    for ours, theirs in zip(found.gradients, expected.gradients, strict=True):
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", [Towers, WithBatchNorm, Drawing, Logging])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_are_those_of_the_whole_with_the_same_masks(
    make_fit: MakeFit, kind: type[Towers], accumulation: int
) -> None:
    rows = pairs(4 * ROWS, torch.float64)
    module = kind()
    reference = copy.deepcopy(module).double()
    chunks = [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]
    updates = [chunks[i : i + accumulation] for i in range(0, len(chunks), accumulation)]
    expected = by_hand(reference, updates)
    found = Seeded()
    make_fit(
        module, rows, num_train_epochs=1, per_device_train_batch_size=ROWS, callbacks=[found],
        gradient_accumulation_steps=accumulation, contrastive_chunks=PIECES, precision=Float64(),
    ).train()  # fmt: skip
    assert_alike(found, expected)
    for (name, buffer), (_, theirs) in zip(module.named_buffers(), reference.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, theirs, msg=name)  # of the first forward, once


def test_in_float64_they_are_those_of_one_forward(make_fit: MakeFit) -> None:
    rows, modules = pairs(2 * ROWS, torch.float64), []
    for pieces in (None, 2, PIECES, ROWS, 2 * ROWS):  # each row by itself; and fewer rows than pieces
        torch.manual_seed(3)
        module = Towers()
        for layer in module.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        make_fit(
            module, rows, max_steps=4, per_device_train_batch_size=ROWS, precision=Float64(), contrastive_chunks=pieces
        ).train()
        modules.append(module.state_dict())
    for state in modules[1:]:
        for name, tensor in modules[0].items():
            torch.testing.assert_close(state[name], tensor, atol=1e-13, rtol=0)


class Single(TrainModule):
    """One block, seen from outside: what it gives in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(FEATURES, 8)])
        self.seen: list[Tensor] = []

    def forward(self, left: Tensor) -> Tensor:
        found = self.blocks[0](left)
        self.seen.append(found.detach().clone())
        return found

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return (outputs @ outputs.T).logsumexp(dim=0).mean()

    def count_items(self, batch: Any) -> int:
        return len(batch["left"])

    def shard_units(self) -> list[nn.Module]:
        return list(self.blocks)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_checkpointing": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow),
        {"strategy": "ddp"},
        {"strategy": "fsdp2"},
        {"strategy": "fsdp1"},
    ],
    ids=["plain", "checkpointed", "compiled", "ddp", "fsdp2", "fsdp1"],
)
def test_both_forwards_of_a_piece_draw_the_same(make_fit: MakeFit, arguments: dict[str, Any]) -> None:
    module = Single()
    make_fit(
        module, pairs(2 * ROWS), max_steps=2, per_device_train_batch_size=ROWS, contrastive_chunks=2, **arguments
    ).train()
    assert [len(each) for each in module.seen] == [5] * 8
    for update in (module.seen[:4], module.seen[4:]):
        assert update[0].equal(update[2]) and update[1].equal(update[3]) and not update[0].equal(update[1])


def test_a_moment_brings_every_generator_back() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), torch.rand(()).item()

    moment = Moment(torch.device("cpu"))
    first, second = draw(), draw()
    moment.restore()
    assert draw() == first != second
    moment.restore()
    assert draw() == first


def test_bfloat16_casts_weights_with_their_graph(make_fit: MakeFit) -> None:
    """Autocast keeps a weight's cast for as long as its context is entered."""

    class Sharing(Towers):
        def loss(self, outputs: Any, batch: Any) -> Any:
            return super().loss([self.right[0](batch["left"])[:, :8] + each for each in outputs], batch)

    found = []
    for pieces in (None, 2):
        torch.manual_seed(3)
        module, kept = Sharing(), Seeded()
        for layer in module.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        make_fit(
            module, pairs(ROWS), max_steps=1, per_device_train_batch_size=ROWS, contrastive_chunks=pieces,
            callbacks=[kept], precision="bf16-mixed",
        ).train()  # fmt: skip
        found.append(kept.gradients[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=0.02, rtol=0.05)
        assert found[1][name].abs().sum() > 0


class Bytes:
    """The most bytes of activations that autograd holds at one time."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.seen: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> "Kept":
        return Kept(self, tensor)


class Kept:
    """A tensor that is kept for backward."""

    def __init__(self, counted: Bytes, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # a node that kept its own output, with its graph, would keep itself
        is_weight = isinstance(tensor, nn.Parameter) or (tensor._base is not None and tensor._is_view())
        size = 0 if is_weight else tensor.numel() * tensor.element_size()
        counted.now += size
        counted.most = max(counted.most, counted.now)
        weakref.finalize(self, release, counted, size)


def release(counted: Bytes, size: int) -> None:
    counted.now -= size


class Summed(Towers):
    """With a loss that keeps little for its backward, and encoders that keep much."""

    hidden = 512

    def loss(self, outputs: Any, batch: Any) -> Any:
        return -(outputs[0] * outputs[1]).sum(dim=1).logsumexp(dim=0)


def most_bytes(make_fit: MakeFit, pieces: int | None) -> int:
    counted = Bytes()
    fit = make_fit(Summed(), pairs(64), max_steps=1, per_device_train_batch_size=64, contrastive_chunks=pieces)
    with torch.autograd.graph.saved_tensors_hooks(counted.pack, lambda kept: kept.tensor):
        fit.train()
    assert counted.now == 0
    return counted.most


def test_activations_are_those_of_one_piece(make_fit: MakeFit) -> None:
    whole, in_four, in_eight = (most_bytes(make_fit, pieces) for pieces in (None, 4, 8))
    assert whole > 64 * 4 * 512 * 4  # both towers' wide layers
    assert in_four == pytest.approx(whole / 4, rel=0.05)
    assert in_eight == pytest.approx(whole / 8, rel=0.05)


def test_evaluation_is_whole(make_fit: MakeFit) -> None:
    sizes: list[int] = []
    module = Towers()
    module.left.register_forward_hook(lambda *call: sizes.append(len(call[2])))
    fit = make_fit(module, pairs(ROWS), pairs(ROWS), per_device_eval_batch_size=ROWS, contrastive_chunks=PIECES)
    loss = fit.evaluate()["eval_loss"]
    assert sizes == [ROWS]
    batch = collate(pairs(ROWS))
    module.gather = lambda rows, pad_to=None: rows  # type: ignore[method-assign]
    with torch.no_grad():
        assert loss == pytest.approx(module.loss(module.eval()(**batch), batch).item(), abs=1e-6)


def test_extras_and_label_smoothing_are_of_the_whole(make_fit: MakeFit) -> None:
    fit = make_fit(Logging(), pairs(ROWS), max_steps=1, per_device_train_batch_size=ROWS, contrastive_chunks=PIECES,
                   logging_steps=1)  # fmt: skip
    fit.train()
    [log] = logs_of(fit)
    assert log["size"] == pytest.approx(collate(pairs(ROWS))["left"].norm(dim=1).mean().item(), abs=1e-6)

    class Classifier(TrainModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(FEATURES, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    rows = [{"x": row["left"], "labels": torch.tensor(i % 5)} for i, row in enumerate(pairs(ROWS))]
    states = []
    for pieces in (None, PIECES):
        torch.manual_seed(3)
        module = Classifier()
        make_fit(
            module, rows, max_steps=2, per_device_train_batch_size=ROWS, label_smoothing_factor=0.2,
            contrastive_chunks=pieces,
        ).train()  # fmt: skip
        states.append(module.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor)


# Overrides.


class Weighing(Fit):
    """Finds the loss with Fit's help."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True)
        loss = loss + outputs[0].square().mean()
        return (loss, outputs) if return_outputs else loss


class Twice(Fit):
    """Sends a batch through the model twice, as SimCSE does."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        first, outputs = super().compute_loss(model, inputs, True)
        second, others = super().compute_loss(model, inputs, True)
        return first + second + (outputs[0] * others[1]).sum()


class Direct(Fit):
    """Calls the model by itself."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return model(**inputs)[0].square().mean()


class OwnBackward(Fit):
    """Goes backward by itself."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = self.compute_loss(model, inputs)
        loss.backward()
        return loss.detach()


def train_with(fit: type[Fit], pieces: int | None) -> dict[str, Tensor]:
    torch.manual_seed(3)
    module = Towers()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    fit(
        module, pairs(ROWS), max_steps=2, per_device_train_batch_size=ROWS, contrastive_chunks=pieces,
        learning_rate=0.1, progress=False, report=False, loggers=(), save_strategy="no", max_grad_norm=0.0,
    ).train()  # fmt: skip
    return module.state_dict()


@pytest.mark.parametrize("fit", [Weighing, Twice])
def test_an_override_of_compute_loss_that_asks_super(
    fit: type[Fit], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole, in_pieces = train_with(fit, None), train_with(fit, PIECES)
    for name, tensor in whole.items():
        torch.testing.assert_close(in_pieces[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (Direct, r"contrastive_chunks=3 has no effect: Direct.compute_loss calls the model itself.*super\(\)"),
        (OwnBackward, r"contrastive_chunks=3: .*training_step goes backward by itself.*super\(\).training_step"),
    ],
)
def test_an_override_that_passes_it_by_is_refused(
    fit: type[Fit], message: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        train_with(fit, PIECES)


# What is refused.


class Counting(Towers):
    """Counts its forwards in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, left: Tensor, right: Tensor) -> Any:
        self.forwards += 1
        return super().forward(left, right)


class Frozen(Towers):
    """Nothing of it is trained but a parameter that isn't used."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.unused = nn.Parameter(torch.zeros(2))

    def loss(self, outputs: Any, batch: Any) -> Any:
        return outputs[0].square().mean()


class Scaled(Towers):
    """Gives what isn't of the samples."""

    def forward(self, left: Tensor, right: Tensor) -> Any:
        return (*super().forward(left, right), self.scale.exp())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Counting, "forward changes forwards: the second time would begin with other values"),
        (Frozen, "No gradient leads from the loss to a parameter"),
        (Scaled, r"for a piece of 4 outputs\[2\] is a Tensor of shape \(\).*a parameter can be read there"),
    ],
)
def test_a_module_that_it_is_not_for(make_fit: MakeFit, make: Callable[[], TrainModule], message: str) -> None:
    fit = make_fit(make(), pairs(ROWS), max_steps=2, per_device_train_batch_size=ROWS, contrastive_chunks=PIECES)
    with pytest.raises(ValueError, match=message):
        fit.train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contrastive_chunks": 1}, "contrastive_chunks=1: must be 2 or more pieces"),
        ({"past_index": 0}, "past_index=0: hands an output on .* contrastive_chunks=2 cuts batches"),
        ({"torch_compile": "update"}, "contrastive_chunks=2: computes a micro-batch in pieces.*torch_compile=True"),
        ({"optim": "lomo", "max_grad_norm": 0.0}, "LOMO and AdaLOMO update with every backward, and each piece"),
        ({"strategy": "dp"}, "contrastive_chunks=2: can't be had under strategy='dp'"),
        pytest.param(
            {"strategy": "deepspeed"},
            "contrastive_chunks=2: can't be had under strategy='deepspeed'",
            marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed"),
        ),
        ({"strategy": DDP(static_graph=True)}, "contrastive_chunks=2: .*static_graph=True needs all backwards"),
    ],
)
def test_what_it_can_not_be_had_with(make_fit: MakeFit, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_fit(Towers(), pairs(ROWS), **{"contrastive_chunks": 2, **arguments})


class LoggingInForward(Towers):
    """Logs the mean of a piece's inputs."""

    def forward(self, left: Tensor, right: Tensor) -> Any:
        self.log("mean_of_left", left.mean())
        return super().forward(left, right)


def test_what_forward_logs_is_the_mean_over_the_micro_batch(make_fit: MakeFit) -> None:
    # Pieces of 4, 3 and 3 rows, each computed twice: the mean of their means would be another number.
    data = pairs(ROWS)
    arguments = {"max_steps": 1, "per_device_train_batch_size": ROWS, "contrastive_chunks": PIECES}
    fit = make_fit(LoggingInForward(), data, logging_steps=1, **arguments)
    fit.train()
    [logged] = [log["mean_of_left"] for log in fit.state.log_history if "mean_of_left" in log]
    assert logged == pytest.approx(torch.stack([row["left"] for row in data]).double().mean().item(), rel=1e-6)
