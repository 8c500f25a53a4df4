"""A page that compares runs: their curves over one another, the arguments in which they differ, their last numbers."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..replacing import replace_file
from .choosing import charts_of
from .configuration import mapping
from .finding import Run
from .formats import NOTHING, duration, short, words
from .history import seconds_of
from .html import Section, code, figures, folded, page, table, text
from .report import PATIENCE, clock, floats, longest_pause, state_of, told

# Arguments that say where a run's results go and what it is called, and not what it computes.
BESIDE = ("output_dir", "run_name")


def write_comparison(runs: Sequence[Run], path: Path) -> Path:
    """Write the page, in one step.

    Args:
        runs: read, two or more.
        path: of the page.

    Returns:
        The path.
    """
    replace_file(path, comparison(runs))
    return path


def comparison(runs: Sequence[Run]) -> str:
    """The page as HTML; see ``write_comparison``."""
    named = dict(zip(names_of(runs), runs, strict=True))
    main, others, left_out = charts_of({name: run.history for name, run in named.items()})
    left = f"<p>{len(left_out)} more are in the logs: {text(', '.join(left_out[:20]))}</p>" if left_out else ""
    sections = [
        f'<header><h1>{len(runs)} runs</h1><button id="theme" type="button" hidden>light / dark</button></header>'
        f'<p class="sub">{text(", ".join(named))}</p>',
        figures(main),
        folded(f"Other numbers ({len(others)})", figures(others, len(main)) + left),
        Section("Last numbers", last_numbers(named)),
        Section("What differs", differences(named)),
        Section("Runs", places(named)),
    ]
    return page(f"{len(runs)} runs", "\n".join(map(str, sections)), [*main, *others])


def names_of(runs: Sequence[Run]) -> list[str]:
    """What tells the runs apart: their names, else their directories below the common one."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    paths = [str(run.directory.resolve()) for run in runs]
    common = os.path.commonpath(paths)
    return [os.path.relpath(path, common) for path in paths]


def last_numbers(runs: Mapping[str, Run]) -> str:
    """The last value of what all logged, and the totals, with a column for each run."""
    rows = [
        ["state", *(text(state_now(run)) for run in runs.values())],
        ["update", *(text(f"{run.history.step:,}") for run in runs.values())],
        ["run time", *(duration(sum(each.seconds for each in run.history.sessions)) for run in runs.values())],
    ]
    best = [mapping(run.record.get("best")) for run in runs.values()]
    if any(best):
        found = [(floats(each).get("value"), each.get("update")) for each in best]
        cells = [NOTHING if value is None else f"{short(value)} at {update}" for value, update in found]
        rows.append(["best " + text(words(str(next(filter(None, best)).get("name")))), *map(text, cells)])
    names = list(dict.fromkeys(name for run in runs.values() for name in run.history.last))
    order = sorted(names, key=lambda name: (name != "loss", not name.startswith("eval_")))
    hidden = ("learning_rate", "memory_", "slowest_rank", "data_wait")
    for name in [each for each in order if not each.startswith(hidden)][:60]:
        rows.append([text(words(name)), *(short(run.history.last.get(name)) for run in runs.values())])
    totals = list(dict.fromkeys(name for run in runs.values() for name in run.history.totals))
    for name in totals:
        values = [run.history.totals.get(name) for run in runs.values()]
        rows.append([text(words(name)), *(NOTHING if value is None else told(name, value) for value in values)])
    return table(["", *runs], rows)


def differences(runs: Mapping[str, Run]) -> str:
    """The arguments, versions, places and modules in which the runs differ."""
    flat = [flattened(run.record) for run in runs.values()]
    names = list(dict.fromkeys(name for each in flat for name in each))
    rows, same = [], 0
    for name in names:
        values = [each.get(name) for each in flat]
        if all(value == values[0] for value in values):
            same += name not in BESIDE
        elif name not in BESIDE:
            rows.append([code(name), *(text(NOTHING) if value is None else code(value) for value in values)])
    if not names:
        return "<p>There is no run.json: what the runs were asked for isn't known.</p>"
    alike = f'<p class="note">{same} others are alike.</p>'
    return (table(["", *runs], rows) if rows else "<p>Nothing.</p>") + alike


def flattened(record: Mapping[str, Any]) -> dict[str, str]:
    """What a record says a run was asked for, and by what it ran, as text by name."""
    found = {name: repr(value) for name, value in mapping(mapping(record.get("arguments")).get("given")).items()}
    for name in ("strategy", "precision"):
        if record.get(name):
            found[name] = str(mapping(record[name]).get("is"))
    for name in ("world_size", "samples_per_update"):
        if name in record:
            found[name] = str(record[name])
    module, git = mapping(record.get("module")), mapping(record.get("git"))
    for name in ("class", "trainable", "frozen"):
        if name in module:
            found[f"module {name}"] = str(module[name])
    if git:
        found["commit"] = str(git.get("commit"))[:12] + ("" if git.get("is_clean") else " (changed)")
    if record.get("device"):
        found["device"] = str(mapping(record["device"]).get("name"))
    return found | {f"{name} version": str(each) for name, each in mapping(record.get("versions")).items()}


def places(runs: Mapping[str, Run]) -> str:
    """Where each run's results are, and when it began."""
    rows = []
    for name, run in runs.items():
        report = run.directory / "report.html"
        link = code(str(run.directory))
        if report.is_file():
            link = f'<a href="{text(report.resolve().as_uri())}">{link}</a>'
        sessions = run.record.get("sessions") or [{}]
        began = seconds_of(sessions[0].get("began"))
        if began is None and run.history.sessions:
            began = run.history.sessions[0].began
        rows.append([text(name), clock(began), str(max(len(sessions), len(run.history.sessions))), link])
    return table(["run", "began", "sessions", "directory"], rows)


def state_now(run: Run) -> str:
    """The state, and of one that should be running, how long it has been silent."""
    state, silent = state_of(run.record, run.history), run.silent_for()
    if state == "running" and silent is not None and silent > max(PATIENCE, 5 * longest_pause(run.history)):
        return f"no sign of life for {duration(silent)}"
    return state
