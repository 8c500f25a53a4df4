"""Durations: seconds, "HH:MM:SS", "DD:HH:MM:SS", or a timedelta."""

import re
from datetime import timedelta
from typing import Any

CLOCK = re.compile(r"(?:(\d+):)?(\d+):([0-5]?\d):([0-5]?\d(?:\.\d+)?)")
"""Days, hours, minutes and seconds."""


def as_duration(given: Any) -> Any:
    """Return seconds for a timedelta and for a text of a number, and anything else as it is."""
    if isinstance(given, timedelta):
        return given.total_seconds()
    if isinstance(given, str):
        if given.strip().lower() == "none":
            return None
        try:
            return float(given)
        except ValueError:
            return given
    return given


def seconds(duration: str | float) -> float | None:
    """Return the seconds of a duration; None where it is a text that isn't one.

    Example:
        >>> seconds("02:30:00"), seconds("1:00:00:00"), seconds(90)
        (9000.0, 86400.0, 90.0)
    """
    if not isinstance(duration, str):
        return float(duration)
    matched = CLOCK.fullmatch(duration.strip())
    if matched is None:
        return None
    days, hours, minutes, rest = matched.groups()
    return int(days or 0) * 86400.0 + int(hours) * 3600.0 + int(minutes) * 60.0 + float(rest)


def as_clock(duration: float) -> str:
    """Write seconds as "H:MM:SS".

    Example:
        >>> as_clock(9000.4)
        '2:30:00'
    """
    return str(timedelta(seconds=round(duration)))


def problem(duration: Any) -> str | None:
    """Return why a duration can't work and what to write instead; None where it can."""
    if duration is None:
        return None
    found = seconds(duration)
    if found is None:
        return "is no duration; write 'HH:MM:SS', 'DD:HH:MM:SS', or seconds as a number"
    return None if 0.0 < found < float("inf") else "must be above 0, and finite"
