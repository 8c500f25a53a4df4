"""Predictions that real ranks write: each sample once, in the order of the data, whatever the lengths."""

import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from ranks import Ranks
from stratagem import PredictionWriter, read_predictions
from stratagem.framework.predictions.writing import PredictionError
from tiny import RowStream
from torch import Tensor
from training import Tagger, make_fit, token_rows

PLACEMENTS: list[tuple[int, str, dict[str, Any]]] = [
    (2, "ddp", {}),
    (2, "fsdp2", {}),
    (2, "tp", {}),
    (3, "ddp", {}),
    (3, "fsdp2", {"streams": True}),
    (4, "fsdp2", {"tensor_parallel": 2}),
]
SIZES = [1, 2, 5, 12, 23]  # fewer samples than ranks, whole global batches, ends of every kind


class Numbered(Tagger):
    """Gives the tokens themselves beside its scores, so that a row tells which it is."""

    def forward(self, tokens: Tensor) -> Any:
        return {"scores": super().forward(tokens), "tokens": tokens, "first": tokens[:, 0]}

    def loss(self, outputs: Any, batch: Any) -> Any:
        return super().loss(outputs["scores"], batch)


def predict(output: str, rows: int, streams: bool = False, **arguments: Any) -> list[dict[str, Any]]:
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    fit = make_fit(Numbered(), token_rows(8), per_device_eval_batch_size=3, **arguments)
    results = []
    for size in SIZES:
        for name in (f"{size}.parquet", f"{size}"):
            writer = PredictionWriter(Path(output) / name, rows=rows)
            data = RowStream(token_rows(size)) if streams else token_rows(size)
            found = fit.predict(data, output=writer)
            results.append({"path": str(found.predictions), **found.metrics})
    return results


@pytest.mark.parametrize(("world", "strategy", "options"), PLACEMENTS, ids=str)
def test_rows_come_in_the_order_of_the_data(
    ranks: dict[int, Ranks], tmp_path: Path, world: int, strategy: str, options: dict[str, Any]
) -> None:
    options = dict(options)
    job = {"strategy": strategy, "streams": options.pop("streams", False), "options": options}
    found = ranks[world].run(predict, output=str(tmp_path), rows=4, **job)
    assert found == [found[0]] * world
    torch.manual_seed(0)
    module = Numbered().eval()
    for size in SIZES:
        rows = token_rows(size)
        tokens, labels = (torch.stack([row[name] for row in rows]) for name in ("tokens", "labels"))
        with torch.no_grad():
            scores = module(tokens)["scores"]
        table = pq.read_table(tmp_path / f"{size}.parquet")
        read = read_predictions(tmp_path / f"{size}")
        assert {*table.column_names} == {*read} == {"scores", "tokens", "first", "label_ids"}
        for name, expected in (("tokens", tokens), ("first", tokens[:, 0]), ("label_ids", labels)):
            assert torch.equal(read[name], expected), (size, name)
            assert torch.equal(torch.tensor(table[name].to_pylist()), expected), (size, name)
        torch.testing.assert_close(read["scores"], scores)
        torch.testing.assert_close(torch.tensor(table["scores"].to_pylist()), scores)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*map(str, SIZES), *(f"{s}.parquet" for s in SIZES)]
    )


class Odd(Numbered):
    """On rank 1 the scores have a row too few."""

    def forward(self, tokens: Tensor) -> Any:
        outputs = super().forward(tokens)
        if os.environ.get("RANK") == "1":
            outputs["first"] = outputs["first"][1:]
        return outputs


def fail(output: str) -> str:
    fit = make_fit(Odd(), token_rows(8), per_device_eval_batch_size=3, strategy="ddp")
    with pytest.raises(PredictionError) as caught:
        fit.predict(token_rows(12), output=output)
    return str(caught.value)


def test_a_failure_of_one_rank_is_all_ranks(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    said = ranks[2].run(fail, output=str(tmp_path / "p.parquet"))
    assert said[0] == said[1] and "rank 1: " in said[0] and "3 of tokens, 2 of first" in said[0]
    assert not [*tmp_path.iterdir()]
