"""Ranks that are lost are done without: the run goes on with the same samples in each update, and the same schedule."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stratagem.framework.checkpoint import read_state
from training import Tagger, make_fit, token_rows, train

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "elastic.py"
SECONDS = 240.0


def launch(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    output.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, str(PROGRAM), str(output), *options], env=environment(), capture_output=True, text=True,
        timeout=SECONDS,
    )  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def attempts(output: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(output.glob("attempt-*.json"))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, whose batch is the global one."""
    output = tmp_path_factory.mktemp("undisturbed")
    torch.manual_seed(0)
    fit = make_fit(
        Tagger(1), token_rows(), max_steps=-1, num_train_epochs=1, per_device_train_batch_size=16,
        output_dir=str(output), shuffle=True,
    )  # fmt: skip
    fit.train()
    fit.export(output / "end.safetensors")
    logs = [log for log in fit.state.log_history if "loss" in log]
    (output / "curve.json").write_text(json.dumps([[log["step"], log["loss"], log["learning_rate"]] for log in logs]))
    return output


def check_curve(output: Path, undisturbed: Path) -> None:
    """The last attempt's log holds the whole run, as it was restored from the checkpoints of all."""
    expected = json.loads((undisturbed / "curve.json").read_text())
    found = attempts(output)[-1]["curve"]
    assert [step for step, _, _ in found] == [step for step, _, _ in expected]
    for (_, loss, rate), (_, other_loss, other_rate) in zip(found, expected, strict=True):
        assert loss == pytest.approx(other_loss, abs=1e-6)
        assert rate == pytest.approx(other_rate, rel=1e-12)
    weights, other = load_file(output / "end.safetensors"), load_file(undisturbed / "end.safetensors")
    for name, weight in other.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_become_one_and_two_again(tmp_path: Path, undisturbed: Path, strategy: str) -> None:
    kills = json.dumps([[0, 1, 4], [1, 0, 8]])
    done = launch(tmp_path, "--strategy", strategy, "--devices", "1:2", "--max-restarts", "2", "--kill", kills)
    assert done.returncode == 0, done.stderr
    for number, world in ((2, 2), (6, 1), (8, 2)):  # the checkpoints at which the attempts ended, or began
        path = tmp_path / f"checkpoint-{number}"
        assert not path.exists() or read_state(path)["world_size"] == world
    last = attempts(tmp_path)[-1]
    assert (last["world"], last["accumulation"]) == (2, 1)
    assert "An update keeps its 16 samples on 1 rank: gradient_accumulation_steps=2" in done.stderr
    assert "Starting again on 1 rank (restart 1 of 2)." in done.stderr
    assert "Starting again on 2 ranks (restart 2 of 2)." in done.stderr
    check_curve(tmp_path, undisturbed)


def test_killed_before_the_first_checkpoint(tmp_path: Path, undisturbed: Path) -> None:
    """The new attempt begins anew, and not from what an earlier run has left in the directory."""
    train(data=token_rows(), output_dir=str(tmp_path), save_strategy="steps", save_steps=3, max_steps=3)
    done = launch(tmp_path, "--devices", "1:2", "--max-restarts", "1", "--kill", "[[0, 1, 2]]")
    assert done.returncode == 0, done.stderr
    assert attempts(tmp_path)[-1]["accumulation"] == 2
    check_curve(tmp_path, undisturbed)


def test_what_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    done = launch(tmp_path, "--devices", "2:3", "--max-restarts", "1", "--batch", "5", "--kill", "[[0, 2, 4]]")
    assert done.returncode == 1
    assert "began with 15 samples in an update" in done.stderr and "15 can't be divided by 2" in done.stderr


def agent(output: Path, port: int, is_host: bool, log: Path, **more: str) -> "subprocess.Popen[bytes]":
    """An agent of torchrun, as on a machine of its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3"]
    meeting = [
        "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id=test{port}",
        f"--rdzv-conf=is_host={int(is_host)},last_call_timeout=2,keep_alive_interval=3,keep_alive_max_attempt=3",
    ]  # fmt: skip
    options = ["--resume", "--kill-agent", "4"]
    # Without this, torch 2.13's agents wait for one another for ever where one returns (docs/checkpoints.md).
    alone = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", **more)
    with log.open("wb") as stream:
        return subprocess.Popen(
            [*torchrun, *meeting, str(PROGRAM), str(output), *options], env=alone, stdout=stream, stderr=stream
        )


def test_an_agent_of_torchrun_is_lost_and_returns(tmp_path: Path, undisturbed: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agents = [
        agent(tmp_path, port, True, tmp_path / "agent-0.log"),
        agent(tmp_path, port, False, tmp_path / "agent-1.log", IS_TO_BE_LOST="1"),
    ]
    deadline = time.monotonic() + SECONDS
    try:
        wait_for(tmp_path / "alone", deadline, tmp_path)  # the first goes on without the second
        assert agents[1].wait(10.0) == -signal.SIGKILL
        agents.append(agent(tmp_path, port, False, tmp_path / "agent-2.log"))
        # It comes while the other trains, which its agent asks to end: it saves, and both are started again.
        wait_for_text(tmp_path / "agent-0.log", "closing signal SIGTERM", deadline)
        (tmp_path / "returned").touch()
        assert agents[2].wait(deadline - time.monotonic()) == 0, logs(tmp_path)
        assert agents[0].wait(deadline - time.monotonic()) == 0, logs(tmp_path)
    finally:
        for each in agents:
            each.kill()
            each.wait()
    worlds = [attempt["world"] for attempt in attempts(tmp_path)]
    assert worlds[-1] == 2 and 1 in worlds
    check_curve(tmp_path, undisturbed)


def wait_for(path: Path, deadline: float, output: Path) -> None:
    while not path.exists():
        assert time.monotonic() < deadline, logs(output)
        time.sleep(0.1)


def wait_for_text(path: Path, text: str, deadline: float) -> None:
    while text not in path.read_text():
        assert time.monotonic() < deadline, logs(path.parent)
        time.sleep(0.1)


def logs(output: Path) -> str:
    return "\n".join(f"{path.name}:\n{path.read_text()[-4000:]}" for path in sorted(output.glob("agent-*.log")))
