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
from .framework.turns import Turn
from .framework.watch.endings import AnotherRankFailed, Interrupted
from .precision.names import lazy_exports

if TYPE_CHECKING:
    from .framework.averaging import Average
    from .framework.builtin_callbacks import (
        EarlyStopping,
        EmptyCache,
        FirstStepTime,
        GradientHistograms,
        LearningRateMonitor,
        Throughput,
    )
    from .framework.configuration.command_line import configure
    from .framework.loggers import Logger
    from .framework.loggers.comet import CometLogger
    from .framework.loggers.csv import CSVLogger
    from .framework.loggers.json_lines import JsonLinesLogger
    from .framework.loggers.mlflow import MlflowLogger
    from .framework.loggers.tensorboard import TensorBoardLogger
    from .framework.loggers.trackio import TrackioLogger
    from .framework.loggers.wandb import WandbLogger
    from .framework.predictions import PredictionWriter, iterate_predictions, read_predictions
    from .framework.profiling import SimpleProfiler, TorchProfiler
    from .framework.uploading import Upload
    from .framework.version import __version__ as __version__
    from .framework.weights.converting import convert
    from .precision.frozen import frozen
    from .strategies.sent import launch

__all__ = [
    "AnotherRankFailed",
    "Average",
    "CSVLogger",
    "Callback",
    "CometLogger",
    "Control",
    "EarlyStopping",
    "EmptyCache",
    "FirstStepTime",
    "Fit",
    "FitArguments",
    "GradientHistograms",
    "Interrupted",
    "JsonLinesLogger",
    "LearningRateMonitor",
    "Logger",
    "MlflowLogger",
    "PredictionWriter",
    "SimpleProfiler",
    "TensorBoardLogger",
    "Throughput",
    "TorchProfiler",
    "TrackioLogger",
    "TrainModule",
    "TrainOutput",
    "TrainState",
    "Turn",
    "Upload",
    "WandbLogger",
    "configure",
    "convert",
    "frozen",
    "iterate_predictions",
    "launch",
    "read_predictions",
]

# Imported when first used: a name costs nothing that a program doesn't ask for.
FILES = {
    "Average": "framework.averaging",
    **dict.fromkeys(
        ("EarlyStopping", "EmptyCache", "FirstStepTime", "GradientHistograms", "LearningRateMonitor", "Throughput"),
        "framework.builtin_callbacks",
    ),
    "CSVLogger": "framework.loggers.csv",
    "CometLogger": "framework.loggers.comet",
    "JsonLinesLogger": "framework.loggers.json_lines",
    "Logger": "framework.loggers",
    "MlflowLogger": "framework.loggers.mlflow",
    **dict.fromkeys(("PredictionWriter", "iterate_predictions", "read_predictions"), "framework.predictions"),
    **dict.fromkeys(("SimpleProfiler", "TorchProfiler"), "framework.profiling"),
    "TensorBoardLogger": "framework.loggers.tensorboard",
    "TrackioLogger": "framework.loggers.trackio",
    "Upload": "framework.uploading",
    "WandbLogger": "framework.loggers.wandb",
    "__version__": "framework.version",
    "configure": "framework.configuration.command_line",
    "convert": "framework.weights.converting",
    "frozen": "precision.frozen",
    "launch": "strategies.sent",
}

__getattr__, __dir__ = lazy_exports(__name__, FILES)
