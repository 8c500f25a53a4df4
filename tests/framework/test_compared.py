"""docs/compared.md says of each row how it was tried, and of each column which version was looked at."""

import re
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "docs" / "compared.md").read_text(encoding="utf-8").splitlines()
TABLES = [number for number, line in enumerate(LINES) if line.startswith("| | stratagem")]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def rows(table: int) -> list[list[str]]:
    """The cells of the rows of the table whose header is in this line."""
    found = []
    for line in LINES[table + 2 :]:
        if not line.startswith("|"):
            break
        found.append(cells(line))
    return found


ROWS = [row for table in TABLES for row in rows(table)]


def trials() -> set[str]:
    """The names of the trials of benchmarks/compared/trials.py, which imports its neighbour."""
    folder = ROOT / "benchmarks" / "compared"
    sys.path.insert(0, str(folder))
    try:
        spec = spec_from_file_location("trials", folder / "trials.py")
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return set(module.TRIALS)


def test_each_column_has_its_version() -> None:
    assert len(TABLES) == 2
    lines = (ROOT / "constraints.txt").read_text().splitlines()  # the newest one comes first
    pinned = [next(line for line in lines if line.startswith(f"{name}==")) for name in ("transformers", "accelerate")]
    versions = [line.partition(";")[0].replace("==", " ").strip() for line in pinned]
    for table in TABLES:
        header = cells(LINES[table])
        assert all(re.search(r" \d+\.\d+", name) for name in header[1:-1])
        assert ", ".join(versions) in header


def test_each_row_has_a_cell_for_each_column_and_says_how_it_was_tried() -> None:
    assert len(ROWS) > 40
    for row in ROWS:
        assert len(row) == 7 and all(row), row[0]
        assert re.match(r"(run|read): \S", row[-1]), row[0]


def test_trials_that_are_named_are_there() -> None:
    named = {row[-1].partition(";")[0].removeprefix("run: ") for row in ROWS if row[-1].startswith("run: ")}
    assert named == trials()


def test_files_that_were_read_are_there() -> None:
    # Of the packages that the tests are run with; Lightning, torchtitan and Composer aren't among them.
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package)
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None
        for path in {path for row in ROWS for path in re.findall(rf"`({package}/[\w./]+)`", row[-1])}:
            assert (Path(spec.origin).parents[1] / path).exists(), path
