"""Uploads of several ranks: the main process makes them, and all wait for them without giving each other up."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from stratagem.framework.checkpoint.verifying import verify
from stratagem.framework.uploading import Upload
from training import Tagger, make_fit, token_rows

pytestmark = pytest.mark.slow


class Slow(Upload):
    """Each upload takes a while, as over a network."""

    def work(self) -> None:
        time.sleep(1.5)
        super().work()


def upload(away: str, **options: Any) -> dict[str, Any]:
    callback = Slow(f"file://{away}")
    fit = make_fit(Tagger(), token_rows(40), callbacks=[callback], max_steps=4, save_strategy="steps", **options)
    fit.train()
    mine = [thread.name for thread in threading.enumerate() if thread.name == "upload"]
    there = sorted(path.name for path in Path(away).glob("*/manifest.json"))
    return {"threads": mine, "manifests": len(there), "main": fit.strategy.is_main}


@pytest.mark.parametrize(("strategy", "async_save"), [("ddp", False), ("fsdp2", True)])
def test_all_ranks_end_when_everything_is_uploaded(
    ranks: dict[int, Ranks], tmp_path: Path, strategy: str, async_save: bool
) -> None:
    away, output = tmp_path / "away", tmp_path / "output"
    found = ranks[2].run(
        upload,
        away=str(away),
        strategy=strategy,
        output_dir=str(output),
        save_steps=2,
        save_total_limit=1,
        async_save=async_save,
    )
    assert found == [{"threads": [], "manifests": 2, "main": main} for main in (True, False)]
    for step in (2, 4):
        verify(away / f"checkpoint-{step}")
        assert (away / f"checkpoint-{step}" / "random-00001.json").exists()  # what the other rank wrote, too
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-4"]
