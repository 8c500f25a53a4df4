"""What benchmarks/precision.py and gpu.py print: a line for every precision, its bytes, its rate; and their clock."""

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem.precision import PRECISIONS

if not hasattr(torch.nn.functional, "ScalingType"):
    pytest.skip("torchao 0.18 needs a newer torch", allow_module_level=True)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EMULATED = {"fp8 emulated", "mxfp8 emulated"}
SIZES = ["--layers=1", "--width=64", "--context=32"]


def run(directory: Path, program: str, *options: str) -> tuple[list[list[str]], dict[str, str]]:
    """The cells of the table's lines below its heading, and the formats that were refused, with the reasons."""
    finished = subprocess.run(
        [sys.executable, str(BENCHMARKS / program), *SIZES, *options],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    lines = finished.stdout.splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if " | " in line]
    refused = dict(line.split(" doesn't run here: ") for line in lines if " doesn't run here: " in line)
    return rows[1:], refused


@pytest.mark.slow
def test_every_precision_has_its_line(tmp_path: Path) -> None:
    few = ["--rounds=2", "--updates=2", "--loss-updates=3", "--eval-windows=8", "--emulate"]
    rows, refused = run(tmp_path, "precision.py", *few)
    cells = {row[0]: row for row in rows}
    assert cells.keys() | refused.keys() == {*PRECISIONS, *EMULATED}
    assert cells["32-true"][2] == "1.00"
    # 65,728 parameters in 4 bytes are 0.25 MiB, and two moments twice that; master weights are 4 bytes more.
    memory = {name: [float(cell) for cell in row[-3:]] for name, row in cells.items()}
    for name in ("32-true", "bf16-mixed", "16-mixed", *EMULATED):
        assert memory[name] == [0.3, 0.3, 0.5]
    assert memory["64-true"] == [0.5, 0.5, 1.0]
    assert memory["bf16-true"] == memory["16-true"] == [0.1, 0.3, 0.8]
    assert abs(float(cells["64-true"][6])) < 1e-3


# Without a GPU the program of make bench-gpu says nothing of speed, but it is the same program.
ON_CPU = ["--device=cpu", "--heads=2", "--vocabulary=300", "--batch-size=4", "--updates=2", "--rounds=2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "formats", "compiled"),
    [
        (["--compile=no", "--emulate"], ["32-true", "bf16-mixed", "bf16-true", "fp8 emulated"], ["no"]),
        (["--compile=both", "--precisions=bf16-mixed"], ["bf16-mixed"], ["no", "yes"]),
    ],
    ids=["formats", "compiled"],
)
def test_formats_beside_a_hand_written_loop(
    tmp_path: Path, options: list[str], formats: list[str], compiled: list[str]
) -> None:
    rows, refused = run(tmp_path, "gpu.py", *ON_CPU, *options)
    assert [row[:2] for row in rows] == [[name, word] for name in ("by hand, bf16", *formats) for word in compiled]
    for name, _, milliseconds, tokens, mfu, ratio, _, loss in rows:
        assert float(tokens.replace(",", "")) == pytest.approx(4 * 32 / (float(milliseconds) / 1000), rel=0.1)
        assert mfu == "-"  # of a CPU
        assert float(ratio) == 1.0 or name != "by hand, bf16"
        assert float(loss) == pytest.approx(5.70, abs=0.05)  # ln 300: the tokens are random
    if "--emulate" in options:
        assert refused.keys() == {"fp8"}
        assert "needs float8 units" in refused["fp8"]


def test_without_a_gpu_there_is_an_error_of_one_line(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    finished = subprocess.run([sys.executable, str(BENCHMARKS / "gpu.py")], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 1
    assert (finished.stdout, finished.stderr.count("\n")) == ("", 1)
    assert finished.stderr.startswith("There is no GPU here. Write --device cpu")


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a file of benchmarks/, as its neighbours do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_rates_of_a_device_whose_peak_is_known(imported: Any) -> None:
    gpu, turns = imported("gpu"), imported("turns")
    loop = argparse.Namespace(options=argparse.Namespace(batch_size=8, context=1024), loss=10.8)
    timings = {
        (gpu.BY_HAND, True): [turns.Timing(0.10, 0.0), turns.Timing(0.12, 0.0)],
        ("bf16-mixed", True): [turns.Timing(0.08, 0.0), turns.Timing(0.08, 0.0)],
    }
    cells = gpu.row(("bf16-mixed", True), loop, timings, flops=8e12, peak=200e12)
    # 8192 tokens in 80 ms; 8 TFLOP in that time are 100 TFLOP/s; 1.25 and 1.5 times as fast as the loop by hand.
    assert cells[2:7] == ["80.0", "102,400", "50.0%", "1.375", "1.312 to 1.438"]


def test_the_clock_waits_for_a_gpu_at_a_turns_ends(imported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = imported("turns")
    clock = turns.Clock(torch.device("cuda"), updates=4)
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(len(clock.readings)))
    for _ in range(2):
        clock.start()
        for _ in range(clock.updates_of_a_turn):
            clock.tick()
        assert waited == [2, 6]  # after two updates to warm up, and four later
        waited.clear()
    clock.readings = [(float(second), second / 2) for second in (0, 5, 9, 10, 12, 15, 20)]
    assert clock.timing() == (2.75, 1.375)  # from 9 to 20, of four updates
    clock.device = torch.device("cpu")
    assert clock.timing() == (2.5, 1.375)  # the median of 1, 2, 3 and 5
    clock.tick()
    with pytest.raises(RuntimeError, match="8 updates began in a turn of 7"):
        clock.timing()
