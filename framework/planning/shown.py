"""A plan as a person reads it: tables of memory and of messages, and sentences on what follows."""

from collections.abc import Iterable

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .account import BACKWARD, Account
from .plan import FORMULA, UNKNOWN, RunPlan, seconds_of
from .recording import ACTIVATIONS, GATHERED, HOST_AVERAGES, MESSAGES, RECOMPUTED, TEMPORARY

AT_PEAK = {
    "held": "parameters, gradients, state, buffers",
    GATHERED: "gathered parameters",
    MESSAGES: "communication buffers",
    ACTIVATIONS: "activations",
    TEMPORARY: "gradients of activations, temporary",
}
UNITS = "B", "KiB", "MiB", "GiB", "TiB"
PREFIXES = "", "k", "M", "G", "T", "P", "E"


def shown(plan: RunPlan, title: str) -> Group:
    """Make what is printed of a plan.

    Args:
        plan: of a run.
        title: what was planned.
    """
    parts: list[Table | Text] = [Text(title, style="bold"), memory_table(plan)]
    if any(account.traffic for account in plan.accounts):
        parts.append(traffic_table(plan))
    return Group(*parts, *(Text(f"\n{sentence}") for sentence in sentences(plan)))


def memory_table(plan: RunPlan) -> Table:
    """Make the table of what each kind of rank holds."""
    table = Table()
    table.add_column("memory of a rank")
    for account in plan.accounts:
        name = "every rank" if len(plan.accounts) == 1 else f"rank {account.rank}"
        table.add_column(name, justify="right")
    held = {
        "parameters": "parameters",
        "frozen_parameters": "frozen parameters",
        "gradients": "gradients",
        "optimizer_state": "optimizer state",
        "buffers": "buffers",
        "averaged_weights": "averaged weights",
    }
    for field, name in held.items():
        values = [getattr(account, field) for account in plan.accounts]
        if any(values) or field == "parameters":
            table.add_row(name, *map(size, values))
    if all(account.peak is None for account in plan.accounts):
        return table
    table.add_section()
    for kind, name in AT_PEAK.items():
        values = [at_peak(account, kind) for account in plan.accounts]
        if any(values):
            table.add_row(f"at the peak: {name}", *map(size, values))
    table.add_section()
    table.add_row("peak", *(size(a.peak.bytes) if a.peak else "" for a in plan.accounts), style="bold")
    table.add_row("where", *(where(account) for account in plan.accounts))
    return table


def at_peak(account: Account, kind: str) -> int:
    """Bytes of a kind at the peak; "held" is all that isn't one of the others."""
    if account.peak is None:
        return 0
    if kind != "held":
        return account.peak.parts.get(kind, 0)
    return sum(value for name, value in account.peak.parts.items() if name not in AT_PEAK)


def where(account: Account) -> str:
    """Say where in an update the peak is."""
    if account.peak is None:
        return ""
    peak = account.peak
    phase = f"{RECOMPUTED} in {BACKWARD}" if peak.phase == RECOMPUTED else peak.phase
    return f"{phase}: {peak.module}" if peak.module else phase


def traffic_table(plan: RunPlan) -> Table:
    """Make the table of what the largest rank sends in an update."""
    table = Table(title=Text("collectives of an update"), title_justify="left")
    for heading in ("along", "collective", "link"):
        table.add_column(heading)
    for heading in ("ranks", "count", "bytes", "at least"):
        table.add_column(heading, justify="right")
    for row in plan.largest.traffic:
        seconds = duration(seconds_of(row, plan.device))
        operation = row.operation.replace("_", "-")
        table.add_row(row.dimension, operation, row.link, str(row.ranks), str(row.count), size(row.bytes), seconds)
    return table


def sentences(plan: RunPlan) -> Iterable[str]:
    """Say whether it fits, how fast it can be, and what isn't known."""
    device, account, floors = plan.device, plan.largest, plan.floors
    if account.stopped:
        yield (
            f"No update could be played: {account.stopped}. What is said above needs none; activations, messages and "
            "times aren't known."
        )
    elif plan.fits is not None:
        assert account.peak is not None
        free = f"{plan.margin:.0%} of {size(device.memory)} ({device.name}) left free"
        yield f"{'It fits' if plan.fits else 'It does not fit'}, with {free}: the peak is {size(account.peak.bytes)}."
        largest = plan.largest_micro_batch
        if largest is not None:
            yield f"The largest micro-batch that fits so has {largest:,} samples; planned was {account.samples:,}."
    if floors is not None:
        update = account.samples * account.accumulation * account.data_ranks
        recomputed = account.flops.get(RECOMPUTED, 0)
        yield (
            f"An update of {update:,} samples takes {number(account.all_flops)}FLOPs a rank"
            + (f" ({number(recomputed)} of them to compute activations again)" if recomputed else "")
            + f", and from {duration(floors.overlapped)} to {duration(floors.apart)} at least: computing "
            f"{duration(floors.compute)}, messages {duration(floors.traffic)}."
        )
        yield f"Estimated: {FORMULA}"
        yield (
            f"Rates: {device.name}: {number(device.flops)}FLOP/s, memory {number(device.memory_bandwidth)}B/s, link "
            + (f"{number(device.link)}B/s, network {number(device.network)}B/s ({device.source}).")
        )
    if account.on_host:
        held = ", ".join(f"{kind.replace('_', ' ')} {size(value)}" for kind, value in on_host_of(account).items())
        yield (
            f"In the host's memory lie {size(sum(account.on_host.values()))} of each rank ({held}): the peak is the "
            "device's, without them. Copies on their way between the two aren't seen."
        )
    yield UNKNOWN
    yield from account.notes


def on_host_of(account: Account) -> dict[str, int]:
    """What lies in the host's memory, by the names that people read."""
    return {"averaged weights" if kind == HOST_AVERAGES else kind: size for kind, size in account.on_host.items()}


def size(value: float) -> str:
    """Write bytes.

    Example:
        >>> size(512), size(3 * 2**30)
        ('512 B', '3.00 GiB')
    """
    for unit in UNITS[:-1]:
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == UNITS[0] else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} {UNITS[-1]}"


def number(value: float) -> str:
    """Write a number with the prefix of its thousands.

    Example:
        >>> number(3.35e12) + "B/s"
        '3.35 TB/s'
    """
    power = 0
    while value >= 1000 and power < len(PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {PREFIXES[power]}"


def duration(seconds: float) -> str:
    """Write seconds.

    Example:
        >>> duration(0.0123), duration(2.5)
        ('12.3 ms', '2.5 s')
    """
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{round(seconds * 1e6):.3g} us"
