"""Pieces of a page: elements whose text is escaped, tables, and the page around them with its style and its script."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from .charts import Chart, data_script, draw
from .formats import NOTHING

LONGEST_CELL = 2000


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading.

    Attributes:
        title: the heading.
        body: HTML, in which all that users write is escaped.
    """

    title: str
    body: str

    def __str__(self) -> str:
        return f"<section><h2>{text(self.title)}</h2>{self.body}</section>" if self.body else ""


def text(value: Any) -> str:
    """Something as text of a page, cut where it is very long."""
    said = value if isinstance(value, str) else NOTHING if value is None else str(value)
    # A lone surrogate, as a file's name may hold, can't be written as UTF-8.
    said = said.encode("utf-8", "replace").decode("utf-8")
    return escape(said if len(said) <= LONGEST_CELL else said[:LONGEST_CELL] + " …")


def code(value: Any) -> str:
    """The same, as code."""
    return f"<code>{text(value)}</code>"


def table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], classes: Sequence[str] = (), numbers: Sequence[int] = ()
) -> str:
    """A table. Cells are HTML.

    Args:
        headings: of the columns; none where the first column holds the headings of rows.
        rows: their cells.
        classes: of the rows, as far as they have one.
        numbers: the columns whose cells stand on the right.
    """
    side = ' class="number"'
    head = "".join(f"<th{side if place in numbers else ''}>{text(each)}</th>" for place, each in enumerate(headings))
    body = []
    for place, row in enumerate(rows):
        kind = f' class="{classes[place]}"' if place < len(classes) and classes[place] else ""
        cells = "".join(
            f"<th scope='row'>{cell}</th>"
            if not headings and column == 0
            else f"<td{side if column in numbers else ''}>{cell}</td>"
            for column, cell in enumerate(row)
        )
        body.append(f"<tr{kind}>{cells}</tr>")
    if not body:
        return ""
    top = f"<thead><tr>{head}</tr></thead>" if headings else ""
    return f'<div class="scroll"><table>{top}<tbody>{"".join(body)}</tbody></table></div>'


def folded(summary: str, body: str) -> str:
    """What is shown when it is asked for."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>" if body else ""


def tiles(values: Iterable[tuple[str, str]]) -> str:
    """Numbers that are read first: (name, value)."""
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><span>{text(name)}</span><b>{text(value)}</b></div>' for name, value in values
    ) + "</div>"  # fmt: skip


def figures(charts: Sequence[Chart], first: int = 0) -> str:
    """Charts side by side; ``first`` is the place of the first one among all of the page."""
    drawn = "".join(draw(chart, first + place) for place, chart in enumerate(charts))
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def page(title: str, body: str, charts: Sequence[Chart]) -> str:
    """A whole page, which needs nothing but itself."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="generator" content="stratagem">'
        # No network: the browser refuses whatever might ask for one.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'\">"
        f"<title>{text(title)}</title><style>{resource('page.css')}</style></head>\n<body>\n{body}\n"
        f"{data_script(charts)}\n<script>{resource('page.js')}</script></body></html>\n"
    )


@cache
def resource(name: str) -> str:
    """A file that lies beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
