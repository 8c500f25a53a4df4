"""What a profiler can be told: which updates and ranks it looks at, how much it keeps, and where."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True)
class Profiler:
    """What all profilers are told.

    Args:
        ranks: those that are looked at; each writes files of its own.
        directory: where the files go; None is ``profile`` in the run's ``output_dir``.
    """

    name: ClassVar[str]
    ranks: tuple[int, ...] = (0,)
    directory: str | Path | None = None

    def __post_init__(self) -> None:
        name, ranks = type(self).__name__, self.ranks
        if not isinstance(ranks, tuple | list) or not ranks or not all(type(r) is int and r >= 0 for r in ranks):
            raise ValueError(f"{name}(ranks=...) takes the ranks to look at, e.g. ranks=(0, 1). Received: {ranks!r}")


@dataclass(frozen=True)
class SimpleProfiler(Profiler):
    """``profiler="simple"``: how long each phase of the whole run took, by the clock alone. It makes no trace.

    Example:
        ``Fit(module, data, profiler="simple")``
    """

    name = "simple"


@dataclass(frozen=True)
class TorchProfiler(Profiler):
    """``profiler="torch"``: torch.profiler's traces of some updates, with the phases of each in them.

    The schedule counts updates since training began or was resumed: ``wait`` are left alone, ``warmup`` come before the
    trace, ``active`` are in it; and again, ``repeat`` times.

    Args:
        wait: updates before each trace that cost nothing.
        warmup: updates after them. The last one is recorded to see how many events an update has, and thrown away: so
            the size of the trace is known before it is made.
        active: updates in a trace.
        repeat: how many traces are made.
        max_bytes: of a trace's JSON, before it is compressed to about a tenth. Recording stops before it gets larger,
            in the middle of an evaluation, say. Viewers hold all of it in memory.
        memory: also record each allocation.
        stacks: also record Python's functions; several times the events.
        shapes: also record the shapes of operations' inputs.
        memory_snapshot: on a GPU, keep the history of allocations throughout training, and write it where memory runs
            out, as ``memory-rank<rank>.pickle`` for https://pytorch.org/memory_viz. Costs some microseconds an
            allocation.

    Raises:
        ValueError: a number is out of its range.

    Example:
        ``Fit(module, data, profiler=TorchProfiler(wait=20, active=2, ranks=(0, 1), memory=True))``
    """

    name = "torch"
    wait: int = 8
    warmup: int = 1
    active: int = 3
    repeat: int = 1
    max_bytes: int = 100_000_000
    memory: bool = False
    stacks: bool = False
    shapes: bool = False
    memory_snapshot: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"wait": 0, "warmup": 1, "active": 1, "repeat": 1, "max_bytes": 10_000}
        for name, at_least in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < at_least:
                why = " (the last one says how large a trace will be)" if name == "warmup" else ""
                raise ValueError(f"TorchProfiler({name}={value!r}): must be at least {at_least}{why}.")

    @property
    def cycle(self) -> int:
        """Updates from the beginning of one wait to that of the next."""
        return self.wait + self.warmup + self.active
