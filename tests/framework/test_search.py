"""hyperparameter_search: fresh trials, one named objective, pruning, studies that outlive a process, and reports."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from stratagem import Callback, Fit
from tiny import MakeFit, Regressor, parameters_of, regression_rows

RATES = [0.3, 0.001, 0.1]
RUN: dict[str, Any] = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "shuffle": True}


def fixed(*values: float, name: str = "learning_rate") -> Callable[[Any], dict[str, Any]]:
    """A space whose n-th trial has the n-th value."""
    return lambda trial: {name: trial.suggest_categorical(name, [values[trial.number]])}


@pytest.fixture
def fit(make_fit: MakeFit) -> Fit:
    return make_fit(Regressor(), regression_rows(40), regression_rows(16), loggers=("jsonl",), **RUN)


def test_trials_are_fresh_and_the_best_ones_arguments_stay(fit: Fit) -> None:
    start = parameters_of(fit.module)
    found = fit.hyperparameter_search(fixed_grid(RATES), n_trials=3)
    values = [trial.values[0] for trial in found.trials]
    assert found.best is not None and found.best.number == values.index(min(values)) == 0  # not the last one
    assert fit.args.learning_rate == 0.3 and fit.args.output_dir.endswith("output")
    assert len({trial.arguments["seed"] for trial in found.trials}) == 3
    for name, tensor in fit.module.state_dict().items():
        assert torch.equal(tensor, start[name]), name

    # Each run is, to the bit, that of a Fit which has done nothing else; and so is the best one, repeated.
    for trial in found.trials:
        alone = Regressor()
        alone.load_state_dict(start)
        arguments = fit.args.replace(**trial.arguments)
        other = Fit(alone, fit.train_data, fit.eval_data, args=arguments, loggers=())
        other.train()
        assert min(log["eval_loss"] for log in other.state.log_history if "eval_loss" in log) == trial.values[0]
    fit.train()
    assert min(log["eval_loss"] for log in fit.state.log_history if "eval_loss" in log) == min(values)


def fixed_grid(values: list[float]) -> Callable[[Any], dict[str, Any]]:
    """The n-th trial has the n-th value, and Optuna knows of it as a number in a range."""

    def space(trial: Any) -> dict[str, Any]:
        value = values[trial.number]
        return {"learning_rate": trial.suggest_float("learning_rate", value, value)}

    return space


@pytest.mark.slow
def test_module_init_makes_a_module_for_each_trial(make_fit: MakeFit) -> None:
    made = []

    class Wide(Regressor):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.hidden, self.head = torch.nn.Linear(3, width), torch.nn.Linear(width, 1)

    def module_init(trial: Any) -> Wide:
        made.append(Wide(4 if trial is None else trial.suggest_int("width", 2, 9)))
        return made[-1]

    fit = make_fit(None, regression_rows(40), regression_rows(16), module_init=module_init, **RUN)
    space = {"learning_rate": optuna.distributions.FloatDistribution(0.01, 0.3)}
    found = fit.hyperparameter_search(space, n_trials=3)
    assert found.best is not None and set(found.best.params) == {"learning_rate", "width"}
    assert fit.module is made[-1] and fit.module.hidden.out_features == found.best.params["width"]
    assert [each.hidden.out_features for each in made[1:4]] == [trial.params["width"] for trial in found.trials]
    fit.train()
    assert min(log["eval_loss"] for log in fit.state.log_history if "eval_loss" in log) == found.best.values[0]

    fit.train(trial=optuna.trial.FixedTrial({"width": 7, "learning_rate": 0.2}))
    assert fit.module.hidden.out_features == 7 and fit.args.learning_rate == 0.2
    once = parameters_of(fit.module)
    fit.train(trial={"width": 7, "learning_rate": 0.2})
    assert all(torch.equal(tensor, once[name]) for name, tensor in fit.module.state_dict().items())
    fit.train(trial={"width": 7, "optim": "sgd"})  # what a placed module can't take, a fresh one can
    fit.train()  # the best trial again
    assert min(log["eval_loss"] for log in fit.state.log_history if "eval_loss" in log) == found.best.values[0]
    with pytest.raises(TypeError, match=r"no argument 'widht'"):
        fit.train(trial={"width": 7, "widht": 7})


def test_a_trial_of_optuna_takes_effect(fit: Fit) -> None:
    fit.train(trial=optuna.trial.FixedTrial({"learning_rate": 0.25, "max_steps": 3}))
    assert fit.args.learning_rate == 0.25 and fit.state.global_step == 3
    study = optuna.create_study()
    study.enqueue_trial({"max_steps": 4})
    trial = study.ask({"max_steps": optuna.distributions.IntDistribution(1, 9)})
    fit.train(trial=trial)
    assert fit.state.global_step == 4 and fit.args.learning_rate == 0.1
    with pytest.raises(TypeError, match=r"no argument 'learning_rat'. .*'learning_rate'"):
        fit.train(trial={"learning_rat": 0.1})
    with pytest.raises(ValueError, match="shuffle='False': must be bool, not str"):
        fit.train(trial={"shuffle": "False"})
    with pytest.raises(ValueError, match=r"optim: the module was placed.*module_init"):
        fit.train(trial={"optim": "sgd"})
    with pytest.raises(TypeError, match="a trial of Optuna"):
        fit.train(trial="best")


class Script(Callback):
    """Replaces what evaluations give, and counts how runs end."""

    def __init__(self, curves: list[list[float]]) -> None:
        self.curves, self.runs, self.ends, self.seen = curves, -1, 0, 0

    def on_train_begin(self, *_: Any, **context: Any) -> None:
        self.runs, self.seen = self.runs + 1, 0

    def on_log(self, *_: Any, logs: dict[str, float], fit: Fit, **context: Any) -> None:
        if "eval_loss" in logs:
            logs["eval_loss"] = self.curves[self.runs][self.seen]
            self.seen += 1

    def on_train_end(self, *_: Any, **context: Any) -> None:
        self.ends += 1


CURVES = [[3.0, 1.0, 2.0], [4.0, 1.5, 1.5], [2.5, math.nan, 1.75]]


@pytest.mark.parametrize(
    ("direction", "take", "values"),
    [
        ("minimize", "best", [1.0, 1.5, 1.75]),
        pytest.param("maximize", "best", [3.0, 4.0, 2.5], marks=pytest.mark.slow),
        pytest.param("minimize", "last", [2.0, 1.5, 1.75], marks=pytest.mark.slow),
    ],
)
def test_the_objective_is_one_metric_of_the_run(
    make_fit: MakeFit, direction: str, take: str, values: list[float]
) -> None:
    fit = make_fit(Regressor(), regression_rows(40), regression_rows(16), callbacks=[Script(CURVES)], **RUN)
    found = fit.hyperparameter_search(fixed_grid(RATES), direction=direction, take=take, n_trials=3)
    assert [trial.values[0] for trial in found.trials] == values
    best = (min if direction == "minimize" else max)(values)
    assert found.best is not None and found.best.number == values.index(best)


@pytest.mark.slow
def test_several_objectives_give_the_pareto_front(make_fit: MakeFit) -> None:
    numbers = iter([(1.0, 1.0), (2.0, 3.0), (1.5, 0.5)])

    def both(outputs: Any, labels: Any) -> dict[str, float]:
        a, b = next(numbers)
        return {"a": a, "b": b}

    rows = [{**row, "labels": row["y"]} for row in regression_rows(16)]
    fit = make_fit(Regressor(), rows, rows, compute_metrics=both, max_steps=2)
    found = fit.hyperparameter_search(fixed_grid(RATES), ["a", "b"], ["minimize", "maximize"], n_trials=3)
    assert [trial.values for trial in found.trials] == [(1.0, 1.0), (2.0, 3.0), (1.5, 0.5)]
    assert {trial.number for trial in found.pareto} == {0, 1} and found.best is None
    assert fit.args.learning_rate == 0.1  # as it was


@pytest.mark.slow
def test_a_pruned_trial_ends_cleanly_and_alone(make_fit: MakeFit, tmp_path: Path) -> None:
    opened: list[str] = []

    class Watched(Script):
        def on_train_begin(self, args: Any, *_: Any, **context: Any) -> None:
            super().on_train_begin()
            opened.append(args.output_dir)

    script = Watched([[3.0, 2.0, 1.0], [9.0, 8.0, 7.0], [2.0, 1.0, 0.5]])

    class Trickster(Regressor):
        def loss(self, outputs: Any, batch: Any) -> Any:
            loss = super().loss(outputs, batch)
            return loss if self.training else loss * 0 + script.curves[script.runs][script.seen]

    fit = make_fit(Trickster(), regression_rows(40), regression_rows(16), callbacks=[script], loggers=("jsonl",), **RUN)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=1)
    found = fit.hyperparameter_search(fixed_grid(RATES), n_trials=3, pruner=pruner)
    assert [trial.state for trial in found.trials] == ["complete", "pruned", "complete"]
    assert found.trials[1].values == (9.0,) and found.best is not None and found.best.number == 2
    assert script.ends == 3 and fit.loggers.all[0].file is None  # type: ignore[attr-defined]
    logs = [map(json.loads, (Path(path) / "log.jsonl").read_text().splitlines()) for path in opened]
    steps = [[row["step"] for row in log] for log in logs]
    assert [max(each) for each in steps] == [6, 2, 6]


@pytest.mark.slow
def test_a_failed_trial_is_recorded_and_the_search_goes_on(make_fit: MakeFit) -> None:
    class Fragile(Regressor):
        def loss(self, outputs: Any, batch: Any) -> Any:
            if fit.args.learning_rate == 0.001:
                raise ZeroDivisionError("by the learning rate")
            return super().loss(outputs, batch)

    fit = make_fit(Fragile(), regression_rows(40), regression_rows(16), **RUN)
    found = fit.hyperparameter_search(fixed_grid(RATES), n_trials=3, catch=(ZeroDivisionError,))
    assert [trial.state for trial in found.trials] == ["complete", "failed", "complete"]
    assert found.trials[1].error == "ZeroDivisionError: by the learning rate"
    with pytest.raises(ZeroDivisionError):
        fit.hyperparameter_search(fixed_grid(RATES), n_trials=3)
    fit.train(trial={"learning_rate": 0.2})  # the Fit is as it was before the search
    assert fit.state.global_step == 6


@pytest.mark.slow
def test_what_can_not_work_is_refused_together(fit: Fit, make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch) -> None:
    space = fixed_grid(RATES)
    with pytest.raises(ValueError, match=r"(?s)direction='up'.*take='first'.*n_trials=0.*pruner='medium'.*'median'"):
        fit.hyperparameter_search(space, direction="up", take="first", n_trials=0, pruner="medium")
    with pytest.raises(ValueError, match="never end"):
        fit.hyperparameter_search(space, n_trials=None)
    with pytest.raises(ValueError, match="one objective"):
        fit.hyperparameter_search(space, ["loss", "accuracy"], ["minimize", "maximize"], pruner="median")
    with pytest.raises(TypeError, match="name of one metric"):
        fit.hyperparameter_search(space, lambda metrics: sum(metrics.values()))
    with pytest.raises(ValueError, match=r"sampler=.*pickles"):
        fit.hyperparameter_search(space, sampler=optuna.samplers.CmaEsSampler())
    with pytest.raises(ValueError, match=r"sqlite:///search\.db"):
        fit.hyperparameter_search(space, storage="search.db")
    with pytest.raises(ValueError, match=r"eval_accuracy isn't among .* eval_loss"):
        fit.hyperparameter_search(space, "accuracy", n_trials=1)
    with pytest.raises(TypeError, match=r"no argument 'lerning_rate'.*learning_rate"):
        fit.hyperparameter_search(fixed(0.1, name="lerning_rate"), n_trials=1)
    with pytest.raises(ValueError, match="must be bool, not str"):
        fit.hyperparameter_search(fixed("False", name="shuffle"), n_trials=1)  # type: ignore[arg-type]
    monkeypatch.setattr("stratagem.framework.search.options.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="plot=True: needs matplotlib"):
        fit.hyperparameter_search(space, plot=True)
    unwatched = make_fit(Regressor(), regression_rows(8), regression_rows(8), max_steps=2)
    with pytest.raises(ValueError, match="eval_strategy"):
        unwatched.hyperparameter_search(space, pruner="median")
    unwatched.train()
    with pytest.raises(ValueError, match="module_init"):
        unwatched.hyperparameter_search(space)


@pytest.mark.slow
def test_hparams_lines_table_and_pictures(
    make_fit: MakeFit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    fit = make_fit(Regressor(), regression_rows(40), regression_rows(16), **{**RUN, "progress": True})
    found = fit.hyperparameter_search(fixed_grid(RATES), n_trials=3, plot=True)
    printed = capsys.readouterr().out
    assert printed.count("\ntrial ") + printed.startswith("trial ") == 3 and "trial 2 (3/3) | complete" in printed
    assert "Search 'search'" in printed and "0.001" in printed
    assert "update 2/6" not in printed and "module " not in printed  # a line a trial, not a line a log
    for name in ("history.png", "importance.png"):
        assert (tmp_path / "output" / "search" / name).read_bytes()[:4] == b"\x89PNG"

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    for trial in found.trials:
        assert trial.directory is not None
        events = EventAccumulator(str(trial.directory / "search")).Reload()
        content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        hparams = HParamsPluginData.FromString(content).session_start_info.hparams
        assert hparams["learning_rate"].number_value == RATES[trial.number]
        assert events.Scalars("objective/eval_loss")[0].value == pytest.approx(trial.values[0])


@pytest.mark.slow
def test_checkpoints_of_losing_trials_are_removed(make_fit: MakeFit) -> None:
    fit = make_fit(
        Regressor(),
        regression_rows(40),
        regression_rows(16),
        loggers=("jsonl",),
        **{**RUN, "save_strategy": "steps", "save_steps": 3},
    )
    found = fit.hyperparameter_search(fixed_grid(RATES), n_trials=3, remove_losing_checkpoints=True)
    assert found.best is not None
    for trial in found.trials:
        assert trial.directory is not None and (trial.directory / "log.jsonl").is_file()
        left = sorted(path.name for path in trial.directory.glob("checkpoint-*"))
        assert left == (["checkpoint-3", "checkpoint-6"] if trial.number == found.best.number else [])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["sqlite:///", "journal://"])
def test_a_stored_search_goes_on_where_it_ended(make_fit: MakeFit, tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}{tmp_path / 'study'}"
    space = {"learning_rate": optuna.distributions.FloatDistribution(0.001, 0.3, log=True)}

    def search(n_trials: int, storage: str | None = url, **arguments: Any) -> Any:
        fit = make_fit(seeded_regressor(), regression_rows(40), regression_rows(16), **{**RUN, **arguments})
        return fit.hyperparameter_search(space, n_trials=n_trials, storage=storage)

    first = search(2)
    then = search(4)
    assert [trial.params for trial in then.trials[:2]] == [trial.params for trial in first.trials]
    assert len({trial.params["learning_rate"] for trial in then.trials}) == 4  # none repeated
    unbroken = search(4, storage=None, output_dir=str(tmp_path / "other"))
    assert [t.values for t in unbroken.trials] == [t.values for t in then.trials]
    assert [t.params for t in unbroken.trials] == [t.params for t in then.trials]
    assert len(search(4).trials) == 4
    with pytest.raises(ValueError, match="Write output_dir="):
        search(5, output_dir=str(tmp_path / "elsewhere"))


def seeded_regressor() -> Regressor:
    torch.manual_seed(3)
    return Regressor()


PROGRAM = Path(__file__).parent / "killed_search.py"


def start(directory: Path, n_trials: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(directory), str(n_trials)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def finished(process: "subprocess.Popen[str]") -> Any:
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(printed.splitlines()[-1])


@pytest.mark.slow
def test_a_killed_search_goes_on_with_no_trial_lost_or_repeated(tmp_path: Path) -> None:
    killed = start(tmp_path / "killed", 4)
    log = tmp_path / "killed" / "search" / "trial-00002" / "log.jsonl"
    checkpoint = log.with_name("checkpoint-4")
    wait_for(lambda: checkpoint.is_dir())  # in the middle of the third trial
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    storage = f"sqlite:///{tmp_path / 'killed' / 'study.db'}"
    states = [trial.state.name for trial in optuna.load_study(study_name="search", storage=storage).trials]
    assert states == ["COMPLETE", "COMPLETE", "RUNNING"]

    continued, unbroken = start(tmp_path / "killed", 4), start(tmp_path / "unbroken", 4)
    trials, whole = finished(continued), finished(unbroken)
    assert [trial["retry_of"] for trial in trials] == [None, None, 2, None]
    assert [trial["state"] for trial in trials] == ["complete"] * 4
    for mine, theirs in zip(trials[:3], whole[:3], strict=True):
        assert (mine["params"], mine["values"]) == (theirs["params"], theirs["values"])
    assert len({str(trial["params"]) for trial in trials}) == 4
    events = [json.loads(line) for line in log.read_text().splitlines()]
    resumed = [row["step"] for row in events if row.get("event") == "resume"]
    assert resumed == [4]
    assert trials[2]["directory"] == str(log.parent)
    assert not list((tmp_path / "killed").rglob("claim"))


def test_each_trial_begins_with_the_first_loss_scale(make_fit: MakeFit) -> None:
    """A loss whose scaled gradients overflow halves the scale in each trial alike."""

    class Steep(Regressor):
        def loss(self, outputs: Any, batch: Any) -> Any:
            return 1e4 * super().loss(outputs, batch)

    fit = make_fit(
        Steep(),
        regression_rows(40),
        regression_rows(16),
        precision="16-mixed",
        logging_steps=1,
        **{**RUN, "max_steps": 2},
    )
    scales: list[list[float]] = []

    class Scales(Callback):
        def on_train_begin(self, *context: Any, **_: Any) -> None:
            scales.append([])

        def on_log(self, *context: Any, logs: dict[str, float], **_: Any) -> None:
            scales[-1] += [logs["loss_scale"]] if "loss_scale" in logs else []

    fit.add_callback(Scales())
    fit.hyperparameter_search(fixed(0.01, 0.01), n_trials=2)
    assert scales[0][-1] < 65536.0
    assert scales[0] == scales[1]


@pytest.mark.slow
def test_two_processes_share_a_study(tmp_path: Path) -> None:
    both = [start(tmp_path / "shared", 5) for _ in range(2)]
    for process in both:
        finished(process)
    storage = f"sqlite:///{tmp_path / 'shared' / 'study.db'}"
    trials = optuna.load_study(study_name="search", storage=storage).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 5
    assert len({trial.params["learning_rate"] for trial in trials}) == 5
    begun = [path.read_text().count('"begin"') for path in (tmp_path / "shared" / "search").glob("trial-*/log.jsonl")]
    assert begun == [1] * 5
