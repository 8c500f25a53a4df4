"""Ranks for the tests in here, started when a test first asks for them and shared by the whole session."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Test files share models by ``from models import ...``, and the ranks import the test files themselves.
for folder in (Path(__file__).parent.parent, Path(__file__).parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))

from ranks import Ranks  # noqa: E402 (found by the path above)

HERE = Path(__file__).parent
LONG_IMPORTS = "deepspeed"  # on each rank


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what has more ranks than a small machine has cores, and what a rank imports for seconds."""
    for item in items:
        parameters = item.callspec.params if HERE in item.path.parents and hasattr(item, "callspec") else {}
        if parameters.get("world", 2) > 2 or str(parameters.get("strategy", "")).startswith(LONG_IMPORTS):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def ranks() -> Iterator[dict[int, Ranks]]:
    """World size to its ranks: ``ranks[2].run(job, **options)``."""
    worlds = {world_size: Ranks(world_size) for world_size in (1, 2, 3, 4)}
    yield worlds
    for world in worlds.values():
        world.end()
