"""Checkpoints that earlier versions wrote on several ranks still resume, on as many."""

import json
import shutil
from pathlib import Path

import format_1
import pytest
from ranks import Ranks

pytestmark = pytest.mark.slow


def test_two_ranks_continue_as_the_version_that_wrote_format_1_did(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    checkpoint = shutil.copytree(format_1.DATA / "ddp" / "checkpoint-7", tmp_path / "checkpoint-7")
    expected = json.loads((format_1.DATA / "ddp" / "continuation.json").read_text())
    for found in ranks[2].run(
        format_1.train, output_dir=str(tmp_path / "output"), strategy="ddp", resume=str(checkpoint)
    ):
        format_1.assert_continues(found, expected)
