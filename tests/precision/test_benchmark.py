"""The table that benchmarks/precision.py prints: a line for every registered precision, with the bytes it must have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from stratagem.precision import PRECISIONS

pytestmark = pytest.mark.slow

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "precision.py"
TINY = ["--rounds=2", "--updates=2", "--loss-updates=3", "--layers=1", "--width=64", "--context=32", "--eval-windows=8"]
EMULATED = {"fp8 emulated", "mxfp8 emulated"}


def test_every_precision_has_its_line(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, str(BENCHMARK), *TINY, "--emulate"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = [[cell.strip() for cell in line.split("|")] for line in finished.stdout.splitlines() if " | " in line]
    cells = {row[0]: row for row in rows[1:]}
    refused = {line.split()[0] for line in finished.stdout.splitlines() if "doesn't run here: " in line}
    assert cells.keys() | refused == {*PRECISIONS, *EMULATED}
    assert cells["32-true"][2] == "1.00"
    # 65,728 parameters in 4 bytes are 0.25 MiB, and two moments twice that; master weights are 4 bytes more.
    memory = {name: [float(cell) for cell in row[-3:]] for name, row in cells.items()}
    for name in ("32-true", "bf16-mixed", "16-mixed", *EMULATED):
        assert memory[name] == [0.3, 0.3, 0.5]
    assert memory["64-true"] == [0.5, 0.5, 1.0]
    assert memory["bf16-true"] == memory["16-true"] == [0.1, 0.3, 0.8]
    assert abs(float(cells["64-true"][6])) < 1e-3
