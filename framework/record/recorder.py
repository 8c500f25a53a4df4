"""The logger that keeps run.json and report.html: what a run is, what it logs, and how it ends."""

import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..loggers.base import LoggedRun, Logger
from ..process_memory import held
from ..replacing import remove_partial
from ..state import TrainState
from .describing import describe, describe_session
from .facts import GitLook
from .history import ENDS, History, SavedCheckpoint, iso_of
from .log_file import LogFile
from .run_file import RunFile

LOG, RECORD, REPORT = "log.jsonl", "run.json", "report.html"
GIT_WAIT = 0.04  # seconds that a beginning waits for git
AFTER_LOG = 30.0  # seconds since the report was written, after which a log has it written again
AFTER_CHECKPOINT = 3.0
SHARE = 0.05  # of the time that writing may take, where evaluations come faster than that
LONGEST_LOG = 64 << 20  # bytes of an earlier session's log, above which its curves aren't read again


class Recorder(Logger):
    """Writes ``run.json`` and ``report.html`` into ``output_dir``, with what a Fit has logged.

    Nothing is done between two logs; a log adds its numbers to curves in memory. The files are written when a run
    begins and ends, after evaluations and checkpoints, and now and then after a log. A kill leaves the last ones whole.

    Args:
        fit: whose runs they are. It isn't kept from ending.
    """

    synchronous = True  # it reads the Fit where training begins, and is told of a kill by nobody

    def __init__(self, fit: Any) -> None:
        self._fit = weakref.ref(fit)
        self.file: RunFile | None = None
        self.history = History()
        # Of the run; not the Fit itself, which its loggers would then keep alive.
        self._state, self._device, self._best_metric = TrainState(), torch.device("cpu"), ""
        self._git: GitLook | None = None
        self._written, self._cost = 0.0, 0.0  # when writing was tried last, and the seconds that it took
        self._is_stale = False  # whether there is something new since the files were written
        self._memory_at = 0.0

    def begin(self, fit: LoggedRun) -> None:
        """Write down what the run is. An earlier session's curves are read from its log."""
        self.file, whole = None, self._fit()
        if not fit.args.report or whole is None:
            return
        directory = Path(fit.args.output_dir)
        facts = describe(whole)
        session = describe_session(whole, facts)
        place, script = facts["program"]["directory"], facts["program"]["script"]
        self._git = self._git or GitLook(Path(script).parent if script else Path(place))
        self._state, self._device, self._best_metric = whole.state, fit.strategy.device, fit.args.best_metric
        self.file = RunFile(directory)
        for name in (RECORD, REPORT):
            remove_partial(directory / name)
        self.history = earlier_history(directory / LOG) if fit.state.global_step else History()
        self.file.begin(whole.saver.directory.line.id, facts, session, self._last_seen())
        self.history.take(
            {
                "step": fit.state.global_step,
                "event": session["kind"],
                "time": session["began"],
                "run_name": fit.args.run_name,
                "max_steps": fit.state.max_steps,
            }
        )
        self._git.wait(GIT_WAIT)
        self._write()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Add numbers to the curves; after an evaluation, write the files."""
        if self.file is None:
            return
        now = time.time()
        line: dict[str, Any] = {**metrics, "step": step, "time": iso_of(now)}
        if now - self._memory_at >= 1.0:
            self._memory_at = now
            line |= held(self._device)
        self.history.take(line)
        self._is_stale = True
        is_evaluation = any(name.startswith("eval_") for name in metrics)
        self._write_after(0.0 if is_evaluation else AFTER_LOG)

    def event(self, event: str, step: int, details: Mapping[str, Any]) -> None:
        """Take note of a checkpoint, or of the end of the run."""
        if self.file is None:
            return
        self.history.take({"time": iso_of(time.time()), **details, "step": step, "event": event})
        self._is_stale = True
        if event in ENDS:
            reason = {"reason": details["reason"]} if "reason" in details else {}
            self.file.note_session(state=ENDS[event], ended=iso_of(time.time()), last_update=step, **reason)
            self._write()
        else:
            self._write_after(AFTER_CHECKPOINT)

    def flush(self) -> None:
        """Write the files, with what came since they were written."""
        if self.file is not None and self._is_stale:
            self._write()

    def close(self) -> None:
        """The same, and end the record."""
        try:
            self.flush()
        finally:
            self.file = None

    def _last_seen(self) -> dict[str, Any]:
        """What the log says of the end of a session that was killed."""
        if not self.history.sessions:
            return {}
        last = self.history.sessions[-1]
        seen = {} if last.last_time is None else {"last_time": iso_of(last.last_time)}
        return {"last_update": last.last_update, **seen}

    def _write_after(self, seconds: float) -> None:
        if time.time() - self._written >= max(seconds, self._cost / SHARE):
            self._write()

    def _write(self) -> None:
        from .report import write_report  # a run without a report needn't import it

        assert self.file is not None
        state, began = self._state, time.time()
        self._written = began
        totals = self.history.totals
        evaluation = {name: value for name, value in self.history.last.items() if name.startswith("eval_")}
        best = {"update": state.best_global_step, "name": self._best_metric, "value": state.best_metric}
        self.file.note(
            git=self._git.found if self._git is not None else None,
            update=self.history.step,
            epoch=self.history.epoch,
            metrics=totals,
            evaluation=evaluation,
            best=best if state.best_metric is not None else None,
            checkpoints=[as_json(each) for each in self.history.checkpoints.values()],
        )
        last = {} if self.history.time is None else {"last_time": iso_of(self.history.time)}
        self.file.note_session(last_update=self.history.step, **last)
        try:
            self.file.write()
            write_report(self.file.path.parent, self.file.content, self.history)
            self._is_stale = False
        finally:
            self._cost = time.time() - began


def earlier_history(path: Path) -> History:
    """What the sessions before have logged, as far as their log is there."""
    history = History()
    try:
        if path.stat().st_size > LONGEST_LOG:
            return history
    except OSError:
        return history
    for line in LogFile(path).read()[1]:
        history.take(line)
    return history if history.sessions else History()


def as_json(saved: SavedCheckpoint) -> dict[str, Any]:
    """A checkpoint as run.json lists it."""
    found: dict[str, Any] = {"update": saved.update, "name": saved.name, "evaluation": dict(saved.evaluation)}
    if saved.time is not None:
        found["time"] = iso_of(saved.time)
    if saved.is_removed:
        found["is_removed"] = True
    return found
