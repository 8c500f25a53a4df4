"""What a save and a restore cost: bytes through the system, opens of files, and memory beside the state."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
STATE, MOMENTS = 96, 64  # MiB
SHARDS = [f"checkpoint-2/{folder}/shard-00001-model-00001-of-00001.safetensors" for folder in ("model", "optimizer")]


def run_program(directory: Path) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, str(HERE / "costs_of_saves.py"), str(directory)],
        capture_output=True,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_state_is_written_once_and_read_twice_and_never_held_twice(tmp_path: Path) -> None:
    costs = run_program(tmp_path)
    saved, restored = costs["saved"], costs["restored"]
    for cost in (*saved["sync"], *saved["async"]):
        assert cost["written"] == pytest.approx(STATE, abs=0.5)
        assert cost["read"] < 1  # nothing is read again to be hashed
    assert all(cost["peak"] < 32 for cost in saved["sync"])
    first, second = saved["async"]
    assert 32 < first["peak"] < STATE + 32  # one copy, whose memory the next one has
    assert second["peak"] < 32

    assert restored["read"] == pytest.approx(2 * STATE, abs=1)  # compared with the manifest, then loaded
    assert restored["peak"] < MOMENTS + 32  # the weights are there already
    assert [restored["opened"][shard] for shard in SHARDS] == [2, 2]
    assert restored["opened"]["checkpoint-2/tensors.json"] == 2
    # An earlier version's checkpoint has no table: each header is read once more.
    assert [costs["earlier"]["opened"][shard] for shard in SHARDS] == [3, 3]
