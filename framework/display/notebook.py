"""A notebook: one output of the cell that is updated in place, with a bar and a table of the logs."""

import sys
from collections.abc import Mapping
from html import escape
from typing import Any

from .header import Rows
from .numbers import format_epoch
from .screens import Lines, Status

MOST_ROWS = 100  # of the table; older logs make way

STYLE = """
.stratagem { font: 13px/1.5 system-ui, sans-serif; max-width: 60rem; }
.stratagem .bar { height: 6px; border-radius: 3px; margin: 6px 0; overflow: hidden; }
.stratagem .bar { background: rgba(127, 127, 127, .25); }
.stratagem .bar div { height: 100%; background: #2a78d6; }
.stratagem .logs { max-height: 24em; overflow-y: auto; margin-top: 6px; }
.stratagem table { border-collapse: collapse; margin: 0; color: inherit; font: inherit; }
.stratagem table { font-variant-numeric: tabular-nums; }
.stratagem tr, .stratagem td, .stratagem th { background: none; border: none; padding: 2px 14px 2px 0; }
.stratagem .what td { text-align: left; vertical-align: top; }
.stratagem .what td:first-child, .stratagem th { opacity: .65; font-weight: normal; white-space: nowrap; }
.stratagem .logs td, .stratagem .logs th { text-align: right; }
.stratagem .logs tr + tr td { border-top: 1px solid rgba(127, 127, 127, .2); }
"""


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook. IPython isn't imported to find out."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


class Notebook(Lines):
    """Shows HTML through IPython, which is there where a notebook is."""

    is_live = True
    seconds = 1 / 2  # each picture is a message to the browser

    def __init__(self) -> None:
        self.handle: Any = None
        self.rows: Rows = []
        self.logs: dict[int, dict[str, str]] = {}  # update to number by name
        self.left_out = 0
        self.picture = ""

    def begin(self, rows: Rows, status: Status) -> None:
        """Show what a run is, and begin the bar."""
        from IPython.display import HTML, display

        self.rows = rows
        self.picture = self.draw_picture(status)
        self.handle = display(HTML(self.picture), display_id=True)

    def show(self, rows: Rows) -> None:
        """Show labels, and what is said under each, with the next picture; one of each label."""
        self.rows = [*(row for row in self.rows if row[0] not in dict(rows)), *rows]

    def log(self, status: Status, shown: Mapping[str, str], is_training: bool) -> None:
        """Add the numbers of a log to the table, in the row of its update."""
        self.logs.setdefault(status.update, {"epoch": format_epoch(status.epoch)}).update(shown)
        while len(self.logs) > MOST_ROWS:
            del self.logs[next(iter(self.logs))]
            self.left_out += 1
        self.draw(status)

    def draw(self, status: Status) -> None:
        """Send the browser another picture."""
        from IPython.display import HTML

        self.picture = self.draw_picture(status)
        if self.handle is not None:
            self.handle.update(HTML(self.picture))

    def end(self, rows: Rows, status: Status) -> None:
        """Leave the last picture standing, with how the run ended."""
        self.show(rows)
        self.draw(status)
        self.handle = None

    def close(self) -> None:
        """Let go of the cell's output, which stays as it is."""
        self.handle = None

    def draw_picture(self, status: Status) -> str:
        """The whole output: what the run is, a bar, and the table of its logs."""
        what = "".join(f"<tr><td>{escape(label)}</td><td>{escape(text)}</td></tr>" for label, text in self.rows)
        percent = 100 * status.fraction
        texts = [
            f"{status.place} ({percent:.0f} %)",
            f"epoch {format_epoch(status.epoch)}",
            status.rate,
            *status.times,
            status.note,
        ]
        return (
            f'<style>{STYLE}</style><div class="stratagem"><table class="what">{what}</table>'
            f'<div class="bar"><div style="width: {percent:.1f}%"></div></div>'
            f"<div>{escape(' · '.join(filter(None, texts)))}</div>{self.draw_table()}</div>"
        )

    def draw_table(self) -> str:
        """The table of the logs, the newest first; "" where there are none."""
        if not self.logs:
            return ""
        names = list(dict.fromkeys(name for log in self.logs.values() for name in log))
        head = "".join(f"<th>{escape(name)}</th>" for name in ("update", *names))
        lines = [
            f"<tr><td>{update}</td>{''.join(f'<td>{escape(log.get(name, str()))}</td>' for name in names)}</tr>"
            for update, log in reversed(self.logs.items())
        ]
        more = f"<div>{self.left_out} earlier logs are not shown.</div>" if self.left_out else ""
        return f'<div class="logs"><table><tr>{head}</tr>{"".join(lines)}</table></div>{more}'
