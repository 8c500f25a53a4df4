"""What is kept of a run on several ranks: one record, of the user's own module, whatever a strategy made of it."""

import json
from pathlib import Path

import pytest
from ranks import Ranks
from training import Tagger, make_fit, token_rows

STRATEGIES = [
    pytest.param("ddp", marks=pytest.mark.slow),
    pytest.param("fsdp1", marks=pytest.mark.slow),
    "fsdp2",
    pytest.param("tp", marks=pytest.mark.slow),
    pytest.param("deepspeed_stage_3", marks=pytest.mark.slow),
]


def train(strategy: str, directory: Path) -> None:
    fit = make_fit(Tagger(1), token_rows(64), strategy=strategy, report=True, output_dir=str(directory), max_steps=3)
    fit.train()
    fit.close()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_record_names_the_users_module(ranks: dict[int, Ranks], strategy: str, tmp_path: Path) -> None:
    ranks[2].run(train, strategy=strategy, directory=tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    trained = [parameter for parameter in Tagger(1).parameters() if parameter.requires_grad]
    assert record["module"]["class"] == "training.Tagger"
    assert record["module"]["trainable"] == sum(parameter.numel() for parameter in trained)
    assert (record["world_size"], record["update"]) == (2, 3)
    (session,) = record["sessions"]
    assert session["state"] == "finished"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "report.html", "run.json"]
