"""A program for test_uploading.py: kills a run before each file operation of its uploads, and looks what is there.

Every child is forked, so that torch is imported once. Prints JSON.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint  # takes a second, and would in each child
from killed_saves import finish, in_child, kill, make_fit
from stratagem.framework.uploading import Upload

FILE_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove")


def train(root: Path, report: int, block_at: int | None = None) -> None:
    """Save and upload checkpoint-2 and checkpoint-4, and block for good before an operation at the target."""
    away, operations = str(root / "away"), []

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_OPERATIONS and str(arguments[0]).startswith(away) and arguments[1] != "r":
            operations.append(f"{event} {Path(arguments[0]).name}")
            if len(operations) - 1 == block_at:
                os.write(report, b"here")
                while True:
                    time.sleep(60)

    sys.addaudithook(hear)
    fit = make_fit(root / "output", callbacks=[Upload(f"file://{away}")], save_total_limit=1)
    fit.train(resume_from_checkpoint=True)
    os.write(report, json.dumps(operations).encode())


def copies(away: Path) -> tuple[list[int], list[int]]:
    """Updates of the copies that have a manifest, each of which must agree with it, and of those that have none."""
    whole, parts = [], []
    for path in sorted(away.glob("checkpoint-*")):
        step = int(path.name.removeprefix("checkpoint-"))
        if (path / "manifest.json").exists():
            for name, entry in json.loads((path / "manifest.json").read_text())["files"].items():
                assert hashlib.sha256((path / name).read_bytes()).hexdigest() == entry["sha256"], path / name
            whole.append(step)
        else:
            parts.append(step)
    return whole, parts


def main(root: Path, stride: int) -> None:
    """Kill before every ``stride``-th operation, and resume each time."""
    operations = json.loads(finish(*in_child(lambda report: train(root / "counted", report))))
    kills = []
    for point in range(0, len(operations), stride):
        directory = root / f"killed-{point}"
        child, reading = in_child(lambda report, d=directory, p=point: train(d, report, p))  # type: ignore[misc]
        assert os.read(reading, 4) == b"here", f"{operations[point]} was not reached"
        kill(child, reading)
        whole, parts = copies(directory / "away")
        finish(*in_child(lambda report, d=directory: train(d, report)))  # type: ignore[misc]
        resumed, _ = copies(directory / "away")
        kills.append({"before": operations[point], "whole": whole, "parts": parts, "resumed": resumed})
        shutil.rmtree(directory)
    print(json.dumps({"operations": operations, "kills": kills}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
