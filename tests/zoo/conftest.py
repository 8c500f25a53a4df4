"""The zoo's ranks, its runs, and what they gave, which becomes the table of docs/models.md."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent / "distributed"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))

from ranks import Ranks  # noqa: E402 (found by the path above)
from table import RESULTS  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a run of the whole zoo replace the results that the documents show."""
    parser.addoption("--write-results", action="store_true", help="replace the zoo's results by this run's")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to write results from several processes, of which each knows its own part alone."""
    if config.getoption("--write-results") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--write-results takes one process: make test-zoo WORKERS=0 ARGS=--write-results")


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """Two processes over gloo, for the whole session."""
    ranks = Ranks(2)
    yield ranks
    ranks.end()


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, Any]]]:
    """Family to column to what was found."""
    found: dict[str, dict[str, Any]] = {}
    yield found
    if request.config.getoption("--write-results"):
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        for family, row in found.items():
            before[family] = {**before.get(family, {}), **row}
        RESULTS.write_text(json.dumps(before, indent=1, sort_keys=True) + "\n")
