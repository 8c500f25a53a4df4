"""report.html of one run: its numbers, curves, checkpoints, sessions, configuration, and where it ran."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..replacing import replace_file
from . import configuration
from .choosing import WAITING, charts_of, with_shares
from .formats import NOTHING, amount, duration, in_bytes, short, words
from .history import History, Session, iso_of, number, seconds_of
from .html import Section, code, figures, folded, page, table, text, tiles
from .profile import profile_sections

NAME = "report.html"
PATIENCE = 120.0  # seconds without a new report, at least, after which a page says that the run is silent
MOST_ROWS = 200
SHOWN_CHECKPOINTS = 10  # of the checkpoints; more on demand


def write_report(directory: Path, record: Mapping[str, Any], history: History, path: Path | None = None) -> Path:
    """Write the report of a run, in one step: who reads it meanwhile reads the one before.

    Args:
        directory: ``output_dir`` of the run.
        record: run.json's content; empty where there is none.
        history: what the run has logged.
        path: of the report; None means ``report.html`` in the directory.

    Returns:
        Where it is.
    """
    path = path or directory / NAME
    replace_file(path, report(directory, record, history))
    return path


def report(directory: Path, record: Mapping[str, Any], history: History) -> str:
    """The report as HTML; see ``write_report``."""
    name = name_of(record, history, directory)
    main, others, left_out = charts_of({name: history})
    left = f"{len(left_out)} more are in the log: {', '.join(left_out[:20])}" if left_out else ""
    sections = [
        header(name, record, history),
        figures(main),
        folded(f"Other numbers ({len(others)})", figures(others, len(main)) + (f"<p>{text(left)}</p>" if left else "")),
        Section("Totals and time", times(history)),
        *profile_sections(directory),
        Section("Checkpoints", checkpoints(record, history)),
        Section("Sessions", sessions(record, history)),
        *configuration.sections(record),
        Section("Earlier runs in this directory", earlier_runs(record)),
        f"<footer>Written by stratagem {text(record.get('versions', {}).get('stratagem', ''))}, "
        f"{clock(time.time())}. The numbers are in log.jsonl, all else in run.json.</footer>",
    ]
    return page(f"{name} · {state_of(record, history)}", "\n".join(map(str, sections)), [*main, *others])


def name_of(record: Mapping[str, Any], history: History, directory: Path) -> str:
    """What a run is called: its name, else its directory's."""
    given = record.get("run_name") or history.run_name
    return str(given) if given else directory.resolve().name or str(directory)


def state_of(record: Mapping[str, Any], history: History) -> str:
    """Running, finished, interrupted or failed."""
    last = (record.get("sessions") or [{}])[-1].get("state")
    return last if last in ("running", "finished", "interrupted", "failed") else history.state


def header(name: str, record: Mapping[str, Any], history: History) -> str:
    """The title, the state, and the numbers that are looked for first."""
    state, seen = state_of(record, history), history.time or time.time()
    patience = max(PATIENCE, 5 * longest_pause(history))
    length = history.max_steps or record.get("max_steps") or 0
    session = (record.get("sessions") or [{}])[-1]
    where = [words_of(record.get("strategy")), words_of(record.get("precision"))]
    if isinstance(record.get("world_size"), int):
        where.append(f"{record['world_size']} rank{'s' if record['world_size'] > 1 else ''}")
    device = record.get("device")
    if isinstance(device, Mapping):
        where.append(str(device.get("name")))
    if isinstance(record.get("module"), Mapping):
        where.insert(0, str(record["module"].get("class", "")).rpartition(".")[2])
    reason = session.get("reason") or (history.sessions[-1].reason if history.sessions else "")
    said = f'<p class="reason">{text(reason)}</p>' if reason and state != "running" else ""
    return (
        f"<header><h1>{text(name)}</h1>"
        f'<span class="badge {state}" data-seen="{iso_of(seen)}" data-patience="{patience:.0f}">{text(state)}</span>'
        f'<button id="theme" type="button" hidden>light / dark</button></header>'
        f'<p class="sub">{text(" · ".join(filter(None, where)))}</p>'
        f'<p class="sub">as of {clock(seen, "since")}</p>'
        f"{said}{tiles(first_numbers(record, history, length))}"
    )


def first_numbers(record: Mapping[str, Any], history: History, length: int) -> list[tuple[str, str]]:
    """(name, value) of what is looked for first."""
    last, totals = history.last, history.totals or floats(record.get("metrics"))
    best = record.get("best")
    rate = history.updates_per_second
    found = [("update", f"{history.step:,}" + (f" / {length:,}" if length else ""))]
    if history.epoch:
        found.append(("epoch", short(history.epoch)))
    found += [("train loss", short(last["loss"]))] if "loss" in last else []
    losses = [name for name in last if name.startswith("eval_") and name.endswith("loss")]
    found += [(words(name), short(last[name])) for name in losses[:2]]
    if isinstance(best, Mapping) and number(best.get("value")) is not None:
        found.append((f"best, at {best.get('update')}", short(number(best["value"]))))
    if any(session.seconds for session in history.sessions):
        found.append(("run time", duration(sum(session.seconds for session in history.sessions))))
    if rate and length > history.step and state_of(record, history) == "running":
        found.append(("time left", duration((length - history.step) / rate)))
    found += [("updates / s", short(totals.get("train_steps_per_second", rate)))] if rate or totals else []
    if "train_tokens_per_second" in totals:
        found.append(("tokens / s", short(totals["train_tokens_per_second"])))
    if "mfu" in totals:
        found.append(("MFU", f"{totals['mfu']:.1%}"))
    for key, name in (("memory_gpu_allocated", "GPU memory"), ("memory_cpu_resident", "host memory")):
        peak = history.curves.get(key)
        if peak is not None and peak.finite:
            found.append((f"{name}, most", in_bytes(max(peak.finite))))
    module = record.get("module")
    if isinstance(module, Mapping) and number(module.get("trainable")) is not None:
        found.append(("parameters", amount(number(module["trainable"]))))
    return found


def times(history: History) -> str:
    """Where the time went, as far as the log says: rates of the whole run, waiting for data, the slowest rank."""
    rows = [[text(words(name)), text(told(name, value))] for name, value in history.totals.items()]
    shares = with_shares(history).get(WAITING)
    if shares is not None and shares.finite:
        mean = sum(shares.finite) / len(shares.finite)
        rows.append(["waiting for data", f"{mean:.1f}% of the time, on the rank where it is longest"])
        rows.append(["forward, backward, optimizer, messages and logs", f"{100 - mean:.1f}% of the time"])
    ranks, ratios = history.curves.get("slowest_rank"), history.curves.get("slowest_rank_ratio")
    if ranks is not None and ratios is not None and ranks.finite and ratios.finite:
        often = max(set(ranks.finite), key=ranks.finite.count)
        share, ratio = ranks.finite.count(often) / len(ranks.finite), sum(ratios.finite) / len(ratios.finite)
        rows.append(["slowest rank", f"{often:.0f} in {share:.0%} of logs; {ratio:.2f} times the median on average"])
    return table((), rows)


def told(name: str, value: float) -> str:
    """A total with its unit."""
    if "memory" in name:
        return in_bytes(value)
    if name == "mfu":
        return f"{value:.1%} (model FLOPs utilization)"
    return duration(value) if name.endswith("runtime") else short(value)


def checkpoints(record: Mapping[str, Any], history: History) -> str:
    """The checkpoints, newest first, with their evaluations; the best one is marked."""
    best = record.get("best")
    best_update = best.get("update") if isinstance(best, Mapping) else None
    found = list(history.checkpoints.values())[::-1][:MOST_ROWS]
    names = list(dict.fromkeys(name for each in found for name in each.evaluation if "_per_second" not in name))
    names = [name for name in names if not name.endswith("runtime")][:6]
    rows, classes = [], []
    for each in found:
        mark = " (best)" if each.update == best_update else ""
        gone = " (removed)" if each.is_removed else ""
        values = [text(short(each.evaluation.get(name))) for name in names]
        rows.append([f"{each.update:,}", code(each.name) + text(mark + gone), clock(each.time), *values])
        classes.append("best" if mark else "gone" if gone else "")
    headings, numbers = ["update", "directory", "saved", *map(words, names)], [0, *range(3, 9)]
    earlier = table(headings, rows[SHOWN_CHECKPOINTS:], classes[SHOWN_CHECKPOINTS:], numbers)
    newest = table(headings, rows[:SHOWN_CHECKPOINTS], classes, numbers)
    return newest + folded(f"Earlier ones ({len(rows) - SHOWN_CHECKPOINTS})", earlier)


def sessions(record: Mapping[str, Any], history: History) -> str:
    """How the run began, was resumed, and ended, with the reasons."""
    found = record.get("sessions") or [as_recorded(each) for each in history.sessions]
    rows = []
    for place, each in enumerate(found):
        state, is_last = str(each.get("state", "running")), place == len(found) - 1
        if state == "running" and not is_last:
            state = "broken off: no end was noted (killed, or the machine was lost)"
        began, ended = seconds_of(each.get("began")), seconds_of(each.get("ended") or each.get("last_time"))
        changed = each.get("changed_arguments")
        said = [state, str(each.get("reason") or "")]
        if isinstance(changed, Mapping):
            said.append("changed: " + ", ".join(f"{name} {old!r} to {new!r}" for name, (old, new) in pairs(changed)))
        rows.append(
            [
                text(each.get("kind")),
                text(each.get("update")) + " to " + text(each.get("last_update", "?")),
                clock(began),
                duration(ended - began) if began and ended else NOTHING,
                text(f"{each.get('host', '')} {each.get('world_size', '')}".strip() or None),
                "<br>".join(text(part) for part in said if part),
            ]
        )
    return table(["", "updates", "began", "took", "host, ranks", "how it ended"], rows[-MOST_ROWS:])


def as_recorded(session: Session) -> dict[str, Any]:
    """A session of a log as run.json would hold it."""
    times = {"began": session.began, "ended": session.ended, "last_time": session.last_time}
    found: dict[str, Any] = {name: iso_of(seconds) for name, seconds in times.items() if seconds is not None}
    names = ("kind", "update", "state", "reason", "last_update")
    return {**found, **{name: getattr(session, name) for name in names}}


def pairs(changed: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The changed arguments that are written as they should be."""
    return [(name, both) for name, both in changed.items() if isinstance(both, list) and len(both) == 2]


def earlier_runs(record: Mapping[str, Any]) -> str:
    """Other runs that worked in the directory before."""
    earlier = record.get("earlier_runs") or []
    rows = [
        [code(each.get("id_of_run")), text(each.get("run_name")), clock(seconds_of(each.get("began"))),
         text(each.get("last_update")), text(each.get("state"))]
        for each in earlier if isinstance(each, Mapping)
    ]  # fmt: skip
    return table(["run", "name", "began", "updates", "state"], rows)


def clock(seconds: float | None, kind: str = "") -> str:
    """A time, in UTC; the page's script adds how long ago that was to one of the kind "since"."""
    if seconds is None:
        return NOTHING
    iso = iso_of(seconds)
    return f'<time class="{kind}" datetime="{iso}">{iso[:10]} {iso[11:19]} UTC</time>'


def words_of(choice: Any) -> str:
    """The name of a strategy or precision in the record."""
    return str(choice.get("name", "")) if isinstance(choice, Mapping) else ""


def floats(values: Any) -> dict[str, float]:
    """The numbers in a mapping of the record."""
    if not isinstance(values, Mapping):
        return {}
    return {str(name): value for name, each in values.items() if (value := number(each)) is not None}


def longest_pause(history: History) -> float:
    """The longest time between two logs, in seconds, by what is left of the rates."""
    rates, steps = history.curves.get("updates_per_second"), history.curves.get("loss")
    if rates is None or steps is None or len(steps.steps) < 2 or not rates.finite:
        return 0.0
    between = (steps.steps[-1] - steps.steps[0]) / max(1, steps.count - 1)
    return between / max(1e-9, min(rates.finite))
