"""Checkpoints that earlier versions wrote still resume, to the bit where the machine adds as theirs did."""

import json
import shutil
from pathlib import Path

import earlier_formats
import pytest


@pytest.mark.parametrize("written_as", earlier_formats.FORMATS)
def test_a_checkpoint_continues_as_the_version_that_wrote_it_did(tmp_path: Path, written_as: str) -> None:
    kept = earlier_formats.DATA / written_as / "single"
    checkpoint = shutil.copytree(kept / "checkpoint-7", tmp_path / "checkpoint-7")
    found = earlier_formats.train(str(tmp_path / "output"), "single", str(checkpoint))
    earlier_formats.assert_continues(found, json.loads((kept / "continuation.json").read_text()))
