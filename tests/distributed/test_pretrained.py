"""Models in directories: every placement reads what from_pretrained loads, and each rank reads its part alone."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained_models import loaded, save
from ranks import Ranks
from safetensors.torch import load_file
from stratagem import TrainModule
from training import make_fit, token_rows

pytestmark = pytest.mark.slow

FAMILIES = ("llama", "tied llama", "qwen2", "gpt2", "masked bert", "vit", "qwen3-moe")
DECODERS = ("llama", "tied llama", "qwen2")  # with a ready plan for tensor parallelism
PLACEMENTS: list[tuple[int, str, dict[str, Any], tuple[str, ...]]] = [
    (2, "ddp", {}, FAMILIES),
    (2, "fsdp1", {}, FAMILIES),
    (2, "fsdp2", {}, FAMILIES),
    (2, "fsdp2", {"cpu_offload": True}, DECODERS),
    (2, "tp", {}, DECODERS),
    (4, "fsdp2", {"tensor_parallel": 2}, DECODERS),
    *((2, f"deepspeed_stage_{stage}" if stage else "deepspeed", {}, FAMILIES[2:5]) for stage in (0, 1, 2, 3)),
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where each model lies, in several files."""
    directory = tmp_path_factory.mktemp("models")
    return {name: save(name, directory, shard_size="30KB") for name in FAMILIES}


def export_each(paths: list[Path], directory: Path, **arguments: Any) -> list[int]:
    """Place each model and export it at once; how many bytes of the weights this rank read."""
    counts = []
    for path in paths:
        read, count = os.preadv, 0

        def counted(file: int, into: Any, offset: int, read: Any = read) -> int:
            nonlocal count
            count += len(into[0])
            return read(file, into, offset)

        module = TrainModule.wrap(path)
        os.preadv = counted
        try:
            fit = make_fit(module, token_rows(8), **arguments)
            fit.place()
        finally:
            os.preadv = read
        counts.append(count)
        fit.export(directory / f"{path.name}.safetensors")
    return counts


@pytest.mark.parametrize(("world", "strategy", "options", "names"), PLACEMENTS, ids=str)
def test_weights_are_those_of_from_pretrained(
    ranks: dict[int, Ranks],
    tmp_path: Path,
    directories: dict[str, Path],
    world: int,
    strategy: str,
    options: dict[str, Any],
    names: tuple[str, ...],
) -> None:
    paths = [directories[name] for name in names]
    ranks[world].run(export_each, paths=paths, directory=tmp_path, strategy=strategy, options=options)
    for path in paths:
        expected, found = loaded(path).state_dict(), load_file(tmp_path / f"{path.name}.safetensors")
        assert expected.keys() - found.keys() <= set(loaded(path).all_tied_weights_keys)
        for name, weight in found.items():
            assert torch.equal(weight, expected[name]), (path.name, name)
