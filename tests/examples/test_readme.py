"""The program in the README runs as it is printed there, and learns."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
def test_the_program_runs(tmp_path: Path) -> None:
    programs = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    program = tmp_path / "program.py"
    program.write_text(programs[0], encoding="utf-8")
    assert len([line for line in programs[0].splitlines() if line]) <= 25
    finished = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = re.search(r"'eval_loss': ([\d.]+)", finished.stdout)
    assert found and float(found[1]) < 0.01, finished.stdout
