"""The examples that are started by more than a program: a file, and launchers for several nodes."""

import json
import re
from pathlib import Path

import pytest
import yaml
from running import EXAMPLES, run_program, table_of


def losses(directory: Path, name: str) -> list[float]:
    rows = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    return [row[name] for row in rows if name in row]


@pytest.mark.slow
def test_an_experiment_is_its_file_and_what_the_command_line_says_otherwise(tmp_path: Path) -> None:
    file = EXAMPLES / "experiment.yaml"
    small = ("--build.width=4", "--num_train_epochs=2", "--learning_rate=0.02")
    run_program("-m", "stratagem", "fit", file, *small, "--output_dir=runs/own", directory=tmp_path)
    written = yaml.safe_load((tmp_path / "runs" / "own" / "config.yaml").read_text())
    begun = yaml.safe_load(file.read_text())
    changed = {"target", "build", "strategy", "precision", "output_dir", "num_train_epochs", "learning_rate"}
    assert {name: written[name] for name in begun.keys() - changed} == {
        name: begun[name] for name in begun.keys() - changed
    }
    assert (written["build"], written["num_train_epochs"], written["learning_rate"]) == ({"width": 4}, 2, 0.02)
    # What the run left repeats it.
    again = ("--config=runs/own/config.yaml", "--output_dir=runs/again")
    run_program("-m", "stratagem", "fit", *again, directory=tmp_path)
    own, repeated = (losses(tmp_path / "runs" / name, "eval_loss") for name in ("own", "again"))
    assert len(own) == 3 and own == repeated and own[1] < own[0]  # the last one with the best weights
    table = run_program("-m", "stratagem", "watch", "--once", "runs", directory=tmp_path)
    rows = re.findall(r"^ *(own|again) .* 90 / 90 ", table, flags=re.MULTILINE)
    assert sorted(rows) == ["again", "own"] and table.count(f"{own[-1]:.4g}") == 2


@pytest.mark.slow
def test_two_launchers_on_two_nodes_are_one_launcher(tmp_path: Path) -> None:
    printed = run_program(EXAMPLES / "several_nodes.py", "--max_steps=6", "--logging_steps=2", directory=tmp_path)
    update = table_of(printed, "update")
    rows = [line.split() for line in printed.split("weights held\n")[1].splitlines()[:4]]
    # A rank holds half of 29,066 weights, the same half as the rank with its number on the other node.
    assert [row[:4] for row in rows] == [
        [str(rank), str(rank // 2), str(rank // 2), str(rank % 2)] for rank in range(4)
    ]
    assert {row[4] for row in rows} <= {"14,533"}
    assert len(update) == 3 and all(first == second for _, first, second in update)
    ranks = tmp_path / "output" / "several_nodes"
    assert losses(ranks / "one", "loss") == losses(ranks / "two", "loss")
