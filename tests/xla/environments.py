"""Runs in another process, under this torch or the other one: ``run([{"strategy": "ddp", "devices": 2}])[0]``."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Where torch is newer and there is no torch_xla: what ``make test`` runs in.
OTHER = Path(os.environ.get("STRATAGEM_OTHER_PYTHON", ROOT / ".venv/bin/python"))


def run(
    runs: Sequence[Mapping[str, Any]], python: Path = OTHER, environment: Mapping[str, str] | None = None
) -> list[dict[str, list[Any]]]:
    """``training.train`` with each of these arguments, one run after the other in a process, or in ``devices`` of them.

    Returns:
        What ``train`` does, for each run.
    """
    assert python.exists(), f"{python} isn't there; make venv makes it"
    program = [str(python), __file__, json.dumps(runs)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    ended = subprocess.run(program, env=settings, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(next(line for line in ended.stdout.splitlines() if line.startswith("[{")))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests/distributed"))
    from training import train

    found = [train(**arguments) for arguments in json.loads(sys.argv[1])]
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found), flush=True)
