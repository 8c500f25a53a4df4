"""The table of docs/models.md, made from the zoo's results: ``python tests/zoo/table.py`` writes it."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.json"
DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- the zoo's table begins -->", "<!-- the zoo's table ends -->"
COLUMNS = (
    "ddp",
    "fsdp1",
    "fsdp2",
    "ZeRO 3",
    "tp",
    "bf16-mixed",
    "gradient_checkpointing",
    "torch_compile",
    "resume",
    "reload",
)


def cell(value: Any) -> str:
    """A result as text: a difference by its power of ten, a dash where nothing was tried."""
    if value is None:
        return "\u2013"
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-").replace("e+00", "")
    return str(value)


def render(results: dict[str, dict[str, Any]]) -> str:
    """The whole table."""
    head = f"| family | {' | '.join(f'`{name}`' for name in COLUMNS)} |"
    rule = "|---" * (len(COLUMNS) + 1) + "|"
    rows = [
        f"| {family} | {' | '.join(cell(row.get(name)) for name in COLUMNS)} |"
        for family, row in sorted(results.items())
    ]
    return "\n".join([head, rule, *rows])


def document_with(table: str) -> str:
    """The document with that table in its place."""
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    DOCUMENT.write_text(document_with(render(json.loads(RESULTS.read_text()))))
