"""Predictions on the disk: what predict would have returned, in its order, with few rows held at once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as draw
from stratagem import Fit, PredictionWriter, iterate_predictions, read_predictions
from stratagem.framework.predictions.order import from_run_lengths, in_order, run_lengths
from stratagem.framework.predictions.parquet import join
from stratagem.framework.predictions.parts import ParquetPart, TensorPart
from stratagem.framework.predictions.writing import PredictionError
from tiny import MakeFit, Regressor, RowStream, Tagger, regression_rows, token_rows
from torch import Tensor


class Several(Tagger):
    """Outputs of every kind: a mapping with numbers, rows, bools, half precision, a tuple, and text."""

    def forward(self, tokens: Tensor) -> Any:
        logits = super().forward(tokens)
        return {
            "logits": logits,
            "best": {"token": logits.argmax(-1), "sure": logits.amax(-1) > 0},
            "mean": logits.mean((1, 2)),
            "half": logits[:, 0].bfloat16(),
            "pair": (logits[:, 0], logits[:, 1]),
            "text": [str(row) for row in tokens[:, 0].tolist()],
        }

    def loss(self, outputs: Any, batch: Any) -> Any:
        return super().loss(outputs["logits"], batch)


def ragged(tokens: list[dict[str, Tensor]], length: Any) -> Any:
    """Rows in batches of other lengths."""
    return [{name: value[: length(i)] for name, value in row.items()} for i, row in enumerate(tokens)]


def test_a_directory_holds_what_predict_returns(make_fit: MakeFit, tmp_path: Path) -> None:
    fit = make_fit(Tagger(), per_device_eval_batch_size=4)
    whole = fit.predict(token_rows(18))
    written = fit.predict(token_rows(18), output=tmp_path / "predictions")
    assert (written.predictions, written.label_ids) == (tmp_path / "predictions", None)
    assert written.metrics == whole.metrics
    found = read_predictions(written.predictions)
    assert {*found} == {"predictions", "label_ids"}
    assert torch.equal(found["predictions"], whole.predictions) and torch.equal(found["label_ids"], whole.label_ids)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["predictions"]
    assert [len(batch["predictions"]) for batch in iterate_predictions(written.predictions)] == [4, 4, 4, 4, 2]


@pytest.mark.parametrize("rows", [1, 5, 4096])
def test_parquet_holds_what_predict_returns(make_fit: MakeFit, tmp_path: Path, rows: int) -> None:
    fit = make_fit(Several(), per_device_eval_batch_size=4)
    whole = fit.predict(token_rows(18), ignore_keys=["text"])
    path = fit.predict(token_rows(18), output=PredictionWriter(tmp_path / "p.parquet", rows=rows)).predictions
    table = pq.read_table(path)
    assert table.column_names == [
        "logits", "best.token", "best.sure", "mean", "half", "pair_0", "pair_1", "text", "label_ids",
    ]  # fmt: skip
    assert table.num_rows == 18
    expected = whole.predictions
    assert torch.equal(torch.tensor(table["logits"].to_pylist()), expected["logits"])
    assert torch.equal(torch.tensor(table["best.token"].to_pylist()), expected["best"]["token"])
    assert torch.equal(torch.tensor(table["best.sure"].to_pylist()), expected["best"]["sure"])
    assert torch.equal(torch.tensor(table["mean"].to_pylist()), expected["mean"])
    assert torch.equal(torch.tensor(table["half"].to_pylist()), expected["half"].float())
    assert torch.equal(torch.tensor(table["pair_1"].to_pylist()), expected["pair"][1])
    assert table["text"].to_pylist() == [str(int(row["tokens"][0])) for row in token_rows(18)]
    assert torch.equal(torch.tensor(table["label_ids"].to_pylist()), whole.label_ids)
    groups = pq.ParquetFile(path).metadata.num_row_groups
    assert groups == {1: 5, 5: 3, 4096: 1}[rows]  # batches of 4, 4, 4, 4, 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.parquet"]


def test_rows_of_other_lengths(make_fit: MakeFit, tmp_path: Path) -> None:
    """A directory fills them up as predict does; a row of Parquet is as long as it is."""
    rows = ragged(token_rows(12), lambda index: 2 + index // 4)
    fit = make_fit(Tagger(), per_device_eval_batch_size=4, pad_index=-7)
    whole = fit.predict(rows)
    fit.predict(rows, output=PredictionWriter(tmp_path / "d", rows=8))
    assert torch.equal(read_predictions(tmp_path / "d")["predictions"], whole.predictions)
    assert torch.equal(read_predictions(tmp_path / "d")["label_ids"], whole.label_ids)
    fit.predict(rows, output=tmp_path / "p.parquet")
    table = pq.read_table(tmp_path / "p.parquet")
    assert [len(row) for row in table["predictions"].to_pylist()] == [2] * 4 + [3] * 4 + [4] * 4


def test_preprocessing_and_ignored_keys_and_streams(make_fit: MakeFit, tmp_path: Path) -> None:
    fit = make_fit(
        Several(), per_device_eval_batch_size=4, eval_accumulation_steps=3,
        preprocess_logits_for_metrics=lambda outputs, labels: outputs["logits"].argmax(-1),
    )  # fmt: skip
    fit.predict(RowStream(token_rows(10)), output=str(tmp_path / "d"))
    whole = fit.predict(RowStream(token_rows(10)))
    assert torch.equal(read_predictions(tmp_path / "d")["predictions"], whole.predictions)
    fit = make_fit(Several())
    ignored = ["text", "pair", "half", "best"]
    fit.predict(token_rows(10), ignore_keys=ignored, output=tmp_path / "e")
    assert {*read_predictions(tmp_path / "e")} == {"logits", "mean", "label_ids"}


def test_few_rows_are_held(make_fit: MakeFit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a group and a batch, of 500; and with large rows, no more than their bytes."""
    parts: list[Any] = []
    for kind in (TensorPart, ParquetPart):
        add = kind.add

        def noting(self: Any, columns: Any, add: Any = add) -> None:
            parts.append(self)
            add(self, columns)

        monkeypatch.setattr(kind, "add", noting)
    fit = make_fit(Regressor(), per_device_eval_batch_size=4)
    for name in ("d", "p.parquet"):
        fit.predict(regression_rows(500), output=PredictionWriter(tmp_path / name, rows=10))
        assert parts[-1].peak == 12 and parts[-1].held == 0  # flushed at 12, before a fourth batch
        fit.predict(regression_rows(500), output=PredictionWriter(tmp_path / name, max_bytes=100))
        assert parts[-1].peak == 28  # 7 batches of 16 bytes
    assert len(read_predictions(tmp_path / "d")["predictions"]) == 500


# The order, over any number of ranks, without any.


@settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    count=draw.integers(1, 60), world=draw.integers(1, 5), batch=draw.integers(1, 4), held=draw.integers(1, 9),
    parquet=draw.booleans(),
)  # fmt: skip
def test_rows_of_any_world_come_in_order(count: int, world: int, batch: int, held: int, parquet: bool) -> None:
    place = Path(tempfile.mkdtemp(prefix="predictions-"))
    try:
        writer = PredictionWriter(place / ("p.parquet" if parquet else "d"), rows=held)
        kind = ParquetPart if parquet else TensorPart
        parts = [kind(writer, place, rank, -100) for rank in range(world)]
        rows = torch.arange(count)
        for start in range(0, count, world * batch):
            chunk = rows[start : start + world * batch]
            for rank, part in enumerate(parts):
                mine = chunk[rank * batch : (rank + 1) * batch]
                if len(mine):
                    part.add({"predictions": mine, "label_ids": torch.stack([mine, -mine], 1)})
        for part in parts:
            part.close()
            assert part.peak < held + batch
        parts = [part for part in parts if part.batches]
        sizes = [part.batches for part in parts]
        if parquet:
            peak = join([place / part.files[0][0] for part in parts], sizes, place / "joined", writer)
            assert peak <= held + batch - 1 + batch * world
            table = pq.read_table(place / "joined")
            found, labels = torch.tensor(table["predictions"].to_pylist()), torch.tensor(table["label_ids"].to_pylist())
        else:
            index = {
                "version": 1, "rows": count, "pad_index": -100,
                "parts": [{"files": part.files, "batches": run_lengths(part.batches)} for part in parts],
            }  # fmt: skip
            (place / "index.json").write_text(json.dumps(index))
            read = read_predictions(place)
            found, labels = read["predictions"], read["label_ids"]
        assert torch.equal(found, rows) and torch.equal(labels, torch.stack([rows, -rows], 1))
    finally:
        shutil.rmtree(place)


@given(draw.lists(draw.integers(1, 5)))
def test_run_lengths_are_given_back(sizes: list[int]) -> None:
    assert from_run_lengths(run_lengths(sizes)) == sizes


def test_no_part_has_no_batch() -> None:
    assert [*in_order([])] == [] and [*in_order([[], []])] == []


# What goes wrong.


class Failing(Tagger):
    """Fails in its third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.batches += 1
        if self.batches == 3:
            raise RuntimeError("mine")
        return super().forward(tokens)


@pytest.mark.parametrize("name", ["d", "p.parquet"])
def test_a_failure_leaves_what_was_there(make_fit: MakeFit, tmp_path: Path, name: str) -> None:
    rows, output = token_rows(18), PredictionWriter(tmp_path / name, rows=2)
    fit = make_fit(Failing(), per_device_eval_batch_size=4)
    with pytest.raises(RuntimeError, match="mine"):
        fit.predict(rows, output=output)
    assert not [*tmp_path.iterdir()]
    fit.predict(rows[:3], output=output)

    def read() -> Any:
        return (
            pq.read_table(tmp_path / name).num_rows
            if "." in name
            else len(read_predictions(tmp_path / name)["label_ids"])
        )

    assert read() == 3
    fit.module.batches = 0
    with pytest.raises(RuntimeError, match="mine"):
        fit.predict(rows, output=output)
    assert read() == 3 and [p.name for p in tmp_path.iterdir()] == [name]
    fit.predict(rows, output=output)  # and is replaced by one that is whole
    assert read() == 18 and [p.name for p in tmp_path.iterdir()] == [name]


def test_what_a_killed_prediction_left_is_removed(make_fit: MakeFit, tmp_path: Path) -> None:
    for name in ("d", "p.parquet"):
        (tmp_path / f"{name}.partial").mkdir()
        (tmp_path / f"{name}.partial" / "rank00007-00000.safetensors").write_bytes(b"half")
        make_fit(Regressor()).predict(regression_rows(3), output=tmp_path / name)
    (tmp_path / "d").rename(tmp_path / "d.replaced")  # killed between the two renames
    with pytest.raises(RuntimeError, match="mine"):
        fit = make_fit(Failing(), per_device_eval_batch_size=1)
        fit.predict(token_rows(9), output=tmp_path / "d")
    assert len(read_predictions(tmp_path / "d")["predictions"]) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "p.parquet"]


KILLED = """
import os, signal, sys
import torch
from stratagem import Callback, Fit, PredictionWriter
from tiny import Regressor, regression_rows

class Kill(Callback):
    seen = 0
    def on_prediction_step(self, args, state, control, **context):
        self.seen += 1
        if self.seen == 4:
            os.kill(os.getpid(), signal.SIGKILL)

fit = Fit(Regressor(), loggers=(), progress=False, per_device_eval_batch_size=2, callbacks=[Kill()])
fit.predict(regression_rows(20), output=PredictionWriter(sys.argv[1], rows=2))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["d", "p.parquet"])
def test_a_killed_prediction_leaves_nothing_under_its_name(make_fit: MakeFit, tmp_path: Path, name: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == [f"{name}.partial"]
    make_fit(Regressor()).predict(regression_rows(3), output=tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]


class Summed(Tagger):
    """Gives a row for each token beside one for each sample."""

    def forward(self, tokens: Tensor) -> Any:
        logits = super().forward(tokens)
        return {"logits": logits, "flat": logits.flatten(0, 1)}

    def loss(self, outputs: Any, batch: Any) -> Any:
        return super().loss(outputs["logits"], batch)


def test_what_is_refused(make_fit: MakeFit, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "x.parquet").mkdir()

    def refuse(kind: type[Exception], match: str, output: Any, module: Any = None, rows: Any = None) -> None:
        fit: Fit = make_fit(module or Tagger())
        with pytest.raises(kind, match=match):
            fit.predict(token_rows(5) if rows is None else rows, output=output)

    refuse(PredictionError, "isn't a directory of predictions, which would be replaced", tmp_path / "mine")
    refuse(PredictionError, "is a directory. Write the path of a file", tmp_path / "x.parquet")
    refuse(ValueError, "one file that ends in '.parquet', or into a directory", tmp_path / "p.csv")
    refuse(TypeError, "output takes a path", 3)
    refuse(ValueError, "a batch has 5 of logits, 30 of flat, 5 of label_ids", tmp_path / "d", Summed())
    refuse(ValueError, "text holds str, and safetensors files hold tensors", tmp_path / "d", Several())
    for name in ("rows", "max_bytes"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            PredictionWriter("d", **{name: 0})
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "x.parquet"]


def test_parquet_without_its_package(make_fit: MakeFit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install 'stratagem\[parquet\]'. A directory needs nothing more"):
        make_fit(Tagger()).predict(token_rows(5), output=tmp_path / "p.parquet")
    assert not [*tmp_path.iterdir()]


def test_compute_metrics_is_said_not_to_be_called(make_fit: MakeFit, tmp_path: Path) -> None:
    fit = make_fit(Tagger(), compute_metrics=lambda predictions, labels: {"x": 1.0})
    with pytest.warns(UserWarning, match="compute_metrics isn't called where predictions are written"):
        metrics = fit.predict(token_rows(5), output=tmp_path / "d").metrics
    assert {*metrics} == {"test_loss"}


FORGED: list[tuple[Any, Any]] = [
    ("version", 2), ("version", "1"), ("rows", 17), ("rows", -1), ("pad_index", "x"), ("parts", []), ("parts", {}),
    ("parts", [{"files": [["../up.safetensors", 18]], "batches": [[18, 1]]}]),
    ("parts", [{"files": [["missing.safetensors", 18]], "batches": [[18, 1]]}]),
    ("parts", [{"files": [["rank00000-00000.safetensors", 17]], "batches": [[17, 1]]}]),
    ("parts", [{"files": [["rank00000-00000.safetensors", 18]], "batches": [[3, 5]]}]),
    ("parts", [{"files": [["rank00000-00000.safetensors", 18]], "batches": [[0, 5]]}]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), FORGED, ids=str)
def test_a_forged_index_is_refused(make_fit: MakeFit, tmp_path: Path, field: str, value: Any) -> None:
    make_fit(Regressor(), per_device_eval_batch_size=3).predict(regression_rows(18), output=tmp_path / "d")
    index = json.loads((tmp_path / "d" / "index.json").read_text())
    (tmp_path / "d" / "index.json").write_text(json.dumps(index | {field: value}))
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_predictions(tmp_path / "d")


@settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=draw.data())
def test_damaged_files_are_an_error_or_the_same_numbers(make_fit: MakeFit, tmp_path: Path, data: Any) -> None:
    """A byte changed or the end cut off: an error that names the directory, or rows of the right number."""
    place = tmp_path / "d"
    if not place.exists():
        make_fit(Regressor(), per_device_eval_batch_size=3).predict(regression_rows(18), output=place)
    file = data.draw(draw.sampled_from(sorted(place.iterdir())))
    before = file.read_bytes()
    content = bytearray(before)
    where = data.draw(draw.integers(0, len(content) - 1))
    if data.draw(draw.booleans()):
        content[where] ^= data.draw(draw.integers(1, 255))
    else:
        del content[where:]
    try:
        file.write_bytes(bytes(content))
        try:
            assert len(read_predictions(place)["predictions"]) == 18
        except ValueError as error:
            assert str(place) in str(error)
        except KeyError as error:  # a column of another name
            assert error.args == ("predictions",)
    finally:
        file.write_bytes(before)
    assert os.path.exists(place)
