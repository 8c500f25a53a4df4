"""Saves that are interrupted or can't be written: what arrives, what it says, and what is left."""

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from stratagem import Callback
from stratagem.framework.checkpoint import CheckpointError
from stratagem.framework.checkpoint.streaming import SafetensorsFile
from tiny import MakeFit, Regressor, regression_rows
from torch import nn

SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """In here the system refuses to make a file larger, as a full disk would."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def interrupt_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program's own handler of a signal raises when tensors are about to be written."""

    def interrupted(self: Any, *arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(SafetensorsFile, "add", interrupted)


def test_an_interrupt_in_a_save_arrives_as_one(
    make_fit: MakeFit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_saves(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        make_fit(Regressor(), regression_rows(8), **SAVES).train()
    assert not (tmp_path / "output").exists()  # it was made for what was to be saved


def test_ctrl_c_in_a_save_lets_it_end_and_saves_the_next_update(
    make_fit: MakeFit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, signals = SafetensorsFile.add, [signal.SIGINT]

    def interrupted(self: Any, *arguments: Any) -> Any:
        if signals:
            os.kill(os.getpid(), signals.pop())
        return add(self, *arguments)

    monkeypatch.setattr(SafetensorsFile, "add", interrupted)
    with pytest.raises(KeyboardInterrupt) as raised:
        make_fit(Regressor(), regression_rows(8), **SAVES).train()
    assert isinstance(raised.value, SystemExit) and raised.value.code == 130
    assert sorted(path.name for path in (tmp_path / "output").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    fit = make_fit(Regressor(), regression_rows(8), **SAVES)
    assert fit.train(resume_from_checkpoint=True).global_step == 4


def test_a_search_that_catches_every_exception_ends_with_an_interrupt_in_a_save(
    make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_saves(monkeypatch)
    fit = make_fit(Regressor(), regression_rows(8), regression_rows(4), **SAVES)
    with pytest.raises(KeyboardInterrupt):
        fit.hyperparameter_search(lambda trial: {}, n_trials=3, catch=(Exception,))


# The random state takes about 20 kB, the weights 160 kB.
@pytest.mark.parametrize(
    ("size", "file"),
    [
        (3000, "random-00000.json can't be written: "),
        (60_000, "model/shard-00001-model-00001-of-00001.safetensors can't be written: "),
    ],
)
def test_a_failed_write_says_which_file_and_leaves_nothing(
    make_fit: MakeFit, tmp_path: Path, size: int, file: str
) -> None:
    class Wide(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(200, 200) if size > 3000 else nn.Linear(1, 1)

    fit = make_fit(Wide(), regression_rows(8), **SAVES)
    with files_of_at_most(size), pytest.raises(CheckpointError) as raised:
        fit.train()
    assert f"{tmp_path}/output/checkpoint-2.partial/{file}" in str(raised.value)
    assert "[Errno 27] File too large" in str(raised.value)
    assert not (tmp_path / "output").exists()  # it was made for what was to be saved


@pytest.mark.slow
def test_saving_in_the_background_leaves_no_thread(make_fit: MakeFit) -> None:
    before = threading.active_count()
    kept = []
    for _ in range(10):
        kept.append(make_fit(Regressor(), regression_rows(8), async_save=True, **SAVES))
        kept[-1].train()
    assert threading.active_count() == before


def test_a_run_that_fails_leaves_no_thread_once_its_checkpoint_is_written(make_fit: MakeFit, tmp_path: Path) -> None:
    class Fails(Callback):
        def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            if state.global_step == 3:
                raise ZeroDivisionError

    before = set(threading.enumerate())
    fit = make_fit(Regressor(), regression_rows(8), async_save=True, callbacks=[Fails()], **SAVES)
    with pytest.raises(ZeroDivisionError):
        fit.train()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    assert set(threading.enumerate()) == before
    assert (tmp_path / "output" / "checkpoint-2" / "manifest.json").exists()
