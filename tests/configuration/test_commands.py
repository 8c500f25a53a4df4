"""The commands for real: stratagem fit and a configured program on two ranks, and stratagem launch."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("program.py")
STRATAGEM = ("-m", "stratagem.framework.command_line")


def environment() -> dict[str, str]:
    # A launch inside a rank would be no launch.
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def run(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=180
    )


def weights(run: Path) -> dict[str, Tensor]:
    """Of a run's last checkpoint."""
    files = sorted((run / "checkpoint-6" / "model").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def who(what: str, done: subprocess.CompletedProcess[str]) -> list[str]:
    """Which processes imported the program, or built the module."""
    return sorted(re.findall(rf"^{what} by rank (\w+)$", done.stdout + done.stderr, flags=re.MULTILINE))


def test_a_runs_own_file_repeats_it_to_the_bit_on_two_ranks(tmp_path: Path) -> None:
    first = ["fit", f"{PROGRAM}:build", "--strategy", "fsdp2", "--devices", "2", "--build.width", "6", "--seed", "9"]
    done = run(*STRATAGEM, *first, "--output_dir", "first", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert who("built", done) == ["0", "1"]
    again = run(*STRATAGEM, "fit", "--config", "first/config.yaml", "--output_dir", "again", cwd=tmp_path)
    assert again.returncode == 0 and who("built", again) == ["0", "1"]
    one, other = weights(tmp_path / "first"), weights(tmp_path / "again")
    assert len(one) == 4 and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    differently = run(*STRATAGEM, "fit", "--config", "first/config.yaml", "--seed=8", "--output_dir=c", cwd=tmp_path)
    assert differently.returncode == 0
    assert not torch.equal(one["layers.0.weight"], weights(tmp_path / "c")["layers.0.weight"])


def test_auto_is_a_word_of_the_command_and_the_runs_own_file_has_what_was_chosen(tmp_path: Path) -> None:
    file = tmp_path / "auto.yaml"
    file.write_text(f"target: {PROGRAM}:build\nstrategy: {{name: auto, measure: 2}}\ndevices: 2\nseed: 9\n")
    done = run(*STRATAGEM, "fit", "--config", file, "--output_dir", "auto", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert who("built", done) == ["0", "1"]  # once, though candidates were played and measured
    assert "is the fastest of 2 that were" in done.stdout
    written = yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())
    chosen = json.loads((tmp_path / "auto" / "run.json").read_text())["choice"]["chosen"]
    kept = written["strategy"] if isinstance(written["strategy"], dict) else {"name": written["strategy"]}
    assert kept == {"name": chosen["strategy"], **chosen["options"]} and chosen["strategy"] in ("ddp", "fsdp2")
    again = run(*STRATAGEM, "fit", "--config", "auto/config.yaml", "--output_dir", "again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    one, other = weights(tmp_path / "auto"), weights(tmp_path / "again")
    assert len(one) == 4 and all(torch.equal(one[name], other[name]) for name in one)


def test_a_program_configures_itself_and_resumes(tmp_path: Path) -> None:
    words = ["--strategy", "ddp", "--devices", "2", "--output_dir", "run", "--sample.length", "5"]
    done = run(PROGRAM, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert who("built", done) == ["0", "1"] and re.search("^x{5}$", done.stdout, flags=re.MULTILINE)
    whole = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")  # as if it had been killed after update 3
    resumed = run(PROGRAM, *words, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "update 2/6" not in resumed.stdout and "update 4/6" in resumed.stdout
    after = weights(tmp_path / "run")
    assert whole.keys() == after.keys() and all(torch.equal(whole[name], after[name]) for name in whole)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (written["target"], written["devices"]) == (f"{PROGRAM}:build", 2)  # for stratagem fit


def test_launch_runs_a_script_on_the_ranks_alone(tmp_path: Path) -> None:
    words = ["--strategy", "ddp", "--output_dir", "run", "--progress", "false"]
    done = run(*STRATAGEM, "launch", "--devices", "2", PROGRAM, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert who("imported", done) == who("built", done) == ["0", "1"]
    assert (tmp_path / "run" / "checkpoint-6").is_dir()


SCRIPT = """
import os, signal, sys, time
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], sys.argv[1:], flush=True)
if "--wait" in sys.argv:
    open(os.environ["RANK"], "w").close()
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3 if os.environ["RANK"] == "0" else 0))
    time.sleep(60)
sys.exit(7 if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else 0)
"""


def test_launch_has_the_supervisors_statuses_restarts_and_signals(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run(*STRATAGEM, "launch", "--devices", "2", "script.py", "--max_restarts", "1", cwd=tmp_path)
    assert done.returncode == 7 and "rank 1 of 2 ['--max_restarts', '1']" in done.stdout  # an option of the script
    done = run(*STRATAGEM, "launch", "--devices=2", "--max_restarts=1", "-m", "script", cwd=tmp_path)
    assert done.returncode == 0 and "restart 1 of 1" in done.stderr
    command = [sys.executable, *STRATAGEM, "launch", "--devices", "2", "--signals", "SIGUSR1", "script.py", "--wait"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment()) as process:
        deadline = time.monotonic() + 60
        while not ((tmp_path / "0").exists() and (tmp_path / "1").exists()) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--devices", "0", "x.py"], "devices takes a number of ranks"),
        (["--devices", "1:2", "x.py"], "devices='1:2' goes on with fewer ranks.*Write max_restarts=, or devices=2"),
        (["--signals", "SIGFOO", "x.py"], "--signals takes SIGTERM, SIGUSR1"),
        ([], "required: script"),
    ],
)
def test_launch_refuses_what_cant_work(tmp_path: Path, words: list[str], expected: str) -> None:
    done = run(*STRATAGEM, "launch", *words, cwd=tmp_path)
    assert done.returncode == 2 and re.search(expected, done.stderr.replace("\n", " ")), done.stderr
