"""Checkpoints that earlier versions wrote still resume, to the bit where the machine adds as theirs did."""

import json
import shutil
from pathlib import Path

import format_1


def test_a_checkpoint_of_format_1_continues_as_the_version_that_wrote_it_did(tmp_path: Path) -> None:
    checkpoint = shutil.copytree(format_1.DATA / "single" / "checkpoint-7", tmp_path / "checkpoint-7")
    found = format_1.train(str(tmp_path / "output"), "single", str(checkpoint))
    expected = json.loads((format_1.DATA / "single" / "continuation.json").read_text())
    format_1.assert_continues(found, expected)
