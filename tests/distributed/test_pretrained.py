"""Models in directories: every placement reads what from_pretrained loads, and each rank reads its part alone."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained_models import loaded, save, save_big
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


def test_ranks_together_read_each_byte_once(
    ranks: dict[int, Ranks], tmp_path: Path, directories: dict[str, Path]
) -> None:
    paths = [directories[name] for name in ("llama", "tied llama")]
    counts = ranks[2].run(export_each, paths=paths, directory=tmp_path, strategy="fsdp2")
    for path, read in zip(paths, zip(*counts, strict=True), strict=True):
        stored = sum(t.nbytes for file in path.glob("*.safetensors") for t in load_file(file).values())
        assert sum(read) == stored


def test_a_billion_parameters_are_placed_in_the_memory_of_a_shard(tmp_path: Path) -> None:
    """In processes of their own: resident memory at its peak, which counts no pages of files, as none are mapped."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 17, "num_attention_heads": 16}
    parameters = save_big(tmp_path / "model", **sizes, vocab_size=32000)
    assert parameters > 1.0e9
    largest = 4 * 32000 * 2048  # the embedding in float32
    told = run_ranks("big_model.py", tmp_path / "model")
    assert sum(rank["shards"] for rank in told) == 4 * parameters
    assert sum(rank["read"] for rank in told) == 2 * parameters
    for rank in told:
        assert rank["peak"] < 1.15 * rank["shards"] + largest
        assert rank["wrong"] == 0


def run_ranks(program: str, *arguments: object) -> list[dict[str, Any]]:
    """Start a program as two ranks, and return the JSON that each prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder = Path(__file__).parent
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), str(folder.parent), *sys.path]),
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(folder / program), *map(str, arguments)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0]
    return [json.loads(text.splitlines()[-1]) for text in printed]
