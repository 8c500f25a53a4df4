"""Charts as inline SVG, which a page shows without a script; a script draws them anew from the same numbers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from .curves import thin
from .formats import NOTHING, in_bytes, nice_ticks, short, widened

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 26
DRAWN = 300  # points of a curve, where there is no script to draw all
ROOM = 0.04  # of the values' range, above and below them
COLORS = 8  # of the page's style sheet, which are taken in turn


@dataclass(frozen=True)
class Line:
    """A curve of a chart.

    Attributes:
        name: in the legend.
        steps, values: its points; a value is None where there is none.
        color: its place among the colors.
        dots: whether its points are marked, because there are few.
        is_faint: whether it stands back behind others.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float | None]
    color: int = 0
    dots: bool = False
    is_faint: bool = False

    @property
    def style(self) -> str:
        """Its classes in the style sheet."""
        return f"c{self.color % COLORS}{' faint' if self.is_faint else ''}"


@dataclass(frozen=True)
class Chart:
    """What is drawn together.

    Attributes:
        title: above it.
        lines: its curves.
        unit: "" or "bytes", which says how numbers are written.
        note: a sentence below it.
        marks: updates at which the run was resumed.
        is_wide: whether it takes the page's whole width.
    """

    title: str
    lines: Sequence[Line]
    unit: str = ""
    note: str = ""
    marks: Sequence[float] = ()
    is_wide: bool = False

    def to_json(self) -> str:
        """What the page's script reads."""
        lines = [
            f'{{"name":{json.dumps(line.name)},"style":"{line.style}","dots":{json.dumps(line.dots)},'
            f'"x":{row(line.steps, 12)},"y":{row(line.values, 6)}}}'
            for line in self.lines
        ]
        return (
            f'{{"title":{json.dumps(self.title)},"unit":"{self.unit}","marks":{row(self.marks, 12)},'
            f'"lines":[{",".join(lines)}]}}'
        )


def row(values: Sequence[float | None], digits: int) -> str:
    """Numbers as JSON, in as few digits as a picture needs; they are thousands, and must be fast."""
    return "[" + ",".join(["null" if value is None else f"{value:.{digits}g}" for value in values]) + "]"


def draw(chart: Chart, number: int) -> str:
    """The chart as a figure of HTML."""
    steps = [step for line in chart.lines for step in line.steps]
    values = [value for line in chart.lines for value in line.values if value is not None]
    left, right = widened(steps)
    low, high = widened(values)
    low, high = low - ROOM * (high - low), high + ROOM * (high - low)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - left) / (right - left)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - low) / (high - low)

    parts = [grid(chart, (left, right), (low, high), x, y)]
    for line in chart.lines:
        parts += curve(line, x, y)
    legend = "".join(
        f'<span class="key {line.style}">{escape(line.name)} <b>{last_of(chart, line)}</b></span>'
        for line in chart.lines
    )
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    kind = "chart wide" if chart.is_wide else "chart"
    return (
        f'<figure class="{kind}" data-chart="{number}"><figcaption>{escape(chart.title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">{"".join(parts)}</svg>'
        f'<div class="legend">{legend}</div>{note}</figure>'
    )


def grid(chart: Chart, across: tuple[float, float], up: tuple[float, float], x: Any, y: Any) -> str:
    """Lines and numbers behind the curves."""
    parts = []
    for tick in nice_ticks(*up):
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{written(tick, chart.unit)}</text>'
        )
    for tick in nice_ticks(*across, most=7):
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{written(tick, "")}</text>')
    for mark in chart.marks:
        if across[0] <= mark <= across[1]:
            parts.append(
                f'<line class="mark" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
                f"<title>resumed at update {written(mark, '')}</title></line>"
            )
    return "".join(parts)


def curve(line: Line, x: Any, y: Any) -> list[str]:
    """The pieces of a curve: it breaks off where there is no value."""
    pieces: list[list[str]] = [[]]
    dots = []
    for step, value in zip(*thin(line.steps, line.values, DRAWN), strict=True):
        if value is None:
            pieces.append([])
            continue
        pieces[-1].append(f"{x(step):.1f},{y(value):.1f}")
        if line.dots:
            dots.append(f'<circle class="{line.style}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.5"/>')
    color = f'class="{line.style}"'
    drawn = [f'<polyline {color} points="{" ".join(piece)}"/>' for piece in pieces if len(piece) > 1]
    lone = [piece[0].split(",") for piece in pieces if len(piece) == 1 and not line.dots]
    return [*drawn, *dots, *(f'<circle {color} cx="{at}" cy="{up}" r="2"/>' for at, up in lone)]


def last_of(chart: Chart, line: Line) -> str:
    """The last value of a curve, as the legend shows it."""
    found = [value for value in line.values if value is not None]
    return escape(written(found[-1], chart.unit)) if found else NOTHING


def written(value: float, unit: str) -> str:
    """A number with its unit."""
    return in_bytes(value) if unit == "bytes" else short(value)


def data_script(charts: Sequence[Chart]) -> str:
    """The numbers of all charts, for the page's script. No text in it can end the element."""
    data = f"[{','.join([chart.to_json() for chart in charts])}]"
    for letter in "<>&\u2028\u2029":
        data = data.replace(letter, f"\\u{ord(letter):04x}")
    return f'<script type="application/json" id="data">{data}</script>'
