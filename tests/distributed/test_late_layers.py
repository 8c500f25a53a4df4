"""Layers made in ``build()``: the same initial values under every strategy, and never a whole model on one rank."""

import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file
from stratagem import TrainModule
from test_collectives import Traffic
from test_pretrained import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import LENGTH, VOCABULARY, WIDTH, Block, Tagger, make_fit, token_rows, train

pytestmark = pytest.mark.slow

PLACEMENTS: list[tuple[int, str, dict[str, Any]]] = [
    (2, "ddp", {}),
    (2, "fsdp1", {}),
    (4, "fsdp1", {"replicas": 2}),
    (2, "fsdp2", {}),
    (4, "fsdp2", {}),
    (2, "fsdp2", {"cpu_offload": True}),
    (4, "fsdp2", {"replicas": 2}),
    (2, "tp", {}),
    (4, "fsdp2", {"tensor_parallel": 2}),
]
everywhere = pytest.mark.parametrize(("world", "strategy", "options"), PLACEMENTS, ids=str)


class LateTagger(Tagger):
    """All of a Tagger is made late, and a parameter of the module's own."""

    def __init__(self) -> None:
        TrainModule.__init__(self)

    def build(self) -> None:
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.head.weight = self.embed.weight
        self.register_buffer("position", torch.randn(LENGTH, WIDTH))
        self.register_buffer("order", torch.randperm(LENGTH))
        self.gain = nn.Parameter(torch.ones(VOCABULARY))

    def init_weights(self, layer: nn.Module) -> None:
        if layer is self:
            nn.init.normal_(self.gain, mean=1.0)
        else:
            super().init_weights(layer)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.gain


class LateVocabulary(LateTagger):
    """Its tied weight has 12 rows, which tensor parallelism cuts."""

    def build(self) -> None:
        super().build()
        self.embed = nn.Embedding(VOCABULARY + 1, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY + 1, bias=False)
        self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.ones(VOCABULARY + 1))

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {**super().tensor_parallel_plan(), "embed": "embedding", "head": "colwise_gather"}


class HalfLate(Tagger):
    """Its embedding is there from the start (with other values on each rank: rank 0's count), the rest is made late."""

    def __init__(self) -> None:
        TrainModule.__init__(self)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.register_buffer("position", torch.randn(LENGTH, WIDTH))
        self.register_buffer("order", torch.randperm(LENGTH))

    def build(self) -> None:
        self.mix = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.head.weight = self.embed.weight


class Initialised(LateTagger):
    """Its layers are filled in ways that work on a part of a layer, and in ways that need the whole of it."""

    def build(self) -> None:
        super().build()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=2)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros(()))

    def init_weights(self, layer: nn.Module) -> None:
        if layer is self.mix:
            nn.init.trunc_normal_(layer.weight, std=0.5)
            nn.init.normal_(layer.bias).mul_(2).add_(1)
        elif layer is self.blocks[0].up:
            nn.init.orthogonal_(layer.weight)
            nn.init.uniform_(layer.bias)
        elif layer is self.blocks[1].up:
            layer.weight = nn.Parameter(torch.randn_like(layer.weight, dtype=torch.float32).t().contiguous().t())
            nn.init.uniform_(layer.bias)
        elif layer is self.blocks[1].down:
            layer.weight.data.normal_()[:2] = 0.5
            layer.bias.copy_(torch.arange(float(len(layer.bias))))
        else:
            super().init_weights(layer)
        self.count += 1


class LateTower(TrainModule):
    """Big enough (16 blocks of 128 KiB) that one layer is little beside the whole."""

    def build(self) -> None:
        self.blocks = nn.ModuleList(Block(64, 256) for _ in range(16))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}


def place_and_export(directory: Path, **arguments: Any) -> list[bool]:
    """Place each module and export it at once; whether its tie held."""
    ties = []
    for module in (LateTagger, LateVocabulary, HalfLate, Initialised):
        torch.manual_seed(int(os.environ.get("RANK", "0")))
        fit = make_fit(module(), token_rows(20), **arguments)
        fit.export(directory / f"{module.__name__}.safetensors")
        ties.append(fit.module.head.weight is fit.module.embed.weight)
    return ties


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the initial weights of one device lie."""
    directory = tmp_path_factory.mktemp("one_device")
    assert place_and_export(directory) == [True] * 4
    return directory


@everywhere
def test_initial_values_are_equal(
    ranks: dict[int, Ranks], tmp_path: Path, one_device: Path, world: int, strategy: str, options: dict[str, Any]
) -> None:
    ties = ranks[world].run(place_and_export, directory=tmp_path, strategy=strategy, options=options)
    assert ties == [[True] * 4] * world
    for file in one_device.iterdir():
        expected, found = load_file(file), load_file(tmp_path / file.name)
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            assert torch.equal(found[name], weight), (file.stem, name)


def test_initial_values_are_the_layers_own(one_device: Path) -> None:
    weights = load_file(one_device / "LateTagger.safetensors")
    first, second = (weights[f"blocks.{i}.up.weight"] for i in range(2))
    assert not torch.equal(first, second)
    # torch's Linear: uniform in ±1/√inputs.
    assert first.abs().max() <= WIDTH**-0.5
    assert first.std() == pytest.approx(WIDTH**-0.5 / 3**0.5, rel=0.15)
    assert torch.equal(weights["blocks.0.norm.weight"], torch.ones(WIDTH))
    # What was there before build() is left as it was, though a late layer shares it.
    torch.manual_seed(0)
    assert torch.equal(load_file(one_device / "HalfLate.safetensors")["embed.weight"], HalfLate().embed.weight)


@pytest.mark.parametrize(
    ("world", "strategy", "options"),
    [(2, "fsdp1", {}), (4, "fsdp2", {}), (2, "tp", {}), (4, "fsdp2", {"tensor_parallel": 2})],
    ids=str,
)
def test_late_layers_train(ranks: dict[int, Ranks], world: int, strategy: str, options: dict[str, Any]) -> None:
    expected = train(module=LateTagger, per_device_train_batch_size=16)
    sharing = 1 if strategy == "tp" else world // options.get("tensor_parallel", 1)
    found = ranks[world].run(
        train, module=LateTagger, strategy=strategy, options=options, per_device_train_batch_size=16 // sharing
    )
    assert found[0]["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found[0]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


class LiveBytes(TorchDispatchMode):
    """Adds up the memory of the tensors that operations make in here, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor) and not tensor.is_meta:
                self.note(tensor.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.live -= self.storages.pop(key)


def memory_of_placing(**arguments: Any) -> tuple[int, int, int]:
    """Bytes of this rank's parameters, the most that lived while it was placed, and those of the whole model."""
    fit = make_fit(LateTower(), [{"x": torch.zeros(64)}] * 8, **arguments)
    with LiveBytes() as memory:
        fit.place()
    local = 0
    for parameter in fit.strategy.named_parameters().values():
        shard = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local += shard.nbytes
    whole = sum(parameter.nbytes for parameter in reference_tower().parameters())
    return local, memory.peak, whole


def reference_tower() -> LateTower:
    """The same layers made in the ordinary way."""
    tower = LateTower()
    tower.build()
    return tower


def test_live_bytes_counts() -> None:
    """The instrument itself: one device holds the whole model and, for a moment, a second copy of one layer."""
    local, peak, whole = memory_of_placing()
    assert local == whole == 16 * 4 * (2 * 64 * 256 + 256 + 64 + 2 * 64)
    assert whole <= peak < 1.1 * whole


@pytest.mark.parametrize(
    ("world", "strategy", "options", "replicas"),
    [
        (2, "fsdp1", {}, 1),
        (2, "fsdp2", {}, 1),
        (4, "fsdp2", {}, 1),
        (4, "fsdp2", {"replicas": 2}, 2),
        (2, "tp", {}, 1),
        (4, "fsdp2", {"tensor_parallel": 2}, 1),
    ],
    ids=str,
)
def test_no_rank_holds_the_whole_model(
    ranks: dict[int, Ranks], world: int, strategy: str, options: dict[str, Any], replicas: int
) -> None:
    block = 4 * (2 * 64 * 256 + 256 + 64 + 2 * 64)
    for local, peak, whole in ranks[world].run(memory_of_placing, strategy=strategy, options=options):
        share = whole * replicas / world
        # Under tensor parallelism alone, norms and the biases of "rowwise" layers are whole on each rank.
        assert local == pytest.approx(share, rel=0.02)
        assert peak < share + 2.5 * block  # a block, whole, on its way into shards
        assert peak < 0.75 * whole


class Pretrained(LateTagger):
    """The values of its blocks are given; ``asked`` holds what was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, int] = {}
        self.filled: list[str] = []

    def initial_values(self, name: str, part: tuple[slice, ...]) -> Tensor | None:
        if not name.startswith("blocks.") or name == "blocks.1.up.bias":
            return None
        whole = torch.arange(float(self.get_parameter(name).shape.numel()), dtype=torch.float64)
        values = whole.view(self.get_parameter(name).shape)[part]
        self.asked[name] = self.asked.get(name, 0) + values.numel()
        return values

    def init_weights(self, layer: nn.Module) -> None:
        self.filled += [name for name, module in self.named_modules() if module is layer]
        super().init_weights(layer)


def place_pretrained(file: Path, **arguments: Any) -> dict[str, Any]:
    """Numbers of values that this rank was given, the layers that it filled, and its local number of parameters."""
    module = Pretrained()
    fit = make_fit(module, token_rows(20), **arguments)
    fit.export(file)
    assert all(p.dtype == torch.float32 for p in fit.module.parameters())
    return {"asked": sum(module.asked.values()), "filled": module.filled}


@everywhere
def test_given_values_are_asked_for_by_part(
    ranks: dict[int, Ranks], tmp_path: Path, world: int, strategy: str, options: dict[str, Any]
) -> None:
    place_pretrained(tmp_path / "single.safetensors")
    found = ranks[world].run(place_pretrained, file=tmp_path / "it.safetensors", strategy=strategy, options=options)
    expected, weights = load_file(tmp_path / "single.safetensors"), load_file(tmp_path / "it.safetensors")
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
    up = weights["blocks.0.up.weight"]
    assert torch.equal(up, torch.arange(float(up.numel())).view(up.shape))
    assert not torch.equal(weights["blocks.1.up.bias"], torch.arange(float(len(weights["blocks.1.up.bias"]))))
    for rank in found:
        assert set(rank["filled"]) == {"", "embed", "mix", "head", "blocks.1.up"}
    if strategy == "fsdp2" and "tensor_parallel" not in options:
        given = sum(weight.numel() for name, weight in weights.items() if name.startswith("blocks."))
        given -= weights["blocks.1.up.bias"].numel()
        assert sum(rank["asked"] for rank in found) == given * options.get("replicas", 1)


class HalfLateTower(LateTower):
    """Half of it is made in ``__init__``, so that rank 0's values must reach the others."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.ModuleList(Block(64, 256) for _ in range(4))

    def build(self) -> None:
        self.blocks = nn.ModuleList(Block(64, 256) for _ in range(4))
        self.blocks.extend(self.early)


def traffic_of_placing(module: type[LateTower], **arguments: Any) -> list[tuple[str, int]]:
    """The operations of process groups while a module is placed, with the bytes of what each sends or receives."""
    fit = make_fit(module(), [{"x": torch.zeros(64)}] * 8, **arguments)
    with Traffic() as traffic:
        fit.place()
    sent = [message for messages in traffic.messages.values() for message in messages]
    return [(name, numbers * getattr(torch, dtype).itemsize) for name, dtype, numbers in sent]


@pytest.mark.parametrize(
    ("world", "strategy", "options"),
    [
        *[(2, strategy, {}) for strategy in ("ddp", "fsdp1", "fsdp2", "tp", "deepspeed_stage_0")],
        (4, "fsdp2", {"tensor_parallel": 2}),
    ],
    ids=str,
)
def test_late_layers_are_not_sent(ranks: dict[int, Ranks], world: int, strategy: str, options: dict[str, Any]) -> None:
    block = 4 * (2 * 64 * 256 + 256 + 64 + 2 * 64)
    arguments = {"strategy": strategy, "options": options}
    for sent in ranks[world].run(traffic_of_placing, module=LateTower, **arguments):
        assert sum(size for _, size in sent) < 2048  # of what ranks say about themselves
    for sent in ranks[world].run(traffic_of_placing, module=HalfLateTower, **arguments):
        large = [(name, size) for name, size in sent if size >= 2048]
        assert large == [("broadcast", 4 * block)]


def test_a_billion_parameters_are_built_in_the_memory_of_a_shard(tmp_path: Path) -> None:
    """In processes of their own: resident memory at its peak."""
    told = run_ranks("big_build.py", tmp_path)
    assert sum(rank["shards"] for rank in told) > 4.0e9
    largest = 4 * 32_000 * 2_048
    for rank in told:
        assert rank["peak"] < 1.15 * rank["shards"] + largest
        assert not rank["padded"]
