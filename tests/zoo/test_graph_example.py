"""The example of graphs: it learns, and two ranks train as one."""

import json
import re
from pathlib import Path

import pytest
from running import EXAMPLES, run_program

pytest.importorskip("torch_geometric")


def losses(directory: Path) -> list[float]:
    rows = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
def test_graphs_are_told_apart_on_one_rank_as_on_two(tmp_path: Path) -> None:
    graph, one, two = EXAMPLES / "graph.py", tmp_path / "one", tmp_path / "two"
    few = ("--num_train_epochs=4", "--per_device_train_batch_size")
    printed = run_program(graph, *few, 32, f"--output_dir={one}", directory=tmp_path)
    found = re.search(r"held-out accuracy: ([\d.]+)", printed)
    assert found and float(found[1]) > 0.6  # chance is a third
    picture = (one / "graphs.png").read_bytes()
    assert picture[:4] == b"\x89PNG" and picture[16:24] == (720).to_bytes(4, "big") + (360).to_bytes(4, "big")
    run_program(graph, *few, 16, f"--output_dir={two}", "--strategy=ddp", "--devices=2", directory=tmp_path)
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
