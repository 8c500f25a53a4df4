"""fit_on_ray: a real Ray on this machine, two workers, and the loss of one, or of the machine that it ran on."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from ray.train import CheckpointConfig, RunConfig
from stratagem.framework.checkpoint.verifying import verify
from stratagem.framework.ray import fit_on_ray, link_or_copy

PROGRAM = Path(__file__).parent / "ray_run.py"
SECONDS = 300  # Ray alone takes twenty to begin and to end; other work may share the cores


@pytest.fixture
def scratch() -> Iterator[str]:
    """A directory for Ray's sockets, whose names have no room for pytest's."""
    directory = mkdtemp(prefix="ray-", dir="/tmp")
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def run(output: Path, scratch: str, *options: str) -> None:
    """Run the program to its end."""
    output.mkdir()
    started = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
    environment = {name: value for name, value in os.environ.items() if name not in started}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": scratch,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the controller takes one report each time
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # after which it looks again how many workers there can be
    }
    with (output / "said.txt").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(output), *options],
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert process.returncode == 0, (output / "said.txt").read_text()[-6000:]


def losses(log: Path) -> list[float]:
    """The loss of each update; a restarted run logs some again."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    by_step = {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}
    assert list(by_step) == list(range(1, 13))
    return list(by_step.values())


def undisturbed(output: Path, scratch: str, strategy: str) -> list[float]:
    """The losses of two ranks that our own launcher started."""
    run(output, scratch, "--launcher", "--strategy", strategy)
    return losses(output / "log.jsonl")


def result(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "result.json").read_text())
    return found


def reports(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "reports.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_changes_no_bit(tmp_path: Path, scratch: str) -> None:
    output = tmp_path / "ray"
    run(output, scratch, "--kill", "worker")
    assert (output / "killed").read_text() == "2"
    expected = undisturbed(tmp_path / "launcher", scratch, "ddp")
    assert losses(output / "run" / "log.jsonl") == expected

    found = result(output)
    assert found["metrics"]["loss"] == expected[-1]
    assert found["metrics"]["step"] == 12 and found["metrics"]["train_loss"] == found["return_value"]["training_loss"]
    assert found["return_value"]["global_step"] == 12
    assert found["checkpoint"] == str(output / "run" / "checkpoint-12")  # where it was written
    verify(Path(found["checkpoint"]))
    assert {path.name for path in (output / "run").glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-12"}
    # The log of the sixth update was still to be reported when the worker died.
    steps = [report["metrics"]["step"] for report in reports(output)]
    assert {1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12} <= {*steps}
    assert all(report["ranks"] == 2 for report in reports(output))
    assert any("eval_loss" in report["metrics"] for report in reports(output))


@pytest.mark.slow
def test_without_its_machine_the_run_goes_on_on_one_worker(tmp_path: Path, scratch: str) -> None:
    output = tmp_path / "ray"
    run(output, scratch, "--kill", "machine", "--strategy", "fsdp2")
    expected = undisturbed(tmp_path / "launcher", scratch, "fsdp2")
    assert losses(output / "run" / "log.jsonl") == pytest.approx(expected, rel=1e-6)
    assert reports(output)[0]["ranks"] == 2 and reports(output)[-1]["ranks"] == 1
    assert result(output)["return_value"]["global_step"] == 12


@pytest.mark.slow
def test_a_directory_of_the_fits_own(tmp_path: Path, scratch: str) -> None:
    output = tmp_path / "ray"
    run(output, scratch, "--own-directory", "--async-save")
    assert losses(output / "own" / "log.jsonl") == undisturbed(tmp_path / "launcher", scratch, "ddp")
    checkpoint = Path(result(output)["checkpoint"])
    assert checkpoint.parent == output / "run"
    verify(checkpoint)
    shards = [path.relative_to(checkpoint) for path in checkpoint.rglob("*.safetensors")]
    assert shards
    for shard in shards:
        assert os.path.samefile(checkpoint / shard, output / "own" / "checkpoint-12" / shard)  # not a copy


def test_two_that_remove_checkpoints_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_to_keep=2.*Write Fit\(save_total_limit=...\)"):
        fit_on_ray(lambda directory: None, None, RunConfig(checkpoint_config=CheckpointConfig(num_to_keep=2)))


def test_a_file_that_cant_be_linked_is_copied(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("whole")
    link_or_copy(str(tmp_path / "a"), str(tmp_path / "b"))
    assert os.path.samefile(tmp_path / "a", tmp_path / "b")
    target = Path("/dev/shm") / f"copied-{os.getpid()}"  # another file system, where there is one
    if target.parent.is_dir():
        link_or_copy(str(tmp_path / "a"), str(target))
        assert target.read_text() == "whole"
        target.unlink()
