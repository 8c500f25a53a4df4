"""Sums of many values that are as exact as if all of them were kept, in a few numbers."""

import math
from collections.abc import Iterable, Mapping
from typing import Any


class ExactSum:
    """The sum of values, whose mean is that of all of them, correctly rounded, in whatever order they came.

    The finite ones are kept as a few numbers with the same sum, none of whose digits overlap (Shewchuk, 1997).

    Args:
        values: the first ones.
        count: how many values the finite ones among them stand for; None where each is one.
        nonfinite: values that weren't finite, before those.
        nonfinite_sum: their sum.

    Attributes:
        count: finite values.
        nonfinite: values that aren't finite.
        nonfinite_sum: their sum.

    Example:
        >>> ExactSum([1e16, 1.0, -1e16]).mean() == 1 / 3
        True
    """

    FOLD = 1024  # values are folded into few when there are so many

    def __init__(
        self,
        values: Iterable[float] = (),
        count: int | None = None,
        nonfinite: int = 0,
        nonfinite_sum: float = 0.0,
    ) -> None:
        self.count, self.nonfinite, self.nonfinite_sum = 0, nonfinite, nonfinite_sum
        self._parts: list[float] = []
        self.extend(values)
        self.count = self.count if count is None else count

    def extend(self, values: Iterable[float]) -> None:
        """Add values."""
        for value in values:
            if math.isfinite(value):
                self._parts.append(value)
                self.count += 1
            else:
                self.nonfinite += 1
                self.nonfinite_sum += value
        if len(self._parts) > self.FOLD:
            self._fold()

    def _fold(self) -> None:
        parts: list[float] = []
        while rest := math.fsum([*self._parts, *(-part for part in parts)]):
            parts.append(rest)  # what the parts before it leave of the sum, rounded
        self._parts = parts

    @property
    def total(self) -> float:
        """The sum of the finite values, correctly rounded."""
        return math.fsum(self._parts)

    def mean(self, only_finite: bool = True) -> float:
        """The mean of the finite values, or of all; NaN where there are none."""
        if only_finite or not self.nonfinite:
            return self.total / self.count if self.count else math.nan
        return self.nonfinite_sum

    def state_dict(self) -> dict[str, Any]:
        """Return a few numbers that hold all of it."""
        self._fold()
        return {"parts": self._parts, "count": self.count, "nonfinite": [self.nonfinite, self.nonfinite_sum]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "ExactSum":
        """Make the sum that ``state_dict`` was of."""
        return cls(state["parts"], state["count"], *state["nonfinite"])
