"""How long a rank has made no progress, and when that is a hang: numbers in, numbers out, with no clock of its own."""

from dataclasses import dataclass, field

AT_LEAST = 60.0  # seconds without progress before a hang is suspected, however fast updates are
TIMES_AN_UPDATE = 20.0  # an update that takes so many times as long as the longest so far is suspected, too
LONGER = 10.0  # times as long may take what has no steps that could be seen: compilation, saving, beginning, ending
ASLEEP = 10.0  # seconds between two looks, a second apart, after which this process itself was stopped


@dataclass
class Pulse:
    """Watches a pair of counters, updates done and batches evaluated, which are looked at about once a second.

    Args:
        timeout: ``hang_timeout``; None lets measured updates decide.

    Attributes:
        longest: seconds of the longest update (or evaluated batch) seen so far; the first update of a run is left out.
        moved_at: when progress was last seen.
        updates_seen: updates that ended while this object watched.

    Example:
        >>> pulse = Pulse(None)
        >>> for second in range(5):
        ...     pulse.look(float(second), (second, 0))
        >>> pulse.limit(is_long=False), pulse.longest
        (60.0, 1.0)
    """

    timeout: float | None
    longest: float = 0.0
    moved_at: float = 0.0
    updates_seen: int = 0
    _counters: tuple[int, int] | None = field(default=None, repr=False)
    _looked_at: float | None = field(default=None, repr=False)

    def start(self, now: float, counters: tuple[int, int]) -> None:
        """Note where the counters stand when training begins; see ``look``."""
        self._counters, self.moved_at, self.updates_seen = counters, now, 0

    def look(self, now: float, counters: tuple[int, int]) -> None:
        """Note the counters of now.

        Args:
            now: seconds of a clock that only goes forward.
            counters: updates done, and batches evaluated.
        """
        if self._looked_at is not None and now - self._looked_at > ASLEEP:
            self.moved_at += now - self._looked_at  # a stopped process isn't a hanging one when it goes on
        self._looked_at = now
        if self._counters is None:
            self._counters, self.moved_at = counters, now
        elif counters != self._counters:
            updates, batches = (new - old for new, old in zip(counters, self._counters, strict=True))
            if self.updates_seen and updates + batches > 0:
                self.longest = max(self.longest, (now - self.moved_at) / (updates + batches))
            self.updates_seen += max(updates, 0)
            self._counters, self.moved_at = counters, now

    def rest(self, now: float) -> None:
        """Take this moment for progress: the rank stands still with good reason."""
        self.moved_at = now

    def without_progress(self, now: float) -> float:
        """Seconds since progress was last seen."""
        return now - self.moved_at

    def limit(self, is_long: bool) -> float:
        """Seconds without progress that are a hang.

        Args:
            is_long: whether the rank does what may take long without a step that could be seen. The first two updates
                are such: the first one compiles, and no measure is there before the second.
        """
        usual = max(AT_LEAST, TIMES_AN_UPDATE * self.longest) if self.timeout is None else self.timeout
        return usual * LONGER if is_long or self.updates_seen < 2 else usual

    def timeout_is_too_short(self) -> bool:
        """Whether ``hang_timeout`` is below what an update takes."""
        return self.timeout is not None and self.longest > self.timeout
