"""What a run has logged, taken in line by line: its curves, its checkpoints, and how it began, went on and ended."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from .curves import Curve

MOST_CURVES = 400  # names beyond these are left out; a program that makes up names would fill the memory
MOST_CHECKPOINTS = 500
MOST_SESSIONS = 200
LONGEST_TEXT = 2000

# What a line says beside the numbers of the run.
KEYS = {"step", "time", "event", "epoch"}
# The numbers of an evaluation that aren't about the model.
ABOUT_EVALUATION = re.compile(r"_(runtime|\w+_per_second)$")


@dataclass(frozen=True)
class Session:
    """A run from one start to its end, or to where it was broken off.

    Attributes:
        kind: "begin" or "resume".
        update: that it began at.
        began: seconds since 1970; None where the log has no times.
        ended: the same; None where no end was noted.
        state: "running" (also of one that was killed), "finished", "interrupted" or "failed".
        reason: what it ended with.
        last_update, last_time: of the last line.
    """

    kind: str
    update: int
    began: float | None = None
    ended: float | None = None
    state: str = "running"
    reason: str = ""
    last_update: int = 0
    last_time: float | None = None

    @property
    def seconds(self) -> float:
        """From the beginning to the end, or to the last sign of life; 0 where the log has no times."""
        end = self.last_time if self.ended is None else self.ended
        return end - self.began if self.began is not None and end is not None else 0.0


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that the run has told of.

    Attributes:
        update: that it was saved after.
        name: of its directory.
        time: seconds since 1970; None where the log has none.
        evaluation: the evaluation's numbers of that update.
        is_removed: whether it is gone again.
    """

    update: int
    name: str
    time: float | None = None
    evaluation: Mapping[str, float] = field(default_factory=dict)
    is_removed: bool = False


class History:
    """A run as its log tells it. Several runs in one file: the last one.

    Lines may come from anywhere: what isn't understood in one is left out.

    Attributes:
        curves: by the name of what was logged.
        last: the last value of each name.
        totals: the numbers at the run's end.
        sessions: how the run began, went on and ended.
        checkpoints: by update.
        step, max_steps, epoch: progress; max_steps is 0 where the log doesn't say.
        time: of the last line, in seconds since 1970; None where lines have none.
        earlier_runs: that the same file holds.
    """

    def __init__(self) -> None:
        self.earlier_runs = 0
        self._forget()

    def _forget(self) -> None:
        self.run_name: str | None = None
        self.curves: dict[str, Curve] = {}
        self.last: dict[str, float] = {}
        self.totals: dict[str, float] = {}
        self._totals_before: dict[str, float] = {}  # of the session before
        self.sessions: list[Session] = []
        self.checkpoints: dict[int, SavedCheckpoint] = {}
        self.step = self.max_steps = 0
        self.epoch = 0.0
        self.time: float | None = None
        self._rated: tuple[int, float] | None = None  # update and time that the next rate is measured from
        self._evaluation: tuple[int, dict[str, float]] = (0, {})
        self._has_just_begun = False

    @property
    def state(self) -> str:
        """That of the last session; "running" where there is none."""
        return self.sessions[-1].state if self.sessions else "running"

    @property
    def updates_per_second(self) -> float | None:
        """Over the last dozen logs; None where it isn't known."""
        rates = self.curves.get("updates_per_second")
        recent = [rate for rate in rates.values[-12:] if rate] if rates else []
        return len(recent) / sum(1 / rate for rate in recent) if recent else None

    def take(self, line: Any) -> None:
        """Take in a line of the log."""
        if not isinstance(line, Mapping):
            return
        step = number(line.get("step"))
        if step is None or not 0 <= step < 2**53:
            return
        event, time = line.get("event"), seconds_of(line.get("time"))
        begins = event in ("begin", "resume")
        if begins:
            self._begin(str(event), int(step), time, line)
        self._has_just_begun = begins
        self.time = time if time is not None else self.time
        epoch = number(line.get("epoch"))
        if isinstance(event, str):
            self._note(event, int(step), line)
        else:
            self._log(int(step), line)
            self.epoch = epoch if epoch is not None else self.epoch
        self.step = int(step)
        if self.sessions:
            self.sessions[-1] = replace(self.sessions[-1], last_update=self.step, last_time=self.time)

    def _begin(self, kind: str, step: int, time: float | None, line: Mapping[str, Any]) -> None:
        if kind == "begin" and (self.sessions or self.curves) and not self._has_just_begun:
            self.earlier_runs += 1
            self._forget()
        for curve in self.curves.values():
            curve.cut_after(step)
        self.checkpoints = {update: each for update, each in self.checkpoints.items() if update <= step}
        self._totals_before, self.totals = self.totals or self._totals_before, {}
        name, length = line.get("run_name"), number(line.get("max_steps"))
        self.run_name = name if isinstance(name, str) else self.run_name
        self.max_steps = int(length) if length is not None and 0 < length < 2**53 else self.max_steps
        self._rated = None if time is None else (step, time)
        before = self.sessions[:-1] if self._has_just_begun else self.sessions  # told twice
        self.sessions = [*before[-MOST_SESSIONS:], Session(kind, step, time, last_update=step)]

    def _note(self, event: str, step: int, line: Mapping[str, Any]) -> None:
        def text(name: str) -> str:
            value = line.get(name)
            return value[:LONGEST_TEXT] if isinstance(value, str) else ""

        if event == "save":
            update, evaluation = self._evaluation
            saved = SavedCheckpoint(step, text("checkpoint") or f"checkpoint-{step}", self.time)
            self.checkpoints.pop(step, None)
            self.checkpoints[step] = replace(saved, evaluation=evaluation if update == step else {})
            while len(self.checkpoints) > MOST_CHECKPOINTS:
                del self.checkpoints[next(iter(self.checkpoints))]
        elif event == "remove":
            for update, each in self.checkpoints.items():
                if each.name == text("checkpoint"):
                    self.checkpoints[update] = replace(each, is_removed=True)
        elif event in ENDS and self.sessions:
            ended = replace(self.sessions[-1], state=ENDS[event], ended=self.time, reason=text("reason"))
            self.sessions[-1] = ended

    def _log(self, step: int, line: Mapping[str, Any]) -> None:
        values = {name: value for name in line if name not in KEYS and (value := number(line[name])) is not None}
        if "train_runtime" in values:
            did_nothing = values.get("train_steps_per_second") == 0  # a run that was finished, resumed
            totals = {name: value for name, value in values.items() if not name.startswith("memory_")}
            self.totals = self._totals_before if did_nothing and self._totals_before else totals
            if self.sessions and self.sessions[-1].state == "running":  # earlier versions noted no end
                self.sessions[-1] = replace(self.sessions[-1], state="finished", ended=self.time)
            return
        if "loss" in values:
            self._rate(step)
        evaluation = {name: value for name, value in values.items() if name.startswith("eval_")}
        if evaluation:
            self._evaluation = (step, evaluation)
            if step in self.checkpoints and not self.checkpoints[step].evaluation:
                self.checkpoints[step] = replace(self.checkpoints[step], evaluation=evaluation)
        for name, value in values.items():
            if not evaluation or not ABOUT_EVALUATION.search(name):
                self._add(name, step, value)

    def _rate(self, step: int) -> None:
        """Add the rate of updates since the last training log, evaluations and checkpoints between them included."""
        if self.time is None:
            return
        if self._rated is not None and step > self._rated[0] and self.time > self._rated[1]:
            self._add("updates_per_second", step, (step - self._rated[0]) / (self.time - self._rated[1]))
        self._rated = (step, self.time)

    def _add(self, name: str, step: int, value: float) -> None:
        name = name[:LONGEST_TEXT]
        self.last[name] = value
        curve = self.curves.get(name)
        if curve is None:
            if len(self.curves) >= MOST_CURVES:
                self.last.pop(name)
                return
            curve = self.curves[name] = Curve()
        curve.add(step, value)


ENDS = {"finish": "finished", "interrupt": "interrupted", "fail": "failed"}
"""The events of a log that end a session, and the state that they leave."""


def number(value: Any) -> float | None:
    """A value of a log as a number: numbers that aren't finite are written as text. None for what is none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    return float(value) if value in ("nan", "inf", "-inf") else None


def seconds_of(written: Any) -> float | None:
    """A time in ISO 8601 as seconds since 1970; None for what is none."""
    if not isinstance(written, str):
        return None
    try:
        return datetime.fromisoformat(written.replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def iso_of(seconds: float) -> str:
    """Seconds since 1970 in ISO 8601, in UTC, with milliseconds."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
