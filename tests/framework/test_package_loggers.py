"""Loggers over real packages, offline: one Fit is one run of W&B or MLflow, whatever it does one after another."""

from pathlib import Path
from typing import Any

import pytest
from stratagem.framework.loggers import Logger
from tiny import MakeFit, Regressor, regression_rows

pytestmark = pytest.mark.slow

ROWS = [{**row, "labels": row["y"]} for row in regression_rows(8)]


def train_evaluate_predict(make_fit: MakeFit, logger: Logger) -> None:
    with make_fit(Regressor(), ROWS, ROWS[:4], max_steps=2, logging_steps=1, loggers=[logger]) as fit:
        fit.train()
        fit.evaluate()
        fit.predict(ROWS[:2])


class WeightsAndBiases(Logger):
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def open(self, fit: Any) -> None:
        import wandb

        self.run = wandb.init(mode="offline", dir=self.directory, project="test", config=fit.args.to_dict())

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)

    def close(self) -> None:
        self.run.finish()


def test_one_run_of_weights_and_biases(make_fit: MakeFit, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    logger = WeightsAndBiases(tmp_path)
    train_evaluate_predict(make_fit, logger)
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    assert {"loss", "eval_loss", "test_loss"} <= set(dict(logger.run.summary))
    assert wandb.run is None  # finished


class MLflow(Logger):
    def __init__(self, uri: str) -> None:
        self.uri = uri

    def open(self, fit: Any) -> None:
        import mlflow

        mlflow.set_tracking_uri(self.uri)
        self.run = mlflow.start_run()
        mlflow.log_params({"learning_rate": fit.args.learning_rate})

    def log(self, metrics: dict[str, float], step: int) -> None:
        import mlflow

        mlflow.log_metrics(metrics, step=step)  # without an active run, MLflow begins another one

    def close(self) -> None:
        import mlflow

        mlflow.end_run()


def test_one_run_of_mlflow(make_fit: MakeFit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file://{tmp_path}/mlruns"
    train_evaluate_predict(make_fit, MLflow(uri))
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs(["0"])
    assert run.info.status == "FINISHED"
    assert {"loss", "eval_loss", "test_loss"} <= set(run.data.metrics)
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == [1, 2]
