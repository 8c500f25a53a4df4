"""A curve that forgets no extreme: numbers by update, thinned out to the least and the greatest of each stretch."""

import math
from collections.abc import Sequence

KEPT = 2048  # points of a curve, above which it is thinned out


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
        """The curve in at most so many points; see ``thin``."""
        return thin(self.steps, self.values, most)


def thin(steps: Sequence[float], values: Sequence[float | None], most: int) -> tuple[list[float], list[float | None]]:
    """Leave out points, but not extremes: of each stretch the least and the greatest value stay, in their order, and
    the last point.

    Args:
        steps, values: of the points; a value is None where there is none.
        most: points that are left, at least 3.
    """
    if len(steps) <= most:
        return list(steps), list(values)
    buckets = max(1, (most - 1) // 2)
    size = len(steps) / buckets
    places: list[int] = []
    for bucket in range(buckets):
        first, end = int(bucket * size), int((bucket + 1) * size)
        stretch = values[first:end]
        there = [value for value in stretch if value is not None]
        if there:
            least, greatest = first + stretch.index(min(there)), first + stretch.index(max(there))
            places += [least, greatest] if least < greatest else [greatest, least] if greatest < least else [least]
        elif end > first:
            places.append(first)
    if places[-1] != len(steps) - 1:
        places.append(len(steps) - 1)
    return [steps[place] for place in places], [values[place] for place in places]
