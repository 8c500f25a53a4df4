"""Examples and commands, run as a user runs them: in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
SECONDS = 400  # until a program counts as hung; other work may share the cores


def run_program(*words: object, directory: Path) -> str:
    """What ``python words`` prints, run in a directory on one thread; both its outputs are shown where it fails."""
    finished = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def table_of(printed: str, heading: str) -> list[list[str]]:
    """The rows below the last line that begins with a heading, cut where there are two spaces or more."""
    lines = printed.splitlines()
    last = max(number for number, line in enumerate(lines) if line.strip().startswith(heading))
    return [re.split(r" {2,}", line.strip()) for line in lines[last + 1 :]]
