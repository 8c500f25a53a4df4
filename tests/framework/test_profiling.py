"""Profilers: what a trace holds, what its tables say, how large it gets, and that nothing is left open."""

import gc
import gzip
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback, Fit, SimpleProfiler, TorchProfiler
from stratagem.framework.configuration import options
from stratagem.framework.profiling import PROFILERS, get_profiler
from stratagem.framework.profiling.callback import ProfileWarning
from stratagem.framework.profiling.phases import OTHER, PHASES
from stratagem.framework.profiling.recording import Recording, totals_of
from stratagem.strategies import Single
from tiny import MakeFit, Regressor, parameters_of, regression_rows
from torch.profiler import profile

SHORT = {"wait": 2, "warmup": 1, "active": 3}  # updates 4 to 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "output" / "profile"


def spans_of(trace: Path) -> list[tuple[str, float, float]]:
    """(name, begin, end) of a trace's events that have a length, in microseconds."""
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    return [
        (e["name"], float(e["ts"]), float(e["ts"]) + float(e["dur"]))
        for e in events
        if e.get("ph") == "X" and e.get("cat") == "user_annotation"
    ]


def outermost(spans: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """The phases that are in no other phase."""
    phases = [span for span in spans if span[0] in PHASES]
    return [s for s in phases if not any(o is not s and o[1] <= s[1] and s[2] <= o[2] for o in phases)]


def train(make_fit: MakeFit, profiler: Any, steps: int = 10, **arguments: Any) -> Any:
    options = {"per_device_train_batch_size": 4, "max_steps": steps, "gradient_accumulation_steps": 2, **arguments}
    fit = make_fit(Regressor(), regression_rows(24), regression_rows(8), profiler=profiler, **options)
    fit.train()
    return fit


def test_phases_nest_in_updates_and_make_up_their_time(make_fit: MakeFit, folder: Path) -> None:
    evaluates = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 6}
    fit = train(make_fit, TorchProfiler(**SHORT), max_grad_norm=1.0, logging_steps=4, **evaluates)
    found = json.loads((folder / "phases.json").read_text())
    assert found["updates"] == [4, 6] and found["trace"] == "trace-rank0-update4.json.gz"
    spans = spans_of(folder / found["trace"])
    updates = sorted((s for s in spans if s[0].startswith("ProfilerStep#")), key=lambda s: s[1])
    assert [name for name, _, _ in updates] == ["ProfilerStep#4", "ProfilerStep#5", "ProfilerStep#6"]
    phases = outermost(spans)
    assert [sum(a <= begin and end <= b for _, a, b in updates) for _, begin, end in phases] == [1] * len(phases)
    counts = {phase: [name for name, _, _ in phases].count(phase) for phase in PHASES}
    # An epoch is 3 updates: the read that finds the end of the first one belongs to what follows.
    assert counts == {
        "data": 4, "forward": 6, "backward": 6, "gradients": 3, "optimizer": 3, "evaluation": 1, "saving": 1,
        "logging": 1,
    }  # fmt: skip

    # The clock that made the table and the one that made the trace are two: they differ by the labels themselves,
    # which take what the gap between a label and the first thing in it takes.
    traced = {phase: sum(e - b for name, b, e in phases if name == phase) / 1e6 for phase in PHASES}
    whole = (updates[-1][2] - updates[0][1]) / 1e6
    gaps = whole - sum(traced.values())
    bound = gaps + 2e-3
    for phase, seconds in traced.items():
        assert found["phases"][phase]["seconds"] == pytest.approx(seconds, abs=bound), phase
    assert found["seconds"] == pytest.approx(whole, abs=bound)
    assert sum(of["seconds"] for of in found["phases"].values()) == pytest.approx(found["seconds"], rel=1e-6)
    assert sum(of["share"] for of in found["phases"].values()) == pytest.approx(1.0)
    assert found["phases"][OTHER]["seconds"] < bound

    names = [each["name"] for each in found["top"]]
    assert "aten::addmm" in names and not {*names} & {*PHASES}
    assert all({*each} == {"name", "cpu_ms", "device_ms", "calls"} for each in found["top"])
    table = (folder / "table.txt").read_text()
    assert "Updates 4 to 6 of rank 0" in table and all(phase in table for phase in (*PHASES, OTHER))
    assert sorted(path.name for path in folder.iterdir()) == ["phases.json", "table.txt", found["trace"]]
    assert not any(map(wrapped, (fit, fit.run, fit.run.stepping)))


class Wrapped(Callback):
    """Notes at each update which methods are wrapped."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
        self.seen.append((wrapped(fit), wrapped(fit.run) + wrapped(fit.run.stepping)))


def wrapped(labelled: Any) -> int:
    """How many methods of an object are wrapped."""
    return len({*labelled.PHASES} & {*vars(labelled)})


def test_nothing_is_wrapped_but_in_a_window(make_fit: MakeFit) -> None:
    noting = Wrapped()
    train(make_fit, None, 2, callbacks=[noting])
    assert noting.seen == [(0, 0)] * 2
    noting = Wrapped()
    train(make_fit, TorchProfiler(**SHORT), 8, callbacks=[noting])
    assert noting.seen == [(1, 0)] * 2 + [(6, 3)] * 4 + [(0, 0)] * 2


@pytest.mark.parametrize("profiler", ["simple", TorchProfiler(**SHORT, memory=True, stacks=True, shapes=True)], ids=str)
def test_a_profiler_changes_no_number(make_fit: MakeFit, profiler: Any) -> None:
    weights = []
    for chosen in (None, profiler):
        torch.manual_seed(0)
        weights.append(parameters_of(train(make_fit, chosen).module))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_schedule_repeats(make_fit: MakeFit, folder: Path) -> None:
    train(make_fit, TorchProfiler(wait=1, warmup=1, active=2, repeat=2), 12)
    assert sorted(p.name for p in folder.glob("trace*")) == [
        "trace-rank0-update3.json.gz",
        "trace-rank0-update7.json.gz",
    ]
    assert json.loads((folder / "phases.json").read_text())["updates"] == [7, 8]


def test_a_run_that_ends_in_a_window_keeps_what_there_is(make_fit: MakeFit, folder: Path) -> None:
    train(make_fit, TorchProfiler(wait=2, active=50), 6)
    found = json.loads((folder / "phases.json").read_text())
    assert found["updates"] == [4, 6] and (folder / found["trace"]).exists()


def test_a_run_too_short_is_warned_of(make_fit: MakeFit, folder: Path) -> None:
    with pytest.warns(ProfileWarning, match="ends after 9 updates, before the first that it would record, the 10th"):
        train(make_fit, "torch", 9)
    assert not folder.exists()


def test_the_simple_profiler_looks_at_the_whole_run(make_fit: MakeFit, folder: Path) -> None:
    train(make_fit, "simple")
    found = json.loads((folder / "phases.json").read_text())
    assert found["updates"] == [1, 10] and found["trace"] is None and found["top"] == []
    assert found["phases"]["forward"]["seconds"] > 0
    assert sum(of["seconds"] for of in found["phases"].values()) == pytest.approx(found["seconds"])


def test_its_directory_can_be_another(make_fit: MakeFit, tmp_path: Path) -> None:
    train(make_fit, SimpleProfiler(directory=tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "phases.json").exists()


# Size.


def json_bytes(trace: Path) -> int:
    with gzip.open(trace) as file:
        return len(file.read())


def test_a_trace_stays_below_its_limit(make_fit: MakeFit, folder: Path) -> None:
    """An evaluation of 400 batches falls into the window, which nothing before it could tell of."""
    options = {"eval_strategy": "steps", "eval_steps": 5, "per_device_eval_batch_size": 1}
    fit = make_fit(
        Regressor(), regression_rows(24), regression_rows(400), max_steps=8,
        profiler=TorchProfiler(**SHORT, max_bytes=200_000), **options,
    )  # fmt: skip
    fit.train()
    found = json.loads((folder / "phases.json").read_text())
    assert 50_000 < json_bytes(folder / found["trace"]) == found["trace_bytes"] <= 200_000
    assert "The trace ends in update 5" in found["notes"][0] and found["notes"][0] in (folder / "table.txt").read_text()
    assert found["updates"] == [4, 6] and found["phases"]["evaluation"]["share"] > 0.5  # the clock went on
    assert not torch.autograd._profiler_enabled()


class OwnStep(Fit):
    """Has a forward that nobody knows of."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = self.module.loss(model(inputs["x"]), inputs)
        self.run.backward(loss)
        return loss.detach()


def test_a_forward_of_ones_own_is_limited_too(folder: Path) -> None:
    fit = OwnStep(
        Regressor(), regression_rows(24), max_steps=60, output_dir=str(folder.parent), progress=False, loggers=(),
        save_strategy="no", profiler=TorchProfiler(wait=2, active=50, max_bytes=400_000),
    )  # fmt: skip
    fit.train()
    found = json.loads((folder / "phases.json").read_text())
    assert 100_000 < json_bytes(folder / found["trace"]) <= 400_000
    assert "The trace ends in update" in found["notes"][0] and found["updates"] == [4, 53]
    assert found["phases"]["forward"]["seconds"] == 0.0


def test_an_update_that_is_too_large_has_a_table_and_no_trace(make_fit: MakeFit, folder: Path) -> None:
    fit = make_fit(
        Regressor(), regression_rows(24), max_steps=8, gradient_accumulation_steps=1,
        profiler=TorchProfiler(**SHORT, stacks=True, max_bytes=10_000),
    )  # fmt: skip
    fit.train()
    found = json.loads((folder / "phases.json").read_text())
    assert found["trace"] is None and "There is no trace" in found["notes"][0] and not [*folder.glob("trace*")]
    assert found["top"][0]["cpu_ms"] > 0 and found["phases"][OTHER]["share"] < 0.8


def test_a_trace_that_is_too_large_after_all_is_not_kept(folder: Path) -> None:
    folder.mkdir(parents=True)
    recording = Recording(TorchProfiler())
    recording.start()
    torch.ones(3).sum()
    recording.stop()
    assert recording.write(folder / "trace.json.gz", 100) is None and not [*folder.iterdir()]


def test_own_times_are_those_of_torchs_table() -> None:
    recorded = profile()
    recorded.start()
    module = Regressor()
    for _ in range(5):
        module(torch.randn(2, 3)).sum().backward()
    recorded.stop()
    ours = {each["name"]: each for each in totals_of(recorded.profiler.kineto_results.events())}
    theirs = {each.key: each for each in recorded.key_averages() if each.key != "[memory]"}
    assert ours.keys() == theirs.keys()
    for name, each in theirs.items():
        assert ours[name]["calls"] == each.count
        # Theirs takes off what a cut-off tree of operations says; ours what lies within.
        assert ours[name]["cpu_ms"] == pytest.approx(each.self_cpu_time_total / 1000, rel=0.02, abs=0.02), name


# What goes wrong.


class FailAt(Callback):
    """Raises in an update."""

    def __init__(self, update: int, error: BaseException) -> None:
        self.update, self.error = update, error

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if state.global_step + 1 == self.update:
            self.update = -1
            raise self.error


@pytest.mark.parametrize("update", [1, 3, 4, 5, 7])
@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit(3)], ids=["error", "exit"])
def test_an_exception_closes_the_profiler(make_fit: MakeFit, folder: Path, update: int, error: BaseException) -> None:
    """Before, in the measured update, in the window's first and second, and after it."""
    fit = make_fit(
        Regressor(), regression_rows(24), max_steps=10, profiler=TorchProfiler(**SHORT),
        callbacks=[FailAt(update, error)],
    )  # fmt: skip
    with pytest.raises(type(error)):
        fit.train()
    assert not torch.autograd._profiler_enabled() and not {*fit.PHASES} & {*vars(fit)}
    if update in (4, 5):
        found = json.loads((folder / "phases.json").read_text())
        assert found["updates"] == [4, update] and type(error).__name__ in found["notes"][0]
        assert (folder / found["trace"]).exists()
    fit.train()  # and another run begins as if nothing had been
    assert json.loads((folder / "phases.json").read_text())["updates"] == [4, 6]
    assert not torch.autograd._profiler_enabled()


class TooLarge(Regressor):
    """Has memory for four samples; with more, it runs out in a recorded update."""

    updates = 0

    def loss(self, outputs: torch.Tensor, batch: Any) -> Any:
        self.updates += 1
        if len(outputs) > 4 and self.updates == 5:
            raise torch.OutOfMemoryError("out of memory")
        return super().loss(outputs, batch)


def test_a_run_that_begins_again_is_looked_at_anew(make_fit: MakeFit, folder: Path) -> None:
    fit = make_fit(
        TooLarge(), regression_rows(24), max_steps=8, auto_find_batch_size=True, profiler=TorchProfiler(**SHORT)
    )
    fit.train()
    assert fit.args.per_device_train_batch_size == 4
    found = json.loads((folder / "phases.json").read_text())
    assert found["updates"] == [4, 6] and found["notes"] == []
    assert not torch.autograd._profiler_enabled()


def test_a_full_disk_costs_the_profile_and_not_the_run(make_fit: MakeFit, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.warns(ProfileWarning, match="The profile was lost"):
        fit = train(make_fit, TorchProfiler(**SHORT, directory=tmp_path / "taken"))
    assert fit.state.global_step == 10


def test_a_fault_of_torchs_costs_the_profile_and_not_the_run(
    make_fit: MakeFit, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = torch.profiler.profile.stop

    def failing(self: Any) -> None:
        stop(self)
        raise RuntimeError("of torch's")

    monkeypatch.setattr(torch.profiler.profile, "stop", failing)
    with pytest.warns(ProfileWarning, match="The profile was lost: RuntimeError: of torch's"):
        fit = train(make_fit, TorchProfiler(**SHORT))
    assert fit.state.global_step == 10 and not torch.autograd._profiler_enabled()


def test_another_profiler_is_left_alone(make_fit: MakeFit, folder: Path) -> None:
    with profile() as own:
        train(make_fit, TorchProfiler(**SHORT))
    assert any(each.key == "aten::addmm" for each in own.key_averages())
    found = json.loads((folder / "phases.json").read_text())
    assert "Another torch.profiler" in found["notes"][0] and found["trace"] is None


def test_no_recording_outlives_its_window(make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    start = Recording.start

    def noting(self: Recording) -> None:
        made.append(weakref.ref(self._profile))
        start(self)

    monkeypatch.setattr(Recording, "start", noting)
    fit = train(make_fit, TorchProfiler(wait=0, warmup=1, active=1, repeat=4))
    gc.collect()
    assert len(made) == 8 and [reference() for reference in made] == [None] * 8
    assert fit.state.global_step == 10


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_are_forked_while_it_records(make_fit: MakeFit, folder: Path, persistent: bool) -> None:
    """Each epoch has 3 updates, so that workers are started within the window."""
    train(
        make_fit, TorchProfiler(wait=0, warmup=1, active=7), dataloader_num_workers=2,
        dataloader_persistent_workers=persistent,
    )  # fmt: skip
    found = json.loads((folder / "phases.json").read_text())
    assert found["updates"] == [2, 8]
    data = [span for span in outermost(spans_of(folder / found["trace"])) if span[0] == "data"]
    assert len(data) == 7 + 2  # and what found the ends of two epochs


class Unseen(Single):
    """Says that profilers see nothing."""

    unprofiled = "nothing is seen here; use another, and leave profiler out"


def test_a_search_for_a_learning_rate_is_not_looked_at(make_fit: MakeFit, folder: Path) -> None:
    fit = make_fit(Regressor(), regression_rows(24), max_steps=8, profiler=TorchProfiler(**SHORT))
    fit.find_learning_rate(updates=10)
    assert not folder.exists()
    fit.train()
    assert (folder / "trace-rank0-update4.json.gz").exists()


def test_a_configuration_knows_the_words(make_fit: MakeFit, tmp_path: Path) -> None:
    assert (
        {*options.PROFILERS}
        == {*PROFILERS}
        == {name for name in PROFILERS if get_profiler(name, Single()).name == name}
    )
    for given, written in (("torch", "torch"), (TorchProfiler(), "torch"), (SimpleProfiler(), "simple"), (None, None)):
        assert make_fit(Regressor(), profiler=given).written.words["profiler"] == written
    special = make_fit(Regressor(), profiler=TorchProfiler(wait=3)).written
    assert special.words["profiler"] is None and "profiler" in special.given


def test_a_file_can_ask_for_one(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"output_dir: {tmp_path}/out\nprogress: false\nprofiler: torch\n")
    given = Regressor(), regression_rows(24)
    assert Fit.from_config(file, *given).profiler == TorchProfiler()
    assert Fit.from_config(file, *given, profiler=SimpleProfiler()).profiler == SimpleProfiler()
    file.write_text(f"output_dir: {tmp_path}/out\nprofiler: pytorch\n")
    with pytest.raises(ValueError, match="Unknown profiler 'pytorch'"):
        Fit.from_config(file, *given)


def test_what_is_refused(make_fit: MakeFit) -> None:
    def fit(profiler: Any, **arguments: Any) -> None:
        make_fit(Regressor(), regression_rows(4), profiler=profiler, **arguments)

    with pytest.raises(ValueError, match=r"Unknown profiler 'pytorch'\. Did you mean 'torch'"):
        fit("pytorch")
    with pytest.raises(TypeError, match="profiler takes a name or a Profiler instance"):
        fit(3)
    with pytest.raises(ValueError, match=r"ranks=.* there is no rank 2, ranks are 0 to 0"):
        fit(SimpleProfiler(ranks=(0, 2)))
    with pytest.raises(ValueError, match="under strategy='single': nothing is seen here"):
        fit("torch", strategy=Unseen())
    with pytest.raises(ValueError, match="memory_snapshot=True\\) needs CUDA"):
        fit(TorchProfiler(memory_snapshot=True))
    with pytest.raises(ValueError, match="warmup=0\\): must be at least 1 \\(the last one says"):
        TorchProfiler(warmup=0)
    with pytest.raises(ValueError, match=r"TorchProfiler\(ranks=...\) takes the ranks"):
        TorchProfiler(ranks=())


def test_xla_is_refused_by_what_its_strategy_says() -> None:
    source = (Path(__file__).parents[2] / "strategies" / "xla" / "strategy.py").read_text()
    assert "unprofiled = (" in source  # its package isn't here
