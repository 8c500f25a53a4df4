"""Numbers, rates and durations as a person reads them: the same quantity always in the same form."""

import math
from collections.abc import Mapping

# Where a rank is no slower than this beside the others, a line doesn't speak of it; the log does.
NOTABLE_RATIO = 1.1
NOTABLE_WAIT = 0.01
OF_RANKS = ("slowest_rank", "slowest_rank_ratio", "data_wait_seconds")


def format_count(number: float) -> str:
    """Write a whole number with its thousands apart.

    Example:
        >>> format_count(1234567)
        '1,234,567'
    """
    return f"{number:,.0f}"


def format_value(name: str, value: float) -> str:
    """Write a number of a log in the form that numbers of its name have: learning rates by powers of ten, bytes in GiB,
    counts whole, all others with four digits.

    Example:
        >>> format_value("learning_rate", 0.00802), format_value("loss", 2.5), format_value("skipped_updates", 3)
        ('8.02e-03', '2.500', '3')
    """
    if not math.isfinite(value):
        return str(float(value))
    if name.startswith("learning_rate"):
        return f"{value:.2e}"
    if "_memory_" in name:
        return f"{value / 2**30:.2f} GiB"
    size = abs(value)
    if isinstance(value, int) or size >= 1000:
        return format_count(value) if size < 1e9 else f"{value:.3e}"
    if size < 1e-4:
        return f"{value:.3e}" if value else "0.000"
    return f"{value:#.4g}"


def format_logs(logs: Mapping[str, float]) -> dict[str, str]:
    """Write the numbers of a log that are worth a person's time, by the names that a person reads."""
    ranks_differ = logs.get("slowest_rank_ratio", 0.0) >= NOTABLE_RATIO
    left_out = {"step", "epoch", *(() if ranks_differ else OF_RANKS[:2])}
    if logs.get("data_wait_seconds", 0.0) < NOTABLE_WAIT:
        left_out.add("data_wait_seconds")
    return {name.replace("_", " "): format_value(name, logs[name]) for name in logs if name not in left_out}


def format_epoch(epoch: float) -> str:
    """Write how many passes over the data were made.

    Example:
        >>> format_epoch(2.5), format_epoch(0.000512)
        ('2.50', '0.000512')
    """
    return f"{epoch:#.3g}" if 0 < epoch < 1 else f"{epoch:.2f}"


def format_duration(seconds: float) -> str:
    """Write a duration in minutes and seconds, and from one hour on in hours, too.

    Example:
        >>> format_duration(75), format_duration(3675)
        ('1:15', '1:01:15')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
