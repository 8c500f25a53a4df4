"""One recording of torch.profiler: begun and ended once, counted, summed up by operation, and written as a trace."""

import gzip
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .options import TorchProfiler
from .phases import PHASES

BYTES_PER_EVENT = 400  # in a trace's JSON; 280 to 400 were measured on CPUs
BYTES_PER_EVENT_WITH_DEVICE = 600
STEP = "ProfilerStep#"  # what viewers know an update by
SHOWN = 30  # operations in the table


class Recording:
    """Records what this process runs, from ``start`` to ``stop``.

    Args:
        options: what is recorded.

    Attributes:
        events: how many there are, once it is stopped.
        bytes_per_event: what one will take in the trace, rather too much than too little.
    """

    def __init__(self, options: TorchProfiler) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it tells stderr of each start and stop
        from torch.profiler import profile  # imports more than training does

        self._profile: Any = profile(
            record_shapes=options.shapes, profile_memory=options.memory, with_stack=options.stacks
        )
        self.is_recording = False
        self.events = 0
        self.failure: Exception | None = None
        on_device = torch.accelerator.is_available()
        self.bytes_per_event = BYTES_PER_EVENT_WITH_DEVICE if on_device else BYTES_PER_EVENT

    def start(self) -> None:
        """Begin to record.

        Raises:
            RuntimeError: another profiler records in this process: each would spoil the other.
        """
        if torch.autograd._profiler_enabled():
            raise RuntimeError("another torch.profiler is recording in this process")
        self._profile.start()
        self.is_recording = True

    def stop(self) -> None:
        """End the recording, where it is under way: torch's profiler must not be stopped twice."""
        if self.is_recording:
            self.is_recording = False
            try:
                self._profile.stop()
                self.events = len(self._events())
            except Exception as error:  # a fault of torch's, which must not end the run; ``write`` tells of it
                self.failure = error

    def _events(self) -> list[Any]:
        results = getattr(self._profile.profiler, "kineto_results", None)
        return [] if results is None else results.events()

    def top(self) -> list[dict[str, Any]]:
        """Sum up the operations, those that took longest first.

        Returns:
            For each its name, ``cpu_ms`` (its own time, without that of operations within it), ``device_ms`` and
            ``calls``. A kernel on the device goes by its own name.
        """
        return totals_of(self._events())[:SHOWN]

    def device_seconds(self) -> dict[str, float]:
        """Return how long each phase kept the device, from its first kernel to its last; empty without a device."""
        found: dict[str, float] = defaultdict(float)
        for event in self._events():
            if event.device_type() != torch.autograd.DeviceType.CPU and event.name() in PHASES:
                found[event.name()] += event.duration_ns() / 1e9
        return dict(found)

    def write(self, path: Path, max_bytes: int) -> int | None:
        """Write the trace as ``path``, a .json.gz; it has its name once it is whole.

        Returns:
            Its bytes before compression; None where they were more than ``max_bytes`` after all, and it isn't there.
        """
        if self.failure is not None:
            raise self.failure
        partial = path.with_name(path.name + ".partial")
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".trace-") as folder:
            plain = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(plain))
            size = plain.stat().st_size
            if size > max_bytes:
                return None
            with (
                plain.open(encoding="utf-8", errors="replace", newline="") as source,  # see name_of
                gzip.open(partial, "wt", compresslevel=6, encoding="utf-8", newline="") as target,
            ):
                shutil.copyfileobj(source, target, 1 << 20)
        os.replace(partial, path)
        return size


def name_of(event: Any) -> str:
    """Return an event's name. With stacks, torch 2.13 has once in a while lost that of a Python function."""
    try:
        return str(event.name())
    except UnicodeDecodeError:
        return "(a name that isn't text)"


def totals_of(events: Iterable[Any]) -> list[dict[str, Any]]:
    """Sum up events of torch.profiler by name; see ``Recording.top``. An event's own time is its whole time without
    that of the events directly within it, on its thread.
    """
    cpu: dict[str, int] = defaultdict(int)
    device: dict[str, int] = defaultdict(int)
    calls: dict[str, int] = defaultdict(int)
    threads: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    for event in events:
        name, spent = name_of(event), event.duration_ns()
        if event.device_type() != torch.autograd.DeviceType.CPU:
            if name not in PHASES and not name.startswith(STEP):  # their spans on the device, which hold the kernels
                device[name] += spent
                calls[name] += 1
        elif name != "[memory]":
            threads[event.start_thread_id()].append((event.start_ns(), -spent, name))
    for spans in threads.values():
        spans.sort()
        open_spans: list[tuple[int, str]] = []  # (end, name), the innermost last
        for start, negative, name in spans:
            while open_spans and open_spans[-1][0] <= start:
                open_spans.pop()
            if open_spans:
                cpu[open_spans[-1][1]] += negative
            cpu[name] -= negative
            if not open_spans or open_spans[-1][1] != name:  # an operation's overload within itself is one call
                calls[name] += 1
            open_spans.append((start - negative, name))
    names = [name for name in calls if name not in PHASES and not name.startswith(STEP)]
    names.sort(key=lambda name: max(device[name], cpu[name]), reverse=True)
    return [
        {"name": name, "cpu_ms": cpu[name] / 1e6, "device_ms": device[name] / 1e6, "calls": calls[name]}
        for name in names
    ]
