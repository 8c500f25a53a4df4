"""The documents say what the code says."""

import dataclasses
import inspect
import json
import re
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from stratagem import Fit, FitArguments, TrainModule
from stratagem.framework import loop
from stratagem.framework.arguments_table import arguments_table
from stratagem.framework.builtin_callbacks import EarlyStopping
from stratagem.framework.callbacks import EVENTS
from stratagem.framework.state import FLAGS
from stratagem.strategies.matrix_page import page

DOCUMENTS = Path(__file__).parents[2] / "docs"
LOOP = (DOCUMENTS / "loop.md").read_text()
# The names of the right column: transformers' and Lightning's are not ours to check.
COMING_FROM = [
    line.split(" | ")[-1]
    for line in (DOCUMENTS / "coming_from.md").read_text().partition("\n## Every argument")[0].splitlines()
    if " | " in line
]


def test_the_table_of_arguments_is_current() -> None:
    assert (DOCUMENTS / "arguments.md").read_text() == arguments_table()


def test_the_table_of_families_is_current() -> None:
    spec = spec_from_file_location("table", DOCUMENTS.parent / "tests" / "zoo" / "table.py")
    assert spec is not None and spec.loader is not None
    table = module_from_spec(spec)
    spec.loader.exec_module(table)
    results = json.loads(table.RESULTS.read_text())
    assert len(results) >= 30
    assert (DOCUMENTS / "models.md").read_text() == table.document_with(table.render(results))


def test_the_page_of_precisions_is_current() -> None:
    assert (DOCUMENTS / "precision.md").read_text() == page()


def test_the_order_of_events_is_the_loops() -> None:
    order = inspect.cleandoc(loop.train.__doc__ or "").split("::\n\n")[1].split("\n\nNothing in here")[0]
    assert LOOP.split("```\n")[1] == inspect.cleandoc("\n" + order) + "\n"


def test_every_event_is_in_the_order_of_events() -> None:
    # The others belong to a Fit, an evaluation, a prediction and a failure, which are no part of the order.
    outside = {"on_init_end", "on_prediction_step", "on_predict", "on_exception"}
    assert set(re.findall(r"on_[a-z_]+", LOOP.split("```\n")[1])) == (set(EVENTS) - outside) | {"on_start"}


def test_every_flag_is_in_the_table_of_flags() -> None:
    table = LOOP.partition("## Flags")[2].partition("## When")[0]
    assert set(re.findall(r"should_[a-z_]+", table)) == set(FLAGS)


def names(pattern: str) -> list[str]:
    """What matches in the right column of the table of names."""
    found = sorted({name for cell in COMING_FROM for name in re.findall(pattern, cell)})
    assert found
    return found


def test_arguments_that_others_are_mapped_to_are_there() -> None:
    taken = {field.name for field in dataclasses.fields(FitArguments)}
    for function in (Fit.__init__, Fit.train, Fit.predict, EarlyStopping.__init__, TrainModule.log):
        taken |= set(inspect.signature(function).parameters)
    assert [name for name in names(r"\b(\w+)=") if name not in taken] == []


@pytest.mark.parametrize(("prefix", "owner"), [("TrainModule", TrainModule), ("fit", Fit)])
def test_methods_that_others_are_mapped_to_are_there(prefix: str, owner: type) -> None:
    assert [name for name in names(rf"\b{prefix}\.(\w+)") if not hasattr(owner, name)] == []


def test_modules_that_others_are_mapped_to_are_there() -> None:
    for path in names(r"\b(stratagem\.[\w.]+)\("):
        module, _, name = path.rpartition(".")
        assert hasattr(import_module(module), name), path


def test_files_that_are_linked_are_there() -> None:
    for document in DOCUMENTS.glob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not link.startswith("https://"):
                assert (document.parent / link).exists(), f"{document.name}: {link}"
