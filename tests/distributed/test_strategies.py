"""The curve of losses and norms, and the parameters at its end, are one device's under every strategy and option."""

import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file
from stratagem import FitArguments, TrainModule
from tiny import Float64
from torch import Tensor, nn
from training import SAMPLES, VOCABULARY, WIDTH, Block, Tagger, train

GLOBAL_BATCH = 16  # 203 samples are 12 of these and a short one: 20 updates go past an uneven end

# (ranks, strategy, options, samples per rank, micro-batches): always 16 samples an update. With the 11 samples of the
# short update, fsdp2 on 4 ranks has micro-batches of 8 and 3, so one rank's last one is empty.
PLACEMENTS: dict[str, tuple[int, str, dict[str, Any], int, int]] = {
    "ddp-2": (2, "ddp", {}, 4, 2),
    "ddp-4": (4, "ddp", {}, 4, 1),
    "fsdp1-2": (2, "fsdp1", {}, 4, 2),
    "fsdp2-2": (2, "fsdp2", {}, 4, 2),
    "fsdp2-4": (4, "fsdp2", {}, 2, 2),
    "fsdp1-hybrid-4": (4, "fsdp1", {"replicas": 2}, 2, 2),
    "fsdp2-hybrid-4": (4, "fsdp2", {"replicas": 2}, 2, 2),
    "tp-2": (2, "tp", {}, 8, 2),
    "fsdp2xtp-4": (4, "fsdp2", {"tensor_parallel": 2}, 4, 2),
}
TOLERANCES = {"tp": 1e-4, "fsdp2xtp": 1e-4}  # else 1e-6
QUICK = ("ddp-2", "fsdp2-2")  # run without -m slow, too


def placements(*names: str) -> Any:
    """A test for each placement (all, or those named)."""
    chosen = names or tuple(PLACEMENTS)
    marks = {name: () if name in QUICK and not names else pytest.mark.slow for name in chosen}
    return pytest.mark.parametrize("placement", [pytest.param(name, marks=marks[name]) for name in chosen])


@cache
def single(module: type[TrainModule] = Tagger, precision: Any = "32-true") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Curves and final weights of one device, in this process."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "single.safetensors"
        precision = precision if isinstance(precision, str) else precision()
        logs = train(
            module=module,
            precision=precision,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            export=path,
        )
        return logs, load_file(path)


def check_one_curve(
    ranks: dict[int, Ranks],
    directory: Path,
    placement: str,
    tolerance: float,
    module: type[TrainModule] = Tagger,
    precision: Any = "32-true",
    options: dict[str, Any] | None = None,
) -> dict[str, list[Any]]:
    """Train on one device and as placed (with further options), and compare everything; the curves come back."""
    world, strategy, own_options, batch, accumulation = PLACEMENTS[placement]
    expected, expected_weights = single(module, precision)
    path = directory / "ranks.safetensors"
    found = ranks[world].run(
        train,
        module=module,
        strategy=strategy,
        options={**own_options, **(options or {})},
        precision=precision if isinstance(precision, str) else precision(),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        export=path,
    )
    assert found == [found[0]] * world  # every rank logs the same
    assert len(found[0]["loss"]) == len(expected["loss"]) == 20
    assert found[0]["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    assert found[0]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=10 * tolerance)
    assert found[0]["learning_rate"] == expected["learning_rate"]
    weights = load_file(path)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=10 * tolerance, atol=10 * tolerance)
    return found[0]


@placements()
def test_float32_curves(ranks: dict[int, Ranks], tmp_path: Path, placement: str) -> None:
    tolerance = TOLERANCES.get(placement.rpartition("-")[0], 1e-6)
    curves = check_one_curve(ranks, tmp_path, placement, tolerance)
    assert min(curves["grad_norm"]) > 0.5  # max_grad_norm clipped in every update
    assert curves["loss"][-1] < 0.6 * curves["loss"][0]


# Double precision tells a wrong weight, or a gradient that lacks a rank's share, from rounding.
@placements("ddp-4", "fsdp1-2", "fsdp2-4", "fsdp2-hybrid-4", "fsdp2xtp-4")
def test_float64_curves(ranks: dict[int, Ranks], tmp_path: Path, placement: str) -> None:
    check_one_curve(ranks, tmp_path, placement, 1e-12, precision=Float64)


def test_data_is_uneven() -> None:
    assert SAMPLES % GLOBAL_BATCH == 11
    assert VOCABULARY % 2 and VOCABULARY % 4
    module = Tagger()
    optimizer = module.configure_optimizer(FitArguments())
    assert len(optimizer.param_groups) == 3
    assert module.head.weight is module.embed.weight


# Options.


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ddp_static_graph(ranks: dict[int, Ranks], accumulation: int) -> None:
    arguments = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    expected, _ = single()
    found = ranks[2].run(train, strategy="ddp", options={"static_graph": True}, **arguments)
    assert found[0]["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found[0]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


class Branching(Tagger):
    """One layer is never used, another only by samples that begin with a certain token: in some updates by one rank, in
    some by none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.rare = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        chosen = tokens[:, 0] == 4
        if chosen.any():
            logits = logits + self.rare(self.embed(tokens)) * chosen[:, None, None]
        return logits


@pytest.mark.slow
@pytest.mark.parametrize("as_view", [True, False])
def test_ddp_finds_unused_parameters(ranks: dict[int, Ranks], tmp_path: Path, as_view: bool) -> None:
    options = {"find_unused_parameters": True, "gradient_as_bucket_view": as_view}
    check_one_curve(ranks, tmp_path, "ddp-2", 1e-6, module=Branching, options=options)


class Idle(Tagger):
    """Has a layer that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(WIDTH, WIDTH)


@placements("fsdp2-2", "tp-2", "fsdp2xtp-4")
def test_unused_parameters_stay(ranks: dict[int, Ranks], tmp_path: Path, placement: str) -> None:
    check_one_curve(ranks, tmp_path, placement, 1e-6, module=Idle)


@pytest.mark.slow
def test_fsdp1_decays_unused_parameters(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    expected, weights = single(Idle)
    path = tmp_path / "ranks.safetensors"
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "export": path}
    found = ranks[2].run(train, module=Idle, strategy="fsdp1", **arguments)
    assert found[0]["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    # A gradient of 0 where others have none: AdamW multiplies by 1 - rate x decay in each update, and does no more.
    left = math.prod(1 - 0.1 * 0.01 * (1 - update / 20) for update in range(20))
    torch.testing.assert_close(load_file(path)["unused.weight"], weights["unused.weight"] * left)
    torch.testing.assert_close(load_file(path)["unused.bias"], weights["unused.bias"])


@pytest.mark.slow
def test_ddp_compressed_gradients(ranks: dict[int, Ranks]) -> None:
    expected, _ = single()
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "strategy": "ddp"}
    found = ranks[2].run(train, options={"compress_gradients": "bf16"}, **arguments)[0]
    plain = ranks[2].run(train, **arguments)[0]
    # bfloat16 has 8 bits: each gradient is off by up to 2^-9, and so is their norm.
    assert found["grad_norm"][0] == pytest.approx(expected["grad_norm"][0], rel=2**-9)
    assert found["grad_norm"][0] != pytest.approx(plain["grad_norm"][0], rel=1e-6)  # it was compressed
    assert found["loss"][0] == pytest.approx(expected["loss"][0], rel=1e-6)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("placement", "options"),
    [
        ("fsdp2-2", {"reshard_after_forward": False}),
        ("fsdp2-2", {"cpu_offload": True}),
        ("fsdp1-2", {"reshard_after_forward": False}),
        ("fsdp1-hybrid-4", {"replicas": 2, "reshard_after_forward": False}),
        ("tp-2", {"reshard_after_forward": False}),
    ],
    ids=str,
)
def test_sharding_options(ranks: dict[int, Ranks], tmp_path: Path, placement: str, options: dict[str, Any]) -> None:
    check_one_curve(ranks, tmp_path, placement, 1e-6, options=options)


class OnlyHead(Tagger):
    """Fine-tuning: all is frozen but a small head, all of which may fall into one rank's shard."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.probe = nn.Linear(VOCABULARY, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.probe(super().forward(tokens))

    def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=args.learning_rate, eps=1e-4)


class OnlyBias(Tagger):
    """Trains one bias: fewer numbers than there are ranks with parameters to hold."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.head.bias.requires_grad_(True)

    def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
        return torch.optim.AdamW([self.head.bias], lr=args.learning_rate, eps=1e-4)


@placements("ddp-2", "fsdp1-2", "fsdp2-4", "tp-2", "fsdp2xtp-4")
@pytest.mark.parametrize("module", [OnlyHead, OnlyBias])
def test_mostly_frozen(ranks: dict[int, Ranks], tmp_path: Path, placement: str, module: type[TrainModule]) -> None:
    check_one_curve(ranks, tmp_path, placement, 1e-6, module=module)


# Tensor parallelism's styles.


class VocabularyParallel(Tagger):
    """The embedding and the head that share one weight are cut by class; norms run on positions of their own."""

    CLASSES = 12

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(self.CLASSES, WIDTH)
        self.head = nn.Linear(WIDTH, self.CLASSES, bias=False)
        self.head.weight = self.embed.weight

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {**super().tensor_parallel_plan(), "embed": "embedding", "head": "colwise_gather"}


class SequenceParallel(TrainModule):
    """Between the cut layers, activations are cut by position (4 of them, which 2 ranks divide)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 12, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens[:, :4])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), batch["labels"][:, :4].flatten())

    def count_items(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"][:, :4] != -100).sum())

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {
            "embed": "embedding_to_sequence",
            "blocks.*.norm": "sequence",
            "blocks.*.up": "colwise_from_sequence",
            "blocks.*.down": "rowwise_to_sequence",
            "norm": "sequence",
            "head": "colwise_gather_from_sequence",
        }


@placements("tp-2", "fsdp2xtp-4")
@pytest.mark.parametrize("module", [VocabularyParallel, SequenceParallel])
@pytest.mark.parametrize("loss_parallel", [False, True])
def test_tensor_parallel_styles(
    ranks: dict[int, Ranks], tmp_path: Path, placement: str, module: type[TrainModule], loss_parallel: bool
) -> None:
    check_one_curve(ranks, tmp_path, placement, 1e-5, module=module, options={"loss_parallel": loss_parallel})
