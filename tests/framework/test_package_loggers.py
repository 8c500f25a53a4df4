"""Loggers over real packages, offline: one Fit is one run of the tracker, and a resumed training goes on in it."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback, CometLogger, Fit, MlflowLogger, TrackioLogger, WandbLogger
from stratagem.framework.loggers import together
from tiny import MakeFit, Regressor, StopAt, regression_rows

pytestmark = pytest.mark.slow

ROWS = [{**row, "labels": row["y"]} for row in regression_rows(8)]
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "logging_steps": 1,
    "learning_rate": 0.125,
    "run_name": "one run",
    "save_strategy": "steps",
    "save_steps": 2,
}


class Shows(Callback):
    """Shows one of everything at the first update."""

    def on_step_end(self, args: Any, state: Any, control: Any, *, fit: Fit, **context: Any) -> None:
        if state.global_step == 1:
            fit.loggers.image("picture", torch.rand(3, 6, 8))
            fit.loggers.text("remark", "some *words*")
            fit.loggers.histogram("spread", torch.arange(100.0))
            fit.loggers.table("cases", ["case", "error"], [["first", 0.5], ["second", 0.25]])


def train_twice(make_fit: MakeFit, logger: Any) -> None:
    """Train to update 3, killed there, and from checkpoint-2 to the end; then evaluate and predict."""
    fit = make_fit(Regressor(), ROWS, ROWS[:4], loggers=[logger], callbacks=[StopAt(3), Shows()], **OPTIONS)
    fit.train()
    fit.close()
    with make_fit(Regressor(), ROWS, ROWS[:4], loggers=[logger], **OPTIONS) as fit:
        fit.train(resume_from_checkpoint=fit.args.output_dir + "/checkpoint-2")
        fit.evaluate()
        fit.predict(ROWS[:2])


@pytest.fixture(autouse=True)
def no_warnings(recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No logger failed, or was behind: MLflow makes the tables of its store first, on a machine that others use."""
    monkeypatch.setattr(together, "AFTER_TRAINING", 120.0)
    monkeypatch.setattr(together, "AT_THE_END", 120.0)
    yield
    assert [str(each.message) for each in recwarn if "logger" in str(each.message).lower()] == []


def test_one_run_of_weights_and_biases(make_fit: MakeFit, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")

    class Kept(WandbLogger):
        """Keeps what the run has when it is finished."""

        summaries: list[dict[str, Any]] = []

        def close(self) -> None:
            self.summaries.append({**dict(self.run.summary), "config": dict(self.run.config), "name": self.run.name})
            super().close()

    train_twice(make_fit, Kept(mode="offline", project="test"))
    written = sorted((tmp_path / "output" / "wandb").glob("offline-run-*"))
    kept = json.loads((tmp_path / "output" / "trackers.json").read_text())["wandb"]
    assert len(written) == 2 and all(path.name.endswith(f"-{kept}") for path in written)  # `wandb sync` joins them
    first, second = Kept.summaries
    assert first["update"] == 3 and {"picture", "remark", "spread", "cases"} <= first.keys()
    assert second["update"] == 4 and {"train/loss", "eval/loss", "test/loss", "train_runtime"} <= second.keys()
    assert (first["name"], first["config"]["learning_rate"]) == ("one run", 0.125)
    assert first["config"]["strategy"] == "Single()" and first["config"]["precision"] == "32-true"
    assert wandb.run is None  # finished


def test_one_run_of_mlflow(make_fit: MakeFit, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("test", artifact_location=(tmp_path / "artifacts").as_uri())
    train_twice(make_fit, MlflowLogger("test", uri, stage="trial"))
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.info.run_name, run.data.tags["stage"]) == ("FINISHED", "one run", "trial")
    assert {"train/loss", "eval/loss", "test/loss", "totals/train_runtime"} <= run.data.metrics.keys()
    assert run.data.params["learning_rate"] == "0.125" and run.data.params["strategy"] == "Single()"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in sorted(history, key=lambda each: each.timestamp)] == [1, 2, 3, 3, 4]
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "eval/loss")] == [4]
    kept = {str(path.relative_to(tmp_path / "artifacts")) for path in (tmp_path / "artifacts").rglob("*.*")}
    assert sum("picture" in name and name.endswith(".png") for name in kept) == 1
    assert {Path(name).parts[-2] for name in kept if name.endswith(("1.md", "1.json"))} == {"remark", "cases"}


def test_one_run_of_trackio(make_fit: MakeFit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio")
    project = f"test-{tmp_path.name}"
    train_twice(make_fit, TrackioLogger(project, auto_log_cpu=False))
    (run,) = trackio.Api().runs(project)
    assert run.name == "one run" and run.config["learning_rate"] == 0.125 and run.config["precision"] == "32-true"
    rows = trackio.SQLiteStorage.get_logs(project, run.name)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 3, 4]
    assert [row["step"] for row in rows if "eval/loss" in row] == [4]
    assert {"picture", "remark", "spread", "cases"} <= {name for row in rows for name in row}


def test_one_experiment_of_comet(make_fit: MakeFit, tmp_path: Path) -> None:
    pytest.importorskip("comet_ml")
    train_twice(make_fit, CometLogger("test", online=False, offline_directory=str(tmp_path / "comet")))
    told: list[dict[str, Any]] = []
    keys, kept = set(), []
    for archive in sorted((tmp_path / "comet").glob("*.zip"), key=lambda path: path.stat().st_mtime):
        with zipfile.ZipFile(archive) as files:
            keys.add(json.loads(files.read("experiment.json"))["offline_id"])
            told += [json.loads(line) for line in files.read("messages.json").splitlines()]
            kept += [files.read(name) for name in files.namelist()]
    assert keys == {json.loads((tmp_path / "output" / "trackers.json").read_text())["comet"]}
    metrics = [each["payload"]["metric"] for each in told if each["type"] == "metric_msg"]
    assert [each["step"] for each in metrics if each["metricName"] == "train/loss"] == [1, 2, 3, 3, 4]
    assert [each["step"] for each in metrics if each["metricName"] == "eval/loss"] == [4]
    assert '"one run"' in json.dumps(told) and '"learning_rate"' in json.dumps(told)
    assert {"picture", "cases-1.csv", "remark"} <= set(strings_in(told)) and b"some *words*" in kept


def strings_in(found: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(found, str):
        yield found
    for each in found.values() if isinstance(found, dict) else found if isinstance(found, list) else ():
        yield from strings_in(each)


def test_what_was_evaluated_before_a_resume_is_no_reason_for_another_run(make_fit: MakeFit, tmp_path: Path) -> None:
    """A Fit that evaluates first opens its tracker before it is known that training will be resumed."""
    from stratagem.framework.loggers.tracker import Tracker

    class Counting(Tracker):
        word = "counting"
        told: list[Any] = []

        def start(self, fit: Any, kept: str | None) -> str:
            name = kept or f"run-{len([each for each in self.told if each[0] == 'start'])}"
            self.told.append(("start", name))
            return name

        def log(self, metrics: dict[str, float], step: int) -> None:
            self.told.append((self.id, step))

    fit = make_fit(Regressor(), ROWS, ROWS[:4], loggers=[Counting()], callbacks=[StopAt(2)], **OPTIONS)
    fit.train()
    fit.close()
    Counting.told.clear()
    Counting.told.append(("start", "one that another program began"))
    with make_fit(Regressor(), ROWS, ROWS[:4], loggers=[Counting()], **OPTIONS) as fit:
        fit.evaluate()
        fit.train(resume_from_checkpoint=True)
    assert Counting.told[1:] == [
        *[("start", "run-1"), ("run-1", 0)],
        *[("start", "run-0"), ("run-0", 3), ("run-0", 4), ("run-0", 4)],
    ]
    (tmp_path / "output" / "trackers.json").write_text("[1")  # as nobody would leave it
    with make_fit(Regressor(), ROWS, ROWS[:4], loggers=[Counting()], **{**OPTIONS, "max_steps": 5}) as fit:
        fit.train(resume_from_checkpoint=True)
    assert Counting.told[-3][0] == "start"


@pytest.mark.parametrize("word", ["tensorboard", "wandb", "mlflow", "trackio", "comet"])
def test_a_package_that_is_missing_is_refused_when_fit_is_made(
    make_fit: MakeFit, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stratagem.framework.loggers as room

    monkeypatch.setattr(room, "find_spec", lambda package: None)
    with pytest.raises(ImportError, match=rf"needs the package \w+: pip install 'stratagem\[{word}\]'"):
        make_fit(Regressor(), ROWS, loggers=[word])


def test_nothing_is_imported_before_it_is_needed() -> None:
    import subprocess
    import sys

    program = (
        "import sys, stratagem; from stratagem.framework.loggers import get_loggers, LOGGERS; get_loggers(LOGGERS);"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & set(sys.argv[1:])))"
    )
    names = ["wandb", "mlflow", "trackio", "comet_ml", "tensorboard"]
    for name in names:
        pytest.importorskip(name)
    said = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
