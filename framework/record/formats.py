"""Numbers, durations and bytes as a person reads them."""

import math
from collections.abc import Iterable

NOTHING = "-"  # stands where there is no value


def short(value: float | None) -> str:
    """A number in about four digits.

    Example:
        >>> short(12345.678), short(0.000298), short(2.5), short(None)
        ('12,350', '2.98e-04', '2.5', '-')
    """
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    size = abs(value)
    if size >= 1e7 or size < 1e-3:
        return f"{value:.2e}"
    if size >= 1000:
        return f"{float(f'{value:.4g}'):,.0f}"
    return f"{value:.4g}"


def amount(value: float | None) -> str:
    """A large number with K, M or B.

    Example:
        >>> amount(1_240_000_000), amount(85_056), amount(12)
        ('1.24B', '85.1K', '12')
    """
    if value is None:
        return NOTHING
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.4g}"


def in_bytes(value: float | None) -> str:
    """Bytes with their binary unit.

    Example:
        >>> in_bytes(3 * 2**30 + 2**29)
        '3.5 GiB'
    """
    if value is None:
        return NOTHING
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if abs(value) >= 2**power:
            return f"{value / 2**power:.3g} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    """Seconds as hours, minutes and seconds.

    Example:
        >>> duration(0.025), duration(8), duration(605), duration(7384), duration(200_000)
        ('25 ms', '8 s', '10 min 5 s', '2 h 3 min', '2 d 7 h')
    """
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if 0 < seconds < 0.95:
        return f"{1000 * seconds:.3g} ms"
    whole = int(seconds + 0.5)
    if whole < 10 and seconds != int(seconds):
        return f"{seconds:.1f} s"
    for small, large, unit in ((1, 60, ("s", "min")), (60, 3600, ("min", "h")), (3600, 86400, ("h", "d"))):
        if whole < large:
            break
        if whole < {60: 3600, 3600: 86400, 86400: math.inf}[large]:
            return f"{whole // large} {unit[1]} {whole % large // small} {unit[0]}"
    return f"{whole} s"


def words(name: str) -> str:
    """A name of a log in words: "grad_norm" as "grad norm"."""
    return name.replace("_", " ")


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two others, evenly spaced.

    Example:
        >>> nice_ticks(0.0, 97.0)
        [0.0, 20.0, 40.0, 60.0, 80.0]
    """
    span = high - low
    if not (span > 0 and math.isfinite(span)):
        return [low]
    step = 10 ** math.floor(math.log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if span / (step * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [float(f"{(first + place) * step:.12g}") for place in range(min(count, 50))]


def widened(found: Iterable[float]) -> tuple[float, float]:
    """The least and greatest of some numbers, with room between them where they are one."""
    values = list(found) or [0.0, 1.0]
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        room = abs(high) * 0.05 or 1.0
        return low - room, high + room
    return low, high
