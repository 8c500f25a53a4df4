"""A window: some updates of a run that a profiler looks at from beginning to end, and the files that tell of them."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch.autograd.profiler import record_function

from ..checkpoint.directory import replace_text
from .phases import Phases
from .recording import STEP, Recording


class Window:
    """Looks at the updates from now on until ``end``.

    Args:
        rank: of this process.
        first: the first update.
        recording: begun already; None measures phases by the clock alone.
        limit: how many of the phase ``counted`` the recording may hold; None where it needs no limit.
        counted: the phase that the limit is of.
        top: operations that were summed up before, where nothing is recorded.
        notes: what a reader should know.
    """

    def __init__(
        self,
        rank: int,
        first: int,
        recording: Recording | None = None,
        limit: int | None = None,
        counted: str = "forward",
        top: list[dict[str, Any]] | None = None,
        notes: list[str] | None = None,
    ) -> None:
        self.rank, self.first, self.last = rank, first, first
        self.recording, self.limit, self.counted, self.top = recording, limit, counted, top or []
        self.count = 0
        self.notes = notes or []
        self.phases = Phases()
        self._update: Any = None
        self.begin_update(first)

    def within(self, phase: str) -> AbstractContextManager[None]:
        """Make what is entered around a phase of an update: it goes by that name in the trace, too."""
        recording = self.recording
        if recording is None or not recording.is_recording:
            return self.phases.within(phase)
        return self._recorded(phase)

    @contextmanager
    def _recorded(self, phase: str) -> Iterator[None]:
        if phase == self.counted:
            if self.limit is not None and self.count >= self.limit:
                self.notes.append(f"The trace ends in update {self.last}: more would be over max_bytes.")
                self.stop_recording()
            self.count += 1
        with record_function(phase), self.phases.within(phase):
            yield

    def begin_update(self, update: int) -> None:
        """Note that an update begins."""
        self._end_update()
        self.last = update
        if self.recording is not None and self.recording.is_recording:
            self._update = record_function(f"{STEP}{update}")
            self._update.__enter__()

    def _end_update(self) -> None:
        span, self._update = self._update, None
        if span is not None:
            span.__exit__(None, None, None)

    def stop_recording(self) -> None:
        """End the recording, and leave the clock running."""
        with self.phases.pause():
            self._end_update()
            if self.recording is not None:
                self.recording.stop()

    def end(self) -> None:
        """Stop the clock and the recording."""
        self._end_update()
        self.phases.end()
        self.stop_recording()

    def write(self, directory: Path, max_bytes: int, is_first_rank: bool) -> str:
        """Write what was found: ``phases.json``, ``table.txt`` and the trace.

        Args:
            directory: is made where it isn't there.
            max_bytes: of the trace, before compression.
            is_first_rank: the other ranks' names end in theirs: ``phases-rank1.json``.

        Returns:
            Lines for the screen.
        """
        directory.mkdir(parents=True, exist_ok=True)
        ending = "" if is_first_rank else f"-rank{self.rank}"
        found: dict[str, Any] = {
            "updates": [self.first, self.last],
            "phases": self.phases.to_dict(),
            "top": self.top,
            "rank": self.rank,
            "seconds": self.phases.whole,
            "trace": None,
            "notes": self.notes,
        }
        recording = self.recording
        if recording is not None:
            found["top"] = recording.top()
            for phase, seconds in recording.device_seconds().items():
                found["phases"][phase]["device_seconds"] = seconds
            trace = directory / f"trace-rank{self.rank}-update{self.first}.json.gz"
            size = recording.write(trace, max_bytes)
            if size is None:
                self.notes.append(f"The trace of {recording.events:,} events was over max_bytes, and isn't kept.")
            else:
                found["trace"] = trace.name
                found["trace_bytes"] = size
        replace_text(directory / f"phases{ending}.json", json.dumps(found, indent=1) + "\n")
        table = directory / f"table{ending}.txt"
        replace_text(table, table_of(found))
        return summary_of(found, table)


def summary_of(found: dict[str, Any], table: Path) -> str:
    """Say what a window has found, in the lines of a run's display: a word, and what it has to say."""
    ranked = sorted(found["phases"].items(), key=lambda item: -item[1]["seconds"])
    shares = ", ".join(f"{phase} {of['share']:.0%}" for phase, of in ranked if of["share"] >= 0.01)
    first, last = found["updates"]
    trace = f" and {found['trace']} (for https://ui.perfetto.dev)" if found["trace"] else ""
    lines = [f"updates {first} to {last}: {shares}", *found["notes"], f"{table}{trace}"]
    return "\n".join(f"{'' if index else 'profile':<10} {line}" for index, line in enumerate(lines))


def table_of(found: dict[str, Any]) -> str:
    """Write a window's phases, and the operations that took longest, as a table to read."""
    first, last = found["updates"]
    updates = last - first + 1
    lines = [
        f"Updates {first} to {last} of rank {found['rank']}: {found['seconds']:.3f} s on the host, "
        f"{1000 * found['seconds'] / updates:.2f} ms an update.",
        *found["notes"],
        "",
        f"{'phase':<12} {'seconds':>10} {'ms/update':>10} {'share':>7}",
    ]
    for phase, of in found["phases"].items():
        seconds = of["seconds"]
        device = f"   on the device {of['device_seconds']:.4f} s" if "device_seconds" in of else ""
        lines.append(f"{phase:<12} {seconds:>10.4f} {1000 * seconds / updates:>10.3f} {of['share']:>7.1%}{device}")
    if found["top"]:
        lines += ["", f"{'own cpu ms':>12} {'device ms':>12} {'calls':>8}  operation"]
        lines += [
            f"{each['cpu_ms']:>12.3f} {each['device_ms']:>12.3f} {each['calls']:>8}  {each['name'][:80]}"
            for each in found["top"]
        ]
    return "\n".join(lines) + "\n"
