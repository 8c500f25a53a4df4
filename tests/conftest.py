"""What every test runs under: one thread, a directory of its own, and the small models and data of ``tiny.py``."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from stratagem import Fit, TrainModule

# transformers and peft read these when they are imported, on ranks too.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

# --import-mode=importlib leaves sys.path alone; test files share models and data by ``from tiny import ...``.
sys.path.insert(0, str(Path(__file__).parent))

from tiny import MakeFit

# An example that takes long on a machine that does other things, too, is no failure.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

collect_ignore = [] if find_spec("torch_xla") else ["xla"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the zoo out where it isn't asked for: it has packages and a command of its own (make test-zoo)."""
    return True if collection_path.name == "zoo" and not any("zoo" in str(arg) for arg in config.args) else None


def pytest_report_header() -> str:
    """Say what isn't run here."""
    return "tests/xla: needs torch_xla, which isn't installed here; make test-xla runs it" if collect_ignore else ""


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny models gain nothing from threads, and runs that are compared bit by bit must add in one order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same random numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def make_fit(tmp_path: Path) -> MakeFit:
    """Makes a Fit that is silent, writes only below the test's directory, and keeps the data's order and learning rate.

    Its ``output_dir`` is ``tmp_path / "output"``.
    """

    def make(module: TrainModule, train_data: Any = None, eval_data: Any = None, **arguments: Any) -> Fit:
        quiet: dict[str, Any] = {
            "output_dir": str(tmp_path / "output"),
            "progress": False,
            "report": False,
            "loggers": (),
            "save_strategy": "no",
            "shuffle": False,
            "lr_scheduler_type": "constant",
            "learning_rate": 0.1,
            "max_grad_norm": 0.0,
        }
        return Fit(module, train_data, eval_data, **{**quiet, **arguments})

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: what is broken for everybody shows within a minute."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
