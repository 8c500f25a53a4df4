"""Checkpoints that earlier versions wrote on several ranks still resume, on as many."""

import json
import shutil
from pathlib import Path

import earlier_formats
import pytest
from ranks import Ranks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("written_as", earlier_formats.FORMATS)
def test_two_ranks_continue_as_the_version_that_wrote_it_did(
    ranks: dict[int, Ranks], tmp_path: Path, written_as: str
) -> None:
    kept = earlier_formats.DATA / written_as / "ddp"
    checkpoint = shutil.copytree(kept / "checkpoint-7", tmp_path / "checkpoint-7")
    expected = json.loads((kept / "continuation.json").read_text())
    options = {"output_dir": str(tmp_path / "output"), "strategy": "ddp", "resume": str(checkpoint)}
    for found in ranks[2].run(earlier_formats.train, **options):
        earlier_formats.assert_continues(found, expected)
