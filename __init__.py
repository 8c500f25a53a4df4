"""stratagem: train one module under any distributed strategy and number format by changing one word.

Strategies are classes of ``stratagem.strategies``, precisions of ``stratagem.precision``; all else that a program names
is here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .framework.arguments import FitArguments
from .framework.callbacks import Callback
from .framework.fit import Fit
from .framework.module import TrainModule
from .framework.state import Control, TrainOutput, TrainState

if TYPE_CHECKING:
    from .framework.builtin_callbacks import EarlyStopping, EmptyCache, FirstStepTime, LearningRateMonitor, Throughput
    from .framework.loggers import Logger
    from .framework.loggers.json_lines import JsonLinesLogger
    from .framework.loggers.tensorboard import TensorBoardLogger
    from .framework.uploading import Upload

__all__ = [
    "Callback",
    "Control",
    "EarlyStopping",
    "EmptyCache",
    "FirstStepTime",
    "Fit",
    "FitArguments",
    "JsonLinesLogger",
    "LearningRateMonitor",
    "Logger",
    "TensorBoardLogger",
    "Throughput",
    "TrainModule",
    "TrainOutput",
    "TrainState",
    "Upload",
]

# Imported when first used: a name costs nothing that a program doesn't ask for.
FILES = {
    **dict.fromkeys(
        ("EarlyStopping", "EmptyCache", "FirstStepTime", "LearningRateMonitor", "Throughput"),
        "framework.builtin_callbacks",
    ),
    "JsonLinesLogger": "framework.loggers.json_lines",
    "Logger": "framework.loggers",
    "TensorBoardLogger": "framework.loggers.tensorboard",
    "Upload": "framework.uploading",
}


def __getattr__(name: str) -> Any:
    """Import the class of that name from its file."""
    if name not in FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{FILES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
