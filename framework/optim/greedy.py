"""GreedyLR, a schedule whose learning rate grows while a metric improves, and shrinks while it doesn't."""

from collections import deque
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class GreedyLR(LRScheduler):
    """Divides the learning rate by ``factor`` after ``patience`` improvements of a metric in a row, and multiplies it
    after as many failures ("GreedyLR: A Novel Adaptive Learning Rate Scheduler", 2025); options as in transformers.

    Args:
        optimizer: the learning rates of its groups are the first ones.
        mode: "min" where less of the metric is better, else "max".
        factor: what the learning rate is multiplied by, or divided by; below 1.
        patience: how many improvements, or failures, in a row change nothing yet.
        threshold: an improvement by no more than this counts as a failure.
        threshold_mode: whether ``threshold`` is a difference ("abs"), or a part of the best value ("rel").
        cooldown, warmup: how many evaluations are passed over after a decrease, and after an increase.
        min_lr, max_lr: the bounds of the learning rate.
        eps: a change of the learning rate by no more than this isn't made.
        smooth: judge the mean over the last ``window_size`` values.
        window_size: see ``smooth``.
        reset_start: how many decreases at the lower bound end in the first learning rates again.

    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        mode: str = "min",
        factor: float = 0.95,
        patience: int = 10,
        threshold: float = 1e-6,
        threshold_mode: str = "abs",
        cooldown: int = 0,
        warmup: int = 0,
        min_lr: float = 1e-3,
        max_lr: float = 1.0,
        eps: float = 1e-8,
        smooth: bool = False,
        window_size: int = 50,
        reset_start: int = 500,
    ) -> None:
        if mode not in ("min", "max") or threshold_mode not in ("rel", "abs") or not 0.0 < factor < 1.0:
            raise ValueError(
                "greedy takes mode 'min' or 'max', threshold_mode 'rel' or 'abs', and a factor between 0 and 1. "
                f"Received: mode={mode!r}, threshold_mode={threshold_mode!r}, factor={factor!r}"
            )
        self.optimizer = optimizer
        self.sign = 1.0 if mode == "min" else -1.0
        self.factor, self.patience, self.eps = factor, patience, eps
        self.threshold, self.relative = threshold, threshold_mode == "rel"
        self.cooldown, self.warmup = cooldown, warmup
        self.min_lr, self.max_lr = min_lr, max_lr
        self.smooth, self.window_size, self.reset_start = smooth, window_size, reset_start
        self.first_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.last_epoch = 0
        self._last_lr = list(self.first_rates)
        self.begin_again()

    def begin_again(self) -> None:
        """Forget all values of the metric."""
        self.best: float | None = None
        self.good = self.bad = self.passed_over = 0
        self.resets_in = self.reset_start
        self.window: deque[float] = deque(maxlen=self.window_size)

    def step(self, metrics: float) -> None:  # type: ignore[override]
        """Take in a value of the metric, and change the learning rate where it is time to."""
        value = float(metrics)
        if self.smooth:
            self.window.append(value)
            value = sum(self.window) / len(self.window)
        self.last_epoch += 1
        if self.passed_over:
            self.passed_over -= 1
            self.good = self.bad = 0
        else:
            if self.is_better(value):
                self.best, self.good, self.bad = value, self.good + 1, 0
            else:
                self.good, self.bad = 0, self.bad + 1
            if self.good > self.patience:
                self.increase()
            elif self.bad > self.patience:
                self.decrease()
        self._last_lr = [float(group["lr"]) for group in self.optimizer.param_groups]

    def is_better(self, value: float) -> bool:
        """Return whether a value is better than the best one by more than the threshold."""
        if self.best is None:
            return True
        margin = self.threshold * self.best if self.relative else self.threshold
        return self.sign * value < self.sign * self.best - margin

    def increase(self) -> None:
        """Raise the learning rates, up to the upper bound."""
        for group in self.optimizer.param_groups:
            rate = min(float(group["lr"]) / self.factor, self.max_lr)
            if rate - float(group["lr"]) > self.eps:
                group["lr"] = rate
        self.good, self.passed_over, self.resets_in = 0, self.warmup, self.reset_start

    def decrease(self) -> None:
        """Lower the learning rates, down to the bound; after ``reset_start`` times there, go back to the first ones."""
        for group in self.optimizer.param_groups:
            rate = max(float(group["lr"]) * self.factor, self.min_lr)
            if float(group["lr"]) - rate > self.eps:
                group["lr"] = rate
        self.bad, self.passed_over = 0, self.cooldown
        if all(float(group["lr"]) <= self.min_lr for group in self.optimizer.param_groups):
            self.resets_in -= 1
            if self.resets_in <= 0:
                for group, rate in zip(self.optimizer.param_groups, self.first_rates, strict=True):
                    group["lr"] = rate
                self.begin_again()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds, in JSON types. The options aren't in it: they are arguments of the run."""
        kept = ("best", "good", "bad", "passed_over", "resets_in", "last_epoch", "_last_lr", "first_rates")
        return {**{name: getattr(self, name) for name in kept}, "window": list(self.window)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state. The learning rates are in the state of the optimizer."""
        self.__dict__.update({**state_dict, "window": deque(state_dict["window"], maxlen=self.window_size)})
