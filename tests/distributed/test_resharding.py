"""Checkpoints under any strategy and number of ranks, continued under any other."""

import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from safetensors import safe_open
from safetensors.torch import load_file
from stratagem import Callback
from stratagem.framework.checkpoint import CheckpointError
from stratagem.precision.mixed import FP16Mixed
from test_late_layers import LateTower, LiveBytes
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from training import WIDTH, Tagger, make_fit, token_rows, train

pytestmark = pytest.mark.slow

SAVED_AT = 8  # 128 of 203 samples: in the middle of an epoch
# Name to (ranks, strategy, options, samples per rank, micro-batches): 16 samples an update, cut in different ways.
PLACEMENTS: dict[str, tuple[int, str, dict[str, Any], int, int]] = {
    "single": (1, "single", {}, 8, 2),
    "ddp-2": (2, "ddp", {}, 8, 1),
    "fsdp1-2": (2, "fsdp1", {}, 4, 2),
    "fsdp2-2": (2, "fsdp2", {}, 2, 4),
    "fsdp2-4": (4, "fsdp2", {}, 4, 1),
    "tp-2": (2, "tp", {}, 4, 4),
    "fsdp2xtp-4": (4, "fsdp2", {"tensor_parallel": 2}, 4, 2),
}
everywhere = pytest.mark.parametrize("placement", list(PLACEMENTS))


def arguments_of(placement: str) -> dict[str, Any]:
    _, strategy, options, batch, accumulation = PLACEMENTS[placement]
    return {
        "strategy": strategy,
        "options": options,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
    }


def run(ranks: dict[int, Ranks], placement: str, job: Any, **arguments: Any) -> list[Any]:
    """A job on the placement's ranks, or in this process."""
    world = PLACEMENTS[placement][0]
    given = {**arguments_of(placement), **arguments}
    return [job(**given)] if placement == "single" else ranks[world].run(job, **given)


class Dropping(Tagger):
    """Its losses depend on each rank's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.drop(self.mix(self.embed(tokens)) + self.position[self.order])
        for block in self.blocks:
            x = self.drop(block(x))
        return self.head(x)


@pytest.fixture(scope="module")
def saved(ranks: dict[int, Ranks], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint after 8 of 20 updates, by every placement."""
    paths = {}
    for placement in PLACEMENTS:
        output = tmp_path_factory.mktemp(placement)
        saving = {"save_strategy": "steps", "save_steps": SAVED_AT, "output_dir": str(output)}
        run(ranks, placement, train, export=output / "end.safetensors", **saving)
        paths[placement] = output / f"checkpoint-{SAVED_AT}"
    return paths


@pytest.fixture(scope="module")
def one_device(saved: dict[str, Path]) -> dict[str, list[Any]]:
    """The uninterrupted curves of one device."""
    return train(**arguments_of("single"))


def continue_each(paths: dict[str, Path], directory: Path, **arguments: Any) -> dict[str, dict[str, Any]]:
    """Continue several checkpoints to the end; the and the final weights as files in ``directory``."""
    return {
        name: train(resume=path, export=directory / f"{name}.safetensors", **arguments) for name, path in paths.items()
    }


@everywhere
def test_any_checkpoint_continues(
    ranks: dict[int, Ranks],
    saved: dict[str, Path],
    one_device: dict[str, list[Any]],
    tmp_path: Path,
    placement: str,
) -> None:
    """``placement`` continues those of all placements: 49 pairs in all."""
    results = run(ranks, placement, continue_each, paths=saved, directory=tmp_path)
    weights = load_file(saved["single"].parent / "end.safetensors")
    for result in results:
        assert result == results[0]
    for source, continued in results[0].items():
        assert len(continued["loss"]) == 20, source
        assert continued["loss"] == pytest.approx(one_device["loss"], rel=1e-5), source
        assert continued["grad_norm"] == pytest.approx(one_device["grad_norm"], rel=1e-4), source
        assert continued["learning_rate"] == one_device["learning_rate"], source
        for name, weight in load_file(tmp_path / f"{source}.safetensors").items():
            torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-5)


@everywhere
def test_same_placement_is_bitwise(ranks: dict[int, Ranks], tmp_path: Path, placement: str) -> None:
    saving = {"save_strategy": "steps", "save_steps": SAVED_AT, "output_dir": str(tmp_path / "output")}
    whole = run(ranks, placement, train, module=Dropping, export=tmp_path / "whole.safetensors", **saving)
    continued = run(
        ranks,
        placement,
        train,
        module=Dropping,
        export=tmp_path / "continued.safetensors",
        resume=tmp_path / "output" / f"checkpoint-{SAVED_AT}",
    )
    assert continued == whole
    weights = load_file(tmp_path / "continued.safetensors")
    for name, weight in load_file(tmp_path / "whole.safetensors").items():
        assert torch.equal(weights[name], weight), name


def replicated_weights(resume: Path, **arguments: Any) -> tuple[int, dict[str, list[float]]]:
    """This rank's place among the data-parallel ranks, and, after training, its weights that nothing cuts."""
    fit = make_fit(Dropping(), token_rows(), **arguments)
    fit.train(resume_from_checkpoint=resume)
    whole = {
        name: parameter.to_local() if isinstance(parameter, DTensor) else parameter
        for name, parameter in fit.strategy.named_parameters().items()
        if "up" not in name and "down.weight" not in name
    }
    return fit.strategy.data_rank, {name: parameter.flatten().tolist() for name, parameter in whole.items()}


@pytest.mark.parametrize("source", ["single", "ddp-2"])
@pytest.mark.parametrize("placement", ["tp-2", "fsdp2xtp-4"])
def test_ranks_that_share_samples_draw_alike(
    ranks: dict[int, Ranks], tmp_path: Path, source: str, placement: str
) -> None:
    """Where one rank's random state came back on two, dropout must not drive their copies of a weight apart."""
    saving = {"save_strategy": "steps", "save_steps": SAVED_AT, "output_dir": str(tmp_path)}
    run(ranks, source, train, module=Dropping, **saving)
    copies: dict[int, Any] = {}
    for data_rank, weights in run(ranks, placement, replicated_weights, resume=tmp_path / f"checkpoint-{SAVED_AT}"):
        assert weights == copies.setdefault(data_rank, weights)
    assert len(copies) == PLACEMENTS[placement][0] // 2


@pytest.mark.parametrize("placement", ["ddp-2", "fsdp2xtp-4"])
def test_formats_of_16_bits_continue(ranks: dict[int, Ranks], tmp_path: Path, placement: str) -> None:
    """The loss scale goes along: saved by one strategy, it is the other's."""
    arguments = {"precision": FP16Mixed(initial_scale=256.0, growth_interval=5), "max_grad_norm": 0.0, "max_steps": 12}
    saving = {"save_strategy": "steps", "save_steps": SAVED_AT, "output_dir": str(tmp_path)}
    whole = run(ranks, "fsdp2-2", train, **arguments, **saving)
    continued = run(ranks, placement, train, resume=tmp_path / f"checkpoint-{SAVED_AT}", **arguments)
    assert continued[0]["loss_scale"] == whole[0]["loss_scale"] == [256.0] * 4 + [512.0] * 5 + [1024.0] * 3
    assert continued[0]["loss"] == pytest.approx(whole[0]["loss"], rel=0.03)


def test_global_batch_may_change(ranks: dict[int, Ranks], saved: dict[str, Path]) -> None:
    """Half the global batch from the middle of the epoch on: the samples go on where they were, on 1 and on 4 ranks."""
    expected = train(resume=saved["single"], per_device_train_batch_size=8)
    halves = {"fsdp2-4": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}}
    halves["fsdp2xtp-4"] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    for placement, half in halves.items():
        for result in run(ranks, placement, train, resume=saved["ddp-2"], **half):
            assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert result["epoch"] == expected["epoch"]


# What is in the files.


def test_files_have_one_format(saved: dict[str, Path]) -> None:
    """Names, shapes and values of one checkpoint are those of another, whoever wrote it."""
    expected = contents(saved["single"])
    assert {"model/embed.weight", "model/mix.weight", "model/position", "model/order"} <= expected.keys()
    assert "model/head.weight" not in expected  # tied to the embedding, stored once
    assert "optimizer/embed.weight/exp_avg" in expected
    assert not any(name.startswith("optimizer/mix.") for name in expected)  # frozen
    for placement, path in saved.items():
        found = contents(path)
        assert found.keys() == expected.keys(), placement
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{placement}: {name}")


def contents(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, joined from its parts by their offsets."""
    parts: dict[str, list[tuple[list[int], Tensor]]] = {}
    for file in sorted(checkpoint.glob("*/*.safetensors")):
        with safe_open(file, framework="pt") as content:
            offsets = json.loads((content.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in content.keys():  # noqa: SIM118 (not a dict)
                tensor = content.get_tensor(name)
                begin = offsets.get(name, {}).get("saved_offsets") or [0] * tensor.ndim
                parts.setdefault(f"{file.parent.name}/{name}", []).append((begin, tensor))
    return {name: joined(pieces) for name, pieces in parts.items()}


def joined(pieces: list[tuple[list[int], Tensor]]) -> Tensor:
    ends = [[b + n for b, n in zip(begin, piece.shape, strict=True)] for begin, piece in pieces]
    whole = pieces[0][1].new_zeros([max(sizes) for sizes in zip(*ends, strict=True)])
    for begin, piece in pieces:
        whole[tuple(slice(b, b + n) for b, n in zip(begin, piece.shape, strict=True))] = piece
    return whole


def test_nothing_is_pickled(saved: dict[str, Path]) -> None:
    for path in saved.values():
        assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".json", ".jsonl", ".safetensors"}


def saving_in_shards(output: Path, **arguments: Any) -> tuple[int, int, int]:
    """Bytes of tensors that saving made at its peak, of this rank's state, and of the whole state."""
    rows = [{"x": torch.randn(64, generator=torch.Generator().manual_seed(i))} for i in range(8)]
    fit = make_fit(SquaredTower(), rows, output_dir=str(output), max_steps=1, **arguments)
    fit.train()
    moments = [value for entries in fit.optimizer.state.values() for value in entries.values()]
    tensors = [*fit.strategy.named_parameters().values(), *(value for value in moments if value.ndim)]
    own = sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)
    with LiveBytes() as memory:
        fit.save_checkpoint()
    return own, memory.peak, sum(tensor.nbytes for tensor in tensors)


class SquaredTower(LateTower):
    """Trains 16 blocks to put out nothing."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return outputs.square().mean()


@pytest.mark.parametrize(("world", "options"), [(2, {}), (4, {}), (4, {"tensor_parallel": 2})], ids=str)
def test_each_rank_writes_its_shards(
    ranks: dict[int, Ranks], tmp_path: Path, world: int, options: dict[str, Any]
) -> None:
    for own, peak, whole in ranks[world].run(saving_in_shards, output=tmp_path, strategy="fsdp2", options=options):
        assert own == pytest.approx(whole / world, rel=0.02)
        assert peak <= 1.25 * own  # no rank gathers: at most a copy of what it has
        files = (tmp_path / "checkpoint-1").glob("*/shard-*.safetensors")
        sizes = [0] * world
        for file in files:
            sizes[int(file.name.split("-")[1]) - 1] += file.stat().st_size
        assert max(sizes) < 1.2 * whole / world


# In the background.


@pytest.mark.parametrize("placement", ["ddp-2", "fsdp1-2", "fsdp2-4", "fsdp2xtp-4"])
def test_background_saves_are_the_same(
    ranks: dict[int, Ranks], saved: dict[str, Path], tmp_path: Path, placement: str
) -> None:
    saving = {"save_strategy": "steps", "save_steps": SAVED_AT, "output_dir": str(tmp_path), "async_save": True}
    run(ranks, placement, train, **saving)
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-16", "checkpoint-20", "checkpoint-8"]
    expected, found = contents(saved[placement]), contents(tmp_path / f"checkpoint-{SAVED_AT}")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


class FillDisk(Callback):
    """On rank 1, no file may grow beyond 2000 bytes once the first checkpoint is there."""

    def on_save(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        context["fit"].saver.finish()
        if os.environ["RANK"] == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def failing_write(**arguments: Any) -> tuple[str, int]:
    """What a run whose second checkpoint one rank can't write ends with, and the update it ends at."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fit = make_fit(Tagger(), token_rows(), callbacks=[FillDisk()], async_save=True, **arguments)
    try:
        fit.train()
    except CheckpointError as error:
        return str(error), fit.state.global_step
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "nothing failed", fit.state.global_step


def test_a_write_that_fails_in_the_background_of_one_rank_ends_all_at_one_update(
    ranks: dict[int, Ranks], tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path), "max_steps": 200}
    found = ranks[2].run(failing_write, strategy="ddp", **saving)
    assert found[0] == found[1]
    message, update = found[0]
    assert "rank 1" in message and "File too large" in message
    assert 4 <= update < 200
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


# What can't be used.


class Larger(Tagger):
    """A block more."""

    def __init__(self) -> None:
        super().__init__(blocks=3)


class Smaller(Tagger):
    """A block less."""

    def __init__(self) -> None:
        super().__init__(blocks=1)


class Wider(Tagger):
    """Another shape under the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].up = nn.Linear(WIDTH, 8 * WIDTH)
        self.blocks[1].down = nn.Linear(8 * WIDTH, WIDTH)


class Thawed(Tagger):
    """Trains the layer that was frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.mix.requires_grad_(True)


def refused(resume: Path | bool, module: type[Tagger] = Tagger, **arguments: Any) -> tuple[str, bool]:
    """The error of resuming on this rank, and whether the module is as it was before."""
    torch.manual_seed(0)
    fit = make_fit(module(), token_rows(), **arguments)
    fit.place()
    before = [tensor.clone() for tensor in fit.strategy.model_state().values()]
    try:
        fit.train(resume_from_checkpoint=resume)
    except CheckpointError as error:
        after = fit.strategy.model_state().values()
        return str(error), all(bool((a == b).all()) for a, b in zip(before, after, strict=True))
    return "nothing was refused", False


@pytest.mark.parametrize("placement", ["ddp-2", "fsdp1-2", "fsdp2-4", "tp-2", "fsdp2xtp-4"])
def test_checkpoint_of_another_model_is_refused(
    ranks: dict[int, Ranks], saved: dict[str, Path], placement: str
) -> None:
    resume = {"resume": saved["fsdp2-2"]}
    expected = {
        Smaller: ("the model lacks: blocks.1.", "blocks.1.down.bias", "blocks.1.up.weight"),
        Larger: ("the checkpoint lacks: blocks.2.", "blocks.2.up.weight"),
        Wider: ("of another shape: ", "blocks.1.up.weight (48, 6) (checkpoint: (24, 6))"),
        Thawed: ("no optimizer state for mix.",),
    }
    for module, names in expected.items():
        results = run(ranks, placement, refused, module=module, **resume)
        assert results == [results[0]] * len(results)
        error, is_as_before = results[0]
        assert str(saved["fsdp2-2"]) in error
        assert [name for name in names if name not in error] == [], error
        assert is_as_before


@pytest.fixture
def damaged(saved: dict[str, Path], tmp_path: Path) -> Iterator[Path]:
    """A copy of a checkpoint by 2 ranks, to be damaged."""
    path = tmp_path / f"checkpoint-{SAVED_AT}"
    shutil.copytree(saved["fsdp2-2"], path)
    yield path


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize("placement", ["ddp-2", "fsdp2-4"])
@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("model/shard-00001-*.safetensors", flip_a_bit, "was altered"),
        ("model/shard-00002-*.safetensors", flip_a_bit, "was altered"),
        ("optimizer/shard-00002-*.safetensors", cut_short, "was altered"),
        ("state.json", flip_a_bit, "was altered"),
        ("random-00001.json", Path.unlink, "is missing"),
        ("manifest.json", cut_short, "can't be read"),
        ("manifest.json", Path.unlink, "was never finished"),
    ],
)
def test_damage_is_found_on_every_rank(
    ranks: dict[int, Ranks], damaged: Path, placement: str, name: str, damage: Any, says: str
) -> None:
    file = next(damaged.glob(name))
    damage(file)
    results = run(ranks, placement, refused, resume=damaged)
    assert results == [results[0]] * len(results)
    error, is_as_before = results[0]
    assert says in error and file.name in error
    assert is_as_before


def continue_the_newest(output: Path, **arguments: Any) -> dict[str, Any]:
    return train(output_dir=str(output), resume=True, **arguments)


@pytest.mark.parametrize("placement", ["ddp-2", "fsdp2xtp-4"])
def test_damaged_newest_is_passed_over(
    ranks: dict[int, Ranks], saved: dict[str, Path], one_device: dict[str, Any], tmp_path: Path, placement: str
) -> None:
    for step in (8, 16):
        shutil.copytree(saved["fsdp2-2"].parent / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    flip_a_bit(next((tmp_path / "checkpoint-16").glob("model/shard-00002-*")))
    for result in run(ranks, placement, continue_the_newest, output=tmp_path):
        assert len(result["loss"]) == 20
        assert result["loss"] == pytest.approx(one_device["loss"], rel=1e-5)


@pytest.mark.parametrize("placement", ["ddp-2", "fsdp2-4"])
def test_checkpoint_that_is_not_there(ranks: dict[int, Ranks], tmp_path: Path, placement: str) -> None:
    results = run(ranks, placement, refused, resume=tmp_path / "checkpoint-5")
    assert results == [results[0]] * len(results)
    assert "doesn't exist" in results[0][0]
