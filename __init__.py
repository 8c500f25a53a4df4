"""stratagem: train one module under any distributed strategy and number format by changing one word."""

from .framework.arguments import FitArguments
from .framework.callbacks import Callback
from .framework.fit import Fit
from .framework.module import TrainModule
from .framework.state import Control, TrainOutput, TrainState

__all__ = ["Callback", "Control", "Fit", "FitArguments", "TrainModule", "TrainOutput", "TrainState"]
