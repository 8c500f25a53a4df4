"""A run that its launcher starts again: what it goes on from, and how ranks share the samples of an update."""

import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stratagem import Fit, FitArguments
from stratagem.framework.run import elastic
from stratagem.strategies import launch
from stratagem.strategies.launch import launched
from stratagem.testing.faults import Raise
from tiny import Regressor, logs_of, regression_rows
from torch.utils.data import DataLoader


def cut(args: FitArguments, ranks: int) -> Any:
    size = args.per_device_train_batch_size
    return SimpleNamespace(global_micro_batch=size * ranks, size=ranks, options=SimpleNamespace(batch_size=size))


@given(batch=st.integers(1, 24), steps=st.integers(1, 6), before=st.integers(1, 8), now=st.integers(1, 8))
def test_an_update_keeps_its_samples(batch: int, steps: int, before: int, now: int) -> None:
    args = FitArguments(per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
    samples = batch * steps * before
    if samples % now:
        with pytest.raises(ValueError, match=f"{samples} can't be divided by {now}"):
            elastic.with_global_batch(args, cut(args, now), samples, None)
        return
    found = elastic.with_global_batch(args, cut(args, now), samples, None)
    size = found.per_device_train_batch_size
    assert size * found.gradient_accumulation_steps * now == samples
    assert size <= batch
    assert not any(samples // now % larger == 0 for larger in range(size + 1, batch + 1))  # the largest that fits


def test_a_ready_loader_keeps_its_batch_size() -> None:
    loader = DataLoader(regression_rows(8), batch_size=4)
    args = FitArguments(per_device_train_batch_size=4)
    found = elastic.with_global_batch(args, cut(args, 2), 24, loader)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (4, 3)
    with pytest.raises(ValueError, match=r"batches of 4 on each of 2 ranks .* 12 can't be divided by 8"):
        elastic.with_global_batch(args, cut(args, 2), 12, loader)


def test_data_that_gives_each_rank_a_part_fits_one_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "a", "STRATAGEM_ELASTIC": "1:2"}
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"gives each rank a part of its own .* Write devices= as one number"):
        elastic.find_launch(SimpleNamespace(), FitArguments(), SimpleNamespace(has_parts=True))  # type: ignore[arg-type]


def test_what_a_launcher_says() -> None:
    assert launched({}) is None and launched({"TORCHELASTIC_RUN_ID": "a"}) is None
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "a"}
    found = launched({**torchrun, "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_MAX_RESTARTS": "2"})
    assert found == launch.Launched("a", 2, False, 0, False)
    ours = {**torchrun, "STRATAGEM_LAUNCHER": "1", "TORCHELASTIC_MAX_RESTARTS": "2"}
    assert launched(ours) == launch.Launched("a", 0, True, 2, False)
    unnamed = launched({**torchrun, "TORCHELASTIC_RUN_ID": "none"})  # as every run that torchrun isn't given a name for
    assert unnamed is not None and f"process {os.getppid()} of " in unnamed.run
    assert launched({**ours, "STRATAGEM_ELASTIC": "1:4"}) == launch.Launched("a", 0, True, 4, True)


@pytest.mark.parametrize("devices", ["2:1", "0:2", "2", "1:", "1:2:3", 0, True, 1.0])
def test_devices_that_are_no_numbers_of_ranks_are_refused(devices: Any) -> None:
    with pytest.raises(ValueError, match="devices takes a number of ranks, a range"):
        Fit(Regressor(), regression_rows(8), strategy="ddp", devices=devices)


def test_a_range_without_effect_is_refused() -> None:
    with pytest.raises(ValueError, match="max_restarts=0 never does that"):
        Fit(Regressor(), regression_rows(8), strategy="ddp", devices="1:2")
    with pytest.raises(ValueError, match="runs in one process, so devices='1:2' would have no effect"):
        Fit(Regressor(), regression_rows(8), devices="1:2", max_restarts=1)


class Launcher:
    """Sets what a launcher sets for a single rank, and counts runs as a new process does."""

    def __init__(self, patch: pytest.MonkeyPatch, directory: Path) -> None:
        self.patch, self.directory = patch, directory
        patch.setattr(launch, "end_with", lambda launcher: None)

    def train(self, run: str, attempt: int, fault: Any = None, resume: Any = None, **arguments: Any) -> Fit:
        """Train 6 updates of 8 samples in a new process, as far as the launcher can tell."""
        variables = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": run, "TORCHELASTIC_MAX_RESTARTS": "3"}
        for name, value in {**variables, "TORCHELASTIC_RESTART_COUNT": str(attempt)}.items():
            self.patch.setenv(name, value)
        self.patch.setattr(elastic, "RUNS", itertools.count())
        torch.manual_seed(0)
        options = {"per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 2, **arguments}
        fit = Fit(
            Regressor(), regression_rows(80), output_dir=str(self.directory), max_steps=6, logging_steps=1,
            progress=False, loggers=(), callbacks=[fault] if fault else [], **options,
        )  # fmt: skip
        try:
            fit.train(resume_from_checkpoint=resume)
        except ZeroDivisionError:
            assert fault is not None
        return fit


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launcher:
    return Launcher(monkeypatch, tmp_path)


@pytest.mark.parametrize("resume", [None, False, True])
def test_a_restart_goes_on_by_itself(launcher: Launcher, resume: Any) -> None:
    launcher.train("a", 0, Raise(ZeroDivisionError, update=4), resume)
    after = launcher.train("a", 1, Raise(ZeroDivisionError, update=2, attempt=1), resume)  # which isn't done again
    assert [log["step"] for log in logs_of(after)] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in launcher.directory.glob("checkpoint-*")) == [
        "checkpoint-2", "checkpoint-4", "checkpoint-6",
    ]  # fmt: skip


def test_a_restart_before_the_first_checkpoint_leaves_an_earlier_run_alone(launcher: Launcher) -> None:
    launcher.train("earlier", 0)
    launcher.train("a", 0, Raise(ZeroDivisionError, update=2))
    seen = Raise(ZeroDivisionError, update=1, attempt=1)  # the first update is done
    launcher.train("a", 1, seen)
    assert seen.struck == {1}


def test_another_launch_begins_anew(launcher: Launcher) -> None:
    launcher.train("a", 0, Raise(ZeroDivisionError, update=4))
    seen = Raise(ZeroDivisionError, update=1, attempt=1)
    launcher.train("b", 1, seen)
    assert seen.struck == {1}


def test_a_restart_goes_on_from_its_own_and_not_from_where_it_began(launcher: Launcher, tmp_path: Path) -> None:
    launcher.train("earlier", 0)
    began = tmp_path / "elsewhere"
    (tmp_path / "checkpoint-2").rename(began)
    launcher.train("a", 0, Raise(ZeroDivisionError, update=6), began)
    seen = Raise(ZeroDivisionError, update=3, attempt=1)  # done by the first attempt, which saved update 4
    fit = launcher.train("a", 1, seen, began)
    assert not seen.struck and fit.state.global_step == 6


def test_a_restart_keeps_the_global_batch_of_its_checkpoint(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    """The arguments mean a larger world, of which this is what is left."""
    whole = launcher.train("whole", 0)
    launcher.train("a", 0, Raise(ZeroDivisionError, update=4))
    found = launcher.train("a", 1, per_device_train_batch_size=4)
    assert found.args.gradient_accumulation_steps == 2
    assert "An update keeps its 8 samples on 1 rank: gradient_accumulation_steps=2" in capsys.readouterr().err
    for log, other in zip(logs_of(found), logs_of(whole), strict=True):
        assert log["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert log["learning_rate"] == other["learning_rate"]
    # A path to begin with that has another: the arguments count, in each attempt.
    began = str(launcher.directory / "checkpoint-2")
    launcher.patch.setattr(launcher, "directory", launcher.directory / "from")
    other = {"resume": began, "per_device_train_batch_size": 4}
    assert launcher.train("e", 0, Raise(ZeroDivisionError, update=3), **other).args.gradient_accumulation_steps == 1
    assert launcher.train("e", 1, **other).args.gradient_accumulation_steps == 1
    # But for a range of ranks, of which the checkpoint's are another number than the most.
    launcher.patch.setenv("STRATAGEM_ELASTIC", "1:2")
    assert launcher.train("f", 0, Raise(ZeroDivisionError, update=4), **other).args.gradient_accumulation_steps == 2
    assert launcher.train("f", 1, **other).args.gradient_accumulation_steps == 2
    launcher.patch.delenv("STRATAGEM_ELASTIC")
    # An agent of torchrun that joins while all is well isn't counted as a restart, and names the same launch.
    launcher.train("c", 0, Raise(ZeroDivisionError, update=4))
    assert launcher.train("c", 0, resume=True, per_device_train_batch_size=4).args.gradient_accumulation_steps == 2
    assert launcher.train("d", 0, resume=True, per_device_train_batch_size=4).args.gradient_accumulation_steps == 1
    # Before the first checkpoint, what the first attempt wrote down counts.
    launcher.train("b", 0, Raise(ZeroDivisionError, update=1))
    assert launcher.train("b", 1, per_device_train_batch_size=4).args.gradient_accumulation_steps == 2
