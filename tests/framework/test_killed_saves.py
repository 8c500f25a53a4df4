"""A run killed with SIGKILL while it saves leaves a whole checkpoint or none, and goes on from what it left."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def run_program(*arguments: object) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_saves.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_killed_before_each_file_operation_of_a_save_and_its_rotation(tmp_path: Path) -> None:
    result = run_program("sweep", tmp_path, 2, 1)
    lefts = [kill["left"] for kill in result["kills"]]
    assert all(left in ([2], [2, 4], [4]) for left in lefts), result["kills"]
    # Bit for bit the weights of the run that nobody killed.
    assert all(kill["end"] for kill in result["kills"]), result["kills"]
    assert [2] in lefts
    operations = result["operations"]
    published = operations.index("os.rename checkpoint-4.partial")
    assert len(operations) > published > 10
    for kill, index in zip(result["kills"], range(len(operations)), strict=True):
        assert (4 in kill["left"]) == (index > published), kill


@pytest.mark.slow
def test_killed_while_the_only_checkpoint_is_saved_again(tmp_path: Path) -> None:
    result = run_program("sweep", tmp_path, 4, 1)
    # It is there, or is given back its name when the run is resumed; never a fresh start.
    assert all(kill["left"] in ([4], []) for kill in result["kills"]), result["kills"]
    assert all(kill["end"] for kill in result["kills"]), result["kills"]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    result = run_program("at_random", tmp_path, 25)
    newest = [max(steps, default=0) for steps in result["steps"]]
    assert newest == sorted(newest)
    assert newest[-1] > 3
    assert all(len(steps) <= 4 for steps in result["steps"])  # three, and one more before rotation
    assert result["done"].split()[0] == str(result["last"] + 1)
