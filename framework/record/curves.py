"""A curve that forgets no extreme: numbers by update, thinned out to the least and the greatest of each stretch."""

import math
from collections.abc import Iterable

KEPT = 4096  # points of a curve, above which it is thinned out


class Curve:
    """Numbers by update, in the order in which they were logged.

    Values that aren't finite are kept as a place without a value, and counted.

    Args:
        kept: points above which the curve is thinned out to about half as many.

    Attributes:
        steps, values: of the points; a value is None where it wasn't finite.
        nonfinite: how many weren't.
        count: points that were added.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self.kept = kept
        self.steps: list[float] = []
        self.values: list[float | None] = []
        self.nonfinite = self.count = 0

    def add(self, step: float, value: float) -> None:
        """Add a point at the end."""
        self.count += 1
        finite = math.isfinite(value)
        self.nonfinite += not finite
        self.steps.append(step)
        self.values.append(value if finite else None)
        if len(self.steps) > self.kept:
            self.steps, self.values = self.thinned(self.kept // 2)

    def cut_after(self, step: float) -> None:
        """Forget what was logged after an update, which a resumed run does again."""
        while self.steps and self.steps[-1] > step:
            self.steps.pop()
            self.values.pop()

    @property
    def last(self) -> float | None:
        """The last value; None where there is none, or it isn't finite."""
        return self.values[-1] if self.values else None

    @property
    def finite(self) -> list[float]:
        """The values that are there."""
        return [value for value in self.values if value is not None]

    def thinned(self, most: int) -> tuple[list[float], list[float | None]]:
        """The curve in at most so many points: of each stretch of updates the least and the greatest value, in their
        order, and of the last one the last value, too.
        """
        if len(self.steps) <= most:
            return list(self.steps), list(self.values)
        buckets = max(1, (most - 1) // 2)
        size = len(self.steps) / buckets
        places: list[int] = []
        for bucket in range(buckets):
            stretch = range(int(bucket * size), int((bucket + 1) * size))
            there = [place for place in stretch if self.values[place] is not None]
            if there:
                least = min(there, key=self._value)
                greatest = max(there, key=self._value)
                places += sorted({least, greatest})
            elif stretch:
                places.append(stretch[0])
        places += [len(self.steps) - 1] if places[-1] != len(self.steps) - 1 else []
        return [self.steps[place] for place in places], [self.values[place] for place in places]

    def _value(self, place: int) -> float:
        value = self.values[place]
        assert value is not None
        return value


def limits(values: Iterable[float]) -> tuple[float, float] | None:
    """The least and the greatest value; None where there is none."""
    found = list(values)
    return (min(found), max(found)) if found else None
