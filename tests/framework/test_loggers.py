"""Loggers: numbers are found where and as they were written."""

import gc
import json
import re
import resource
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback
from stratagem.framework.loggers import Logger, LoggerWarning, get_loggers
from stratagem.framework.loggers.base import grouped
from stratagem.framework.loggers.json_lines import JsonLinesLogger
from stratagem.framework.loggers.tensorboard import TensorBoardLogger
from stratagem.precision import FP16Mixed
from tiny import MakeFit, Regressor, StopAt, lines_of, logs_of, regression_rows

RUN: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 5,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
}


def events_in(directory: Path) -> Any:
    """The event files of a directory, read by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(directory)).Reload()


def scalars_in(directory: Path) -> dict[str, dict[int, float]]:
    """All scalars of a logger's directory: run and tag to update to value."""
    found = {}
    for run in (path for path in directory.iterdir() if path.is_dir() and list(path.glob("events*"))):
        events = events_in(run)
        for tag in events.Tags()["scalars"]:
            steps = [event.step for event in events.Scalars(tag)]
            assert steps == sorted(set(steps)), f"{tag}: {steps}"
            found[f"{run.name}/{tag.removeprefix('metrics/')}"] = {
                event.step: event.value for event in events.Scalars(tag)
            }
    return found


# JSON lines.


def test_json_lines_hold_what_the_run_logged(make_fit: MakeFit, tmp_path: Path) -> None:
    fit = make_fit(Regressor(), regression_rows(8), regression_rows(3), loggers=["jsonl"], **RUN)
    fit.train()
    begin, *rest = lines_of(tmp_path / "output" / "log.jsonl")
    assert begin == {"step": 0, "event": "begin", "max_steps": 5}
    assert rest == fit.state.log_history
    assert [line["step"] for line in rest] == [2, 4, 4, 5, 5, 5]  # the last are an evaluation at the end and the totals
    assert list(rest[0]) == ["step", "loss", "learning_rate", "epoch"]


def test_json_lines_is_the_default(tmp_path: Path) -> None:
    from stratagem import Fit

    Fit(Regressor(), regression_rows(4), max_steps=1, output_dir=str(tmp_path), progress=False).train()
    assert [line["step"] for line in lines_of(tmp_path / "log.jsonl")] == [0, 1, 1]


def test_json_lines_go_on_after_a_resume(make_fit: MakeFit, tmp_path: Path) -> None:
    options = {**RUN, "loggers": ["jsonl"], "save_strategy": "steps", "save_steps": 3}
    make_fit(Regressor(), regression_rows(8), regression_rows(3), callbacks=[StopAt(3)], **options).train()
    file = tmp_path / "output" / "log.jsonl"
    before = file.read_text()
    make_fit(Regressor(), regression_rows(8), regression_rows(3), **options).train(resume_from_checkpoint=True)
    assert file.read_text().startswith(before)
    file.write_text(file.read_text().removeprefix(before))
    after = lines_of(file)
    assert after[0] == {"step": 3, "event": "resume", "max_steps": 5}
    assert [line["step"] for line in after[1:]] == [4, 4, 5, 5, 5]


def test_json_lines_after_a_line_that_a_kill_cut_off(make_fit: MakeFit, tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    make_fit(Regressor(), regression_rows(4), max_steps=1, loggers=[JsonLinesLogger(file)]).train()
    first, cut, *rest = file.read_text().splitlines()
    assert (first, cut) == ('{"step": 1, "loss": 0.5}', '{"step": 2, "lo')
    assert [json.loads(line)["step"] for line in rest] == [0, 1, 1, 1]  # the last says that the run came to its end


def test_numbers_that_arent_finite_are_text_in_json(make_fit: MakeFit, tmp_path: Path) -> None:
    make_fit(
        Regressor(),
        regression_rows(4),
        max_steps=1,
        loggers=["jsonl"],
        max_grad_norm=1.0,
        precision=FP16Mixed(initial_scale=2.0**60),
    ).train()
    line = lines_of(tmp_path / "output" / "log.jsonl")[1]
    assert line["grad_norm"] in ("nan", "inf")
    assert line["skipped_updates"] == 1
    # Strict readers take it too: no bare NaN.
    json.loads((tmp_path / "output" / "log.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail)


def test_json_lines_elsewhere(make_fit: MakeFit, tmp_path: Path) -> None:
    file = tmp_path / "other" / "deep" / "numbers.jsonl"
    make_fit(Regressor(), regression_rows(4), max_steps=1, loggers=[JsonLinesLogger(file)]).train()
    assert [line["step"] for line in lines_of(file)] == [0, 1, 1]
    assert not (tmp_path / "output").exists()


# TensorBoard.


def test_tensorboard_events_are_read_back(make_fit: MakeFit, tmp_path: Path) -> None:
    fit = make_fit(Regressor(), regression_rows(8), regression_rows(3), loggers=["tensorboard"], **RUN)
    fit.train()
    fit.close()
    found = scalars_in(tmp_path / "output")
    history = fit.state.log_history
    losses = {line["step"]: line["loss"] for line in history if "loss" in line}
    assert list(losses) == [2, 4, 5]
    assert found["train/loss"] == pytest.approx(losses, rel=1e-6)
    assert found["train/learning_rate"] == pytest.approx({2: 0.1, 4: 0.1, 5: 0.1}, rel=1e-6)
    assert found["eval/loss"] == pytest.approx(
        {line["step"]: line["eval_loss"] for line in history if "eval_loss" in line}, rel=1e-6
    )
    assert not [name for name in found if "epoch" in name or "runtime" in name]
    # One event a log, with all of its numbers.
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    [file] = (tmp_path / "output" / "train").glob("events*")
    logs = [event for event in EventFileLoader(str(file)).Load() if event.step and event.summary.value]
    assert [event.step for event in logs if len(event.summary.value) > 1] == [2, 4, 5]
    assert {value.tag for value in logs[0].summary.value} >= {"metrics/loss", "metrics/learning_rate"}


def test_tensorboard_hides_what_a_killed_run_wrote_beyond_its_checkpoint(make_fit: MakeFit, tmp_path: Path) -> None:
    options = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "logging_steps": 1,
        "loggers": ["tensorboard"],
        "save_strategy": "steps",
        "save_steps": 3,
    }

    class Dies(Callback):
        def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            if state.global_step == 6:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        make_fit(Regressor(), regression_rows(8), callbacks=[Dies()], **options).train()
    time.sleep(1.1)  # event files are ordered by the second in their names
    fit = make_fit(Regressor(), regression_rows(8), **options)
    fit.train(resume_from_checkpoint=True)
    found = scalars_in(tmp_path / "output")["train/loss"]
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert found == pytest.approx({line["step"]: line["loss"] for line in logs_of(fit)}, rel=1e-6)


def test_tensorboard_has_arguments_hparams_and_totals(make_fit: MakeFit, tmp_path: Path) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    options = {**RUN, "eval_steps": 2, "learning_rate": 0.25, "run_name": "mine", "loggers": ["tensorboard"]}
    with make_fit(Regressor(), regression_rows(8), regression_rows(3), **options) as fit:
        fit.train()
        before = fit.evaluate()
        fit.loggers.image("picture", torch.rand(3, 4, 5))
        fit.loggers.histogram("spread", ([1, 2], [0.0, 1.0, 2.0]))
        fit.loggers.table("cases", ["case", "error"], [["a|b", 0.5]])
    events = events_in(tmp_path / "output" / "mine")

    def text(tag: str) -> str:
        return events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()

    assert "| **learning_rate** | 0.25 |" in text("arguments") and "| weight_decay | 0.0 |" in text("arguments")
    assert "| **strategy** | Single() |" in text("arguments")
    assert "| train_runtime | " in text("totals")
    assert text("cases").splitlines()[-1] == "| a&#124;b | 0.5 |"
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["learning_rate"].number_value == 0.25 and hparams["precision"].string_value == "32-true"
    assert not {"output_dir", "run_name", "weight_decay", "eval_steps"} & set(hparams)
    assert [(each.width, each.height) for each in events.Images("picture")] == [(5, 4)]
    assert events.Histograms("spread")[0].histogram_value.bucket == [1, 2]
    # What is evaluated at the end is what HPARAMS shows beside.
    last = events_in(tmp_path / "output" / "mine" / "eval").Scalars("metrics/loss")[-1]
    assert (last.step, last.value) == (5, pytest.approx(before["eval_loss"], rel=1e-6))


def test_tensorboard_hides_another_run_in_the_same_directory(make_fit: MakeFit, tmp_path: Path) -> None:
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "logging_steps": 1, "loggers": ["tensorboard"]}
    with make_fit(Regressor(), regression_rows(8), regression_rows(2), max_steps=6, **options) as fit:
        fit.train()
        fit.evaluate()
    time.sleep(1.1)  # event files are ordered by the second in their names
    with make_fit(Regressor(), regression_rows(8), max_steps=4, **options) as fit:
        fit.train()
    assert list(scalars_in(tmp_path / "output")["train/loss"]) == [1, 2, 3, 4]
    assert scalars_in(tmp_path / "output")["eval/loss"] == {}
    time.sleep(1.1)
    with make_fit(Regressor(), regression_rows(8), regression_rows(2), max_steps=4, **options) as fit:
        fit.evaluate()  # no training: nothing is hidden
    assert list(scalars_in(tmp_path / "output")["train/loss"]) == [1, 2, 3, 4]


def test_tensorboard_elsewhere_beside_json_lines(make_fit: MakeFit, tmp_path: Path) -> None:
    events = tmp_path / "events"
    make_fit(Regressor(), regression_rows(4), max_steps=1, loggers=["jsonl", TensorBoardLogger(events)]).train()
    assert list(scalars_in(events)["train/loss"]) == [1]
    assert (tmp_path / "output" / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("metrics", "groups"),
    [
        ({"loss": 1.0, "grad_norm": 2.0, "epoch": 3.0}, {"train": ["loss", "grad_norm", "epoch"]}),
        ({"eval_loss": 1.0, "eval_news_loss": 2.0, "epoch": 3.0}, {"eval": ["loss", "news_loss"]}),
        ({"val_loss": 1.0, "val_accuracy": 2.0, "epoch": 3.0}, {"val": ["loss", "accuracy"]}),
        ({"loss": 1.0, "aux_loss": 2.0}, {"train": ["loss", "aux_loss"]}),
        ({"first_step_seconds": 1.0}, {"train": ["first_step_seconds"]}),
        ({"train_runtime": 1.0, "train_loss": 2.0, "epoch": 3.0}, {"totals": ["train_runtime", "train_loss"]}),
        ({"epoch": 3.0}, {"train": ["epoch"]}),
        ({"eval_": 1.0, "": 2.0}, {"train": ["eval_", ""]}),
    ],
)
def test_numbers_are_grouped_by_what_they_are_of(metrics: dict[str, float], groups: dict[str, list[str]]) -> None:
    assert {group: list(found) for group, found in grouped(metrics).items()} == groups


# Loggers in general.


class Noting(Logger):
    """Notes what it is told, and raises in the methods that it is told to, as often as it is told to."""

    def __init__(self, **raises: int) -> None:
        self.told: list[Any] = []
        self.raises = raises

    def note(self, method: str, *what: Any) -> None:
        if self.raises.get(method, 0):
            self.raises[method] -= 1
            raise OSError(28, "No space left", f"{method}.txt")
        self.told.append((method, *what))

    def open(self, fit: Any) -> None:
        self.note("open", fit.state.global_step)

    def begin(self, fit: Any) -> None:
        self.note("begin", fit.state.global_step)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.note("log", sorted(metrics)[-1], step)

    def flush(self) -> None:
        self.note("flush")

    def close(self) -> None:
        self.note("close")


def test_a_loggers_life_is_its_fits(make_fit: MakeFit) -> None:
    logger, rows = Noting(), regression_rows(4)
    fit = make_fit(Regressor(), rows, rows, max_steps=1, loggers=[logger])
    assert logger.told == []
    fit.evaluate()
    fit.train()
    fit.evaluate()
    fit.predict(regression_rows(2))  # without labels, but "y" is none
    fit.predict([{**row, "labels": row["y"]} for row in rows])
    fit.train()
    fit.close()
    assert logger.told == [
        ("open", 0),
        ("log", "eval_loss", 0),
        ("begin", 0),
        ("log", "loss", 1),
        ("log", "train_steps_per_second", 1),
        ("flush",),
        ("log", "eval_loss", 1),
        ("log", "test_loss", 1),
        ("begin", 0),
        ("log", "loss", 1),
        ("log", "train_steps_per_second", 1),
        ("flush",),
        ("close",),
    ]
    fit.close()
    fit.evaluate()  # opens it once more
    fit.close()
    assert logger.told[13:] == [("open", 1), ("log", "eval_loss", 1), ("close",)]


def test_a_logger_is_closed_with_the_block_and_with_the_fit(make_fit: MakeFit) -> None:
    logger, other = Noting(), Noting()
    with make_fit(Regressor(), regression_rows(4), max_steps=1, loggers=[logger]) as fit:
        fit.train()
        assert logger.told[-1] == ("flush",)
    assert logger.told[-1] == ("close",)
    fit = make_fit(Regressor(), regression_rows(4), max_steps=1, loggers=[other])
    fit.train()
    del fit
    gc.collect()
    assert other.told[-1] == ("close",)


def test_a_logger_is_flushed_when_training_fails(make_fit: MakeFit) -> None:
    logger = Noting()
    data = [{"y": regression_rows(1)[0]["y"]}]
    with pytest.raises(ValueError, match="forward needs x"):
        make_fit(Regressor(), data, max_steps=1, loggers=[logger]).train()
    assert logger.told[:3] == [("open", 0), ("begin", 0), ("flush",)]


@pytest.mark.parametrize("method", ["open", "begin", "log", "flush", "close"])
def test_a_logger_that_raises_is_warned_of_and_training_goes_on(make_fit: MakeFit, method: str) -> None:
    bad, good = Noting(**{method: 3}), Noting()
    fit = make_fit(Regressor(), regression_rows(8), max_steps=4, logging_steps=1, loggers=[bad, good])
    said = rf"The logger Noting raised in {method} \(OSError: \[Errno 28\] No space left: '{method}.txt'\)"
    with pytest.warns(LoggerWarning) as warned, fit:
        assert fit.train().global_step == 4
    assert re.match(said, str(warned[0].message))
    assert [line[2] for line in good.told if line[0] == "log"] == [1, 2, 3, 4, 4]  # the last are the totals
    if method == "log":  # it is told the next numbers all the same, and what is missing is said
        assert [line[2] for line in bad.told if line[0] == "log"] == [4, 4]
        assert [str(each.message) for each in warned[1:]] == [
            "The logger Noting failed 3 times: numbers may be missing where it writes."
        ]


def test_json_lines_leave_out_whole_lines_that_the_disk_has_no_place_for(make_fit: MakeFit, tmp_path: Path) -> None:
    file = tmp_path / "output" / "log.jsonl"

    class Full(Callback):
        """The file may not grow by more than 10 bytes from update 2 on, until update 4."""

        def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            if state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, hard))
            if state.global_step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    fit = make_fit(Regressor(), regression_rows(8), max_steps=5, logging_steps=1, loggers=["jsonl"], callbacks=[Full()])
    with pytest.warns(LoggerWarning, match="JsonLinesLogger raised in log"), fit:
        fit.train()
    assert [line["step"] for line in lines_of(file)] == [0, 1, 4, 5, 5]


@pytest.mark.parametrize("logger", ["jsonl", "tensorboard"])
def test_a_directory_that_is_removed_is_made_again(make_fit: MakeFit, tmp_path: Path, logger: str) -> None:
    class Removing(Callback):
        def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            if state.global_step == 2:
                fit.loggers.flush()
                shutil.rmtree(tmp_path / "output")

    arguments: dict[str, Any] = {"max_steps": 40, "logging_steps": 1, "callbacks": [Removing()]}
    fit = make_fit(Regressor(), regression_rows(8), loggers=[logger], **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorBoard's thread, too, says that it failed
        fit.train()
        fit.evaluate(regression_rows(2))
        fit.close()
    if logger == "jsonl":
        assert [line["step"] for line in lines_of(tmp_path / "output" / "log.jsonl")] == [*range(2, 41), 40, 40]
    else:
        found = scalars_in(tmp_path / "output")
        assert max(found["train/loss"]) == 40 and found["eval/loss"].keys() == {40}


def test_unknown_loggers(make_fit: MakeFit) -> None:
    with pytest.raises(ValueError, match=r"Unknown logger 'tensorbord'\. Did you mean 'tensorboard'"):
        get_loggers(["tensorbord"])
    with pytest.raises(TypeError, match=r"loggers takes a list, e\.g\. loggers=\['jsonl'\]"):
        get_loggers("jsonl")
    with pytest.raises(TypeError, match="logger takes a name or a Logger instance"):
        get_loggers([3])  # type: ignore[list-item]
