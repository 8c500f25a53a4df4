"""A sweep over learning rates: the loss while the rate rises from update to update, and the rate that it suggests.

Smith, "Cyclical Learning Rates for Training Neural Networks" (2017), section 3.3.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor

from ..arguments import FitArguments
from ..callbacks import Callback
from ..state import Control, TrainState

WIDTH = 0.05  # of the bell that smooths the curve, as a part of its updates
MEMORY = 0.8  # of the running mean by which the sweep sees that the loss diverges


@dataclass(frozen=True)
class LearningRates:
    """What ``fit.find_learning_rate`` returns, the same on every rank.

    Attributes:
        rates: the learning rates, ascending, one an update.
        losses: the loss of each update, before its step; the last ones may not be finite.
        diverged: whether the loss did, which ended the sweep.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    diverged: bool

    @property
    def smoothed(self) -> tuple[float, ...]:
        """The losses, each a mean over its neighbours by a bell curve, which moves nothing to either side. Losses that
        diverge, or aren't finite, count as the highest before.
        """
        losses = numpy.array(self.losses)
        first = max(1, len(losses) // 10)
        highest = numpy.max(losses[:first][numpy.isfinite(losses[:first])], initial=-math.inf)
        if not math.isfinite(highest):
            return self.losses
        losses = numpy.minimum(numpy.nan_to_num(losses, nan=highest, posinf=highest, neginf=highest), highest)
        places = numpy.arange(len(losses))
        bells = numpy.exp(-0.5 * ((places[:, None] - places) / max(1.5, WIDTH * len(losses))) ** 2)
        return tuple(float(each) for each in bells @ losses / bells.sum(axis=1))

    @property
    def suggestion(self) -> float | None:
        """The rate at which the smoothed loss falls fastest, over the logarithm of the rate; None where it never falls.
        A peak to begin with, for a schedule that warms up to it. The first tenth of the updates, whose rates are meant
        to be too low, isn't looked at.
        """
        smoothed = numpy.array(self.smoothed)
        if len(smoothed) < 3 or not numpy.isfinite(smoothed).all():
            return None
        slopes = numpy.gradient(smoothed, numpy.log(self.rates))
        first = len(smoothed) // 10
        lowest = first + int(numpy.argmin(smoothed[first:]))
        steepest = first + int(numpy.argmin(slopes[first : lowest + 1]))
        return self.rates[steepest] if slopes[steepest] < 0 else None

    def plot(self, path: str | Path) -> Path:
        """Draw the losses over the rates, with the suggestion, as a picture. Needs matplotlib (the extra ``plots``).

        Args:
            path: of the picture, whose ending says the format: "rates.png".

        Returns:
            The path.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        path = Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        FigureCanvasAgg(figure)  # opens no window, and changes no setting of pyplot's
        axes = figure.add_subplot()
        axes.plot(self.rates, self.losses, color="#9aa5b1", linewidth=1.0, label="loss")
        axes.plot(self.rates, self.smoothed, color="#1f5fa8", linewidth=2.0, label="smoothed")
        if (rate := self.suggestion) is not None:
            at = self.smoothed[self.rates.index(rate)]
            axes.axvline(rate, color="#c2410c", linewidth=1.0, linestyle="--")
            axes.plot([rate], [at], "o", color="#c2410c", label=f"suggestion {rate:.2g}")
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        low, high = min(finite), max(self.smoothed)
        margin = 0.15 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + 2 * margin)  # a loss that diverges leaves the picture, not the rest flat
        axes.set_xscale("log")
        axes.set(xlabel="learning rate", ylabel="training loss")
        axes.grid(alpha=0.25)
        axes.legend(loc="lower left")
        figure.savefig(path, dpi=150)
        return path


class RateSweep(Callback):
    """Raises the learning rate from update to update, notes each update's loss, and stops where it diverges.

    Every rank has one: the losses that they are told are means over all ranks, and so they decide alike.

    Args:
        lowest, highest: the rates of the first and of the last update, for a group of parameters that has the
            arguments' ``learning_rate``. Other groups keep their ratio to it.
        updates: how many.
        diverged: how many times the lowest running mean of the loss is too much.
    """

    def __init__(self, lowest: float, highest: float, updates: int, diverged: float) -> None:
        self.lowest, self.highest, self.updates, self.diverged = lowest, highest, updates, diverged
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.ratios: list[float] = []
        self.rate = lowest
        self.mean, self.best = 0.0, math.inf
        self.has_diverged = False

    def on_train_begin(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Note how the groups' rates are related."""
        self.ratios = [float(group["lr"]) / args.learning_rate for group in fit.optimizer.param_groups]

    def on_step_begin(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Set the update's rate."""
        self.rate = self.lowest * (self.highest / self.lowest) ** (state.global_step / (self.updates - 1))
        for group, ratio in zip(fit.optimizer.param_groups, self.ratios, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.rate * ratio)
            else:
                group["lr"] = self.rate * ratio

    def on_log(
        self, args: FitArguments, state: TrainState, control: Control, *, logs: Mapping[str, float], **context: Any
    ) -> None:
        """Note the update's loss, and stop where it diverges."""
        if "loss" not in logs or "learning_rate" not in logs:  # no item counted, or the totals at the end
            return
        loss = logs["loss"]
        self.rates.append(self.rate)
        self.losses.append(loss)
        self.mean = MEMORY * self.mean + (1.0 - MEMORY) * loss
        mean = self.mean / (1.0 - MEMORY ** len(self.losses))
        self.best = min(self.best, mean)
        if not math.isfinite(loss) or mean > self.best + (self.diverged - 1.0) * abs(self.best):
            self.has_diverged = True
            control.should_training_stop = True

    def found(self) -> LearningRates:
        """What the sweep has found."""
        return LearningRates(tuple(self.rates), tuple(self.losses), self.has_diverged)


def sweep_arguments(args: FitArguments, updates: int) -> FitArguments:
    """The arguments of a sweep: those of the run, but for its length, and for what is logged, evaluated and saved."""
    return args.replace(
        max_steps=updates,
        max_time=None,
        fast_dev_run=0,
        auto_find_batch_size=False,
        learning_rate=args.learning_rate or 1.0,
        lr_scheduler_type="constant",
        lr_scheduler_kwargs={},
        warmup_steps=0,
        warmup_ratio=0.0,
        nonfinite_updates="skip",
        spike_updates=None,
        max_skipped_updates=updates,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        eval_steps=None,
        eval_delay=0,
        eval_on_start=False,
        metric_for_best_model=None,
        greater_is_better=None,
        load_best_model_at_end=False,
        save_strategy="no",
        save_on_exception=False,
        report=False,
        requeue=False,
        debug="",
        progress=False,
    )


def check_sweep(lowest: float, highest: float, updates: int, diverged: float) -> None:
    """Refuse a sweep that can't be made.

    Raises:
        ValueError: names what can't work, and what to write instead.
    """
    if not 0.0 < lowest < highest < math.inf:
        raise ValueError(f"A sweep goes up from min to max, both above 0. Received: min={lowest!r}, max={highest!r}")
    if type(updates) is not int or updates < 10:
        raise ValueError(f"updates={updates!r}: a curve takes at least 10 updates.")
    if not diverged > 1.0:
        raise ValueError(f"diverged={diverged!r}: how many times the lowest loss is too much; above 1.")
