"""The documents say what the code says."""

import inspect
from pathlib import Path

from stratagem.framework import loop
from stratagem.framework.arguments_table import arguments_table

DOCUMENTS = Path(__file__).parents[2] / "docs"


def test_the_table_of_arguments_is_current() -> None:
    assert (DOCUMENTS / "arguments.md").read_text() == arguments_table()


def test_the_order_of_events_is_the_loops() -> None:
    told = (DOCUMENTS / "loop.md").read_text()
    order = inspect.cleandoc(loop.run.__doc__ or "").split("::\n\n")[1].split("\n\nNothing in here")[0]
    for line in inspect.cleandoc("\n" + order).splitlines():
        assert line in told, line
