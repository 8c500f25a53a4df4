"""benchmarks/gpu.py on a real GPU, at a small size. No GPU has run this test yet; tests/precision has one for a CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stratagem.framework.measures.flops import device_name, peak_flops

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and this machine has none"),
    pytest.mark.slow,
]

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
SMALL = ["--layers=2", "--width=256", "--heads=4", "--context=128", "--updates=4", "--rounds=2"]


def test_every_format_has_a_rate(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, str(PROGRAM), *SMALL],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = [[cell.strip() for cell in line.split("|")] for line in finished.stdout.splitlines() if " | " in line][1:]
    formats = ["by hand, bf16", "32-true", "bf16-mixed", "bf16-true"]
    if torch.cuda.get_device_capability() >= (8, 9):
        formats.append("fp8")
    assert [row[:2] for row in rows] == [[name, word] for name in formats for word in ("no", "yes")]
    known = peak_flops(device_name(torch.device("cuda:0"))) is not None
    for *_, mfu, _, _, loss in rows:
        assert 0 < float(mfu.rstrip("%")) < 100 if known else mfu == "-"
        assert float(loss) == pytest.approx(10.83, abs=0.1)  # ln 50,304: the tokens are random
