"""stratagem: train one module under any distributed strategy and number format by changing one word.

Strategies are classes of ``stratagem.strategies``, precisions of ``stratagem.precision``; all else that a program names
is here.
"""

from typing import TYPE_CHECKING

from .framework.arguments import FitArguments
from .framework.callbacks import Callback
from .framework.fit import Fit
from .framework.module import TrainModule
from .framework.state import Control, TrainOutput, TrainState
from .framework.watch.endings import AnotherRankFailed, Interrupted
from .precision.names import lazy_exports

if TYPE_CHECKING:
    from .framework.builtin_callbacks import EarlyStopping, EmptyCache, FirstStepTime, LearningRateMonitor, Throughput
    from .framework.loggers import Logger
    from .framework.loggers.json_lines import JsonLinesLogger
    from .framework.loggers.tensorboard import TensorBoardLogger
    from .framework.predictions import PredictionWriter, iterate_predictions, read_predictions
    from .framework.profiling import SimpleProfiler, TorchProfiler
    from .framework.uploading import Upload

__all__ = [
    "AnotherRankFailed",
    "Callback",
    "Control",
    "EarlyStopping",
    "EmptyCache",
    "FirstStepTime",
    "Fit",
    "FitArguments",
    "Interrupted",
    "JsonLinesLogger",
    "LearningRateMonitor",
    "Logger",
    "PredictionWriter",
    "SimpleProfiler",
    "TensorBoardLogger",
    "Throughput",
    "TorchProfiler",
    "TrainModule",
    "TrainOutput",
    "TrainState",
    "Upload",
    "iterate_predictions",
    "read_predictions",
]

# Imported when first used: a name costs nothing that a program doesn't ask for.
FILES = {
    **dict.fromkeys(
        ("EarlyStopping", "EmptyCache", "FirstStepTime", "LearningRateMonitor", "Throughput"),
        "framework.builtin_callbacks",
    ),
    "JsonLinesLogger": "framework.loggers.json_lines",
    "Logger": "framework.loggers",
    **dict.fromkeys(("PredictionWriter", "iterate_predictions", "read_predictions"), "framework.predictions"),
    **dict.fromkeys(("SimpleProfiler", "TorchProfiler"), "framework.profiling"),
    "TensorBoardLogger": "framework.loggers.tensorboard",
    "Upload": "framework.uploading",
}

__getattr__, __dir__ = lazy_exports(__name__, FILES)
