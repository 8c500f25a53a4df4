"""Checkpoints damaged anywhere and forged anyhow: an error that names the file, or the result of the right one."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forging
import pytest
from forging import change_header, result, resume, save, seal
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as draw
from stratagem.framework.checkpoint import CheckpointError
from stratagem.framework.checkpoint.directory import HISTORY
from stratagem.framework.checkpoint.verifying import verify
from tiny import MakeFit

QUICK = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Checkpoint:
    """A checkpoint that is whole again for each example."""

    def __init__(self, make_fit: MakeFit) -> None:
        self.make_fit = make_fit
        self.path = save(make_fit)
        self.whole = shutil.copytree(self.path, self.path.with_name("whole"))
        self.expected = result(resume(make_fit, self.path))
        files = sorted(f.relative_to(self.whole).as_posix() for f in self.whole.rglob("*") if f.is_file())
        self.files = [name for name in files if name != HISTORY]  # that is read with mercy: test_log_history.py

    def begin(self) -> Path:
        shutil.rmtree(self.path)
        shutil.copytree(self.whole, self.path)
        return self.path

    def refuses_or_equals(self, *words: str) -> bool:
        """Whether it is refused, which must name one of the words; else the run must equal the right one."""
        try:
            fit = resume(self.make_fit, self.path)
        except CheckpointError as error:
            assert any(word in str(error) for word in words), error
            return True
        forging.assert_equal(result(fit), self.expected)
        return False


@pytest.fixture
def checkpoint(make_fit: MakeFit) -> Checkpoint:
    return Checkpoint(make_fit)


def test_any_damage_to_any_file_is_told_by_the_files_name(checkpoint: Checkpoint) -> None:
    """Read by ``verify``, which comes before anything else is read."""

    @settings(QUICK, max_examples=200)
    @given(draw.sampled_from(checkpoint.files), draw.data())
    def damage(name: str, data: Any) -> None:
        path = checkpoint.begin()
        file, how = path / name, data.draw(draw.sampled_from(["flip", "cut", "remove", "add", "lengthen"]))
        content = bytearray(file.read_bytes())
        place = data.draw(draw.integers(0, len(content) - 1))
        if how == "flip":
            for index in range(place, min(len(content), place + data.draw(draw.integers(1, 16)))):
                content[index] ^= data.draw(draw.integers(1, 255))
            file.write_bytes(content)
        elif how == "cut":
            file.write_bytes(content[:place])
        elif how == "lengthen":
            file.write_bytes(content + b"\0")
        elif how == "remove":
            file.unlink()
        else:
            name += ".more"
            (path / name).write_bytes(content)
        try:
            verify(path)
        except CheckpointError as error:
            # A flipped byte of the manifest may be in another file's hash or name.
            named = [*checkpoint.files, "checkpoint"] if name == "manifest.json" else [name]
            assert any(word in str(error) for word in named), error
        else:
            # A byte between two fields; or a letter of a name that is only shown.
            assert name == "manifest.json"
            assert json.loads(file.read_text())["files"].keys() == set(checkpoint.files) - {"manifest.json"}

    damage()


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to every field of a JSON value, few of long lists."""
    if at:
        yield at
    entries = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places(entry, (*at, key))


SHOWN_ONLY = ("arguments", "tied", "strategy", "precision")  # they are compared or logged, and computed with by nobody
OTHER_TYPES = [None, True, "text", [], {}, [[]], {"a": 1}, -1, float("nan"), float("inf"), 0.5, 10**30]


def test_any_forged_field_of_the_state_is_refused_or_changes_nothing(checkpoint: Checkpoint) -> None:
    state = json.loads((checkpoint.whole / "state.json").read_text())
    paths = list(places(state))
    counts = {"refused": 0, "equal": 0}

    @settings(QUICK, max_examples=70)
    @given(draw.sampled_from(paths), draw.sampled_from(["remove", *OTHER_TYPES]))
    def forge(path: tuple[Any, ...], value: Any) -> None:
        checkpoint.begin()
        forged = copy.deepcopy(state)
        holder = forged
        for key in path[:-1]:
            holder = holder[key]
        if isinstance(value, str) and value == "remove":
            del holder[path[-1]]
        else:
            holder[path[-1]] = value
        (checkpoint.path / "state.json").write_text(json.dumps(forged))
        seal(checkpoint.path)
        if is_number(value) and is_number(at(state, path)):  # of the right type, it may be what a run saved
            try:
                resume(checkpoint.make_fit, checkpoint.path)
            except CheckpointError as error:
                assert "checkpoint-" in str(error)
        elif checkpoint.refuses_or_equals("state.json", str(checkpoint.path)):
            counts["refused"] += 1
        else:
            counts["equal"] += 1

    forge()
    assert counts["refused"] > counts["equal"]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def forge_headers(checkpoint: Checkpoint, examples: int) -> dict[str, int]:
    """Alter fields of safetensors headers, with the manifest sealed."""
    counts = {"refused": 0, "equal": 0}

    @settings(QUICK, max_examples=examples)
    @given(draw.sampled_from(["model", "optimizer"]), draw.data())
    def forge(folder: str, data: Any) -> None:
        file = forging.shard(checkpoint.begin(), folder)

        def change(header: dict[str, Any]) -> None:
            names = sorted(name for name in header if name != "__metadata__")
            name = data.draw(draw.sampled_from(names))
            sharding = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
            match data.draw(draw.sampled_from(["dtype", "shape", "offsets", "place", "sharding", "rename", "remove"])):
                case "dtype":
                    header[name]["dtype"] = data.draw(draw.sampled_from(["I32", "F64", "BF16", "F16", "U8", "X", 3]))
                case "shape":
                    header[name]["shape"] = data.draw(draw.lists(draw.integers(-1, 2**62), max_size=3))
                case "offsets":
                    header[name]["data_offsets"] = data.draw(draw.lists(draw.integers(0, 2**40), max_size=3))
                case "place":
                    numbers = draw.lists(draw.integers(-2, 2**63), max_size=3)
                    sharding[name]["saved_offsets"] = data.draw(draw.none() | draw.text(max_size=2) | numbers)
                    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(sharding)
                case "sharding":
                    header["__metadata__"]["DCP_SHARDING_INFO"] = data.draw(
                        draw.sampled_from(["", "{", "[]", "{}", "null", json.dumps({name: []})])
                    )
                case "rename":
                    header[name + "x"] = header.pop(name)
                case "remove":
                    header.pop(name)

        change_header(file, change)
        seal(checkpoint.path)
        outcome = checkpoint.refuses_or_equals(folder, str(checkpoint.path))
        counts["refused" if outcome else "equal"] += 1

    forge()
    return counts


@pytest.mark.slow
def test_any_forged_header_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    """In a process of its own: what reads memory it doesn't own ends the process."""
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["refused"] > counts["equal"]


def _main(directory: str) -> None:
    import torch
    from stratagem import Fit

    torch.set_num_threads(1)

    def make(module: Any, rows: Any, **arguments: Any) -> Fit:
        torch.manual_seed(0)
        quiet: dict[str, Any] = {"output_dir": directory, "progress": False, "loggers": (), "learning_rate": 0.1}
        return Fit(module, rows, **{**quiet, "max_grad_norm": 0.0, **arguments})

    print(json.dumps(forge_headers(Checkpoint(make), 60)))


if __name__ == "__main__":
    _main(sys.argv[1])
