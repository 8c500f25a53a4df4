"""Callbacks for common needs: early stopping, monitors of rates and gradients, emptying of caches."""

import time
from collections.abc import Mapping
from typing import Any

import torch

from .arguments import FitArguments
from .callbacks import Callback
from .measures.best import chosen_metric, is_better
from .state import Control, TrainState


class EarlyStopping(Callback):
    """Stops training when ``metric_for_best_model`` hasn't improved for some evaluations in a row.

    Args:
        patience: evaluations without improvement after which training stops.
        threshold: an improvement by no more than this doesn't count.

    Example:
        ``Fit(..., metric_for_best_model="accuracy", callbacks=[EarlyStopping(patience=3)])``
    """

    def __init__(self, patience: int = 1, threshold: float = 0.0) -> None:
        if patience < 1:
            raise ValueError(f"patience counts evaluations and must be at least 1. Received: {patience}")
        self.patience = patience
        self.threshold = threshold
        self.best: float | None = None
        self.without_improvement = 0

    def on_train_begin(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Refuse a run that never evaluates, and forget earlier evaluations unless the run is resumed."""
        if args.eval_strategy == "no":
            raise ValueError("EarlyStopping needs evaluations to judge by. Set eval_strategy to 'steps' or 'epoch'.")
        if state.global_step == 0:
            self.best, self.without_improvement = None, 0

    def on_evaluate(
        self, args: FitArguments, state: TrainState, control: Control, *, metrics: Mapping[str, float], **context: Any
    ) -> None:
        """Count evaluations without improvement, and ask to stop after ``patience`` of them."""
        value = chosen_metric(args, metrics)
        if is_better(args, value, self.best, by=self.threshold):
            self.best, self.without_improvement = value, 0
        else:
            self.without_improvement += 1
            if self.without_improvement >= self.patience:
                control.stop_training(self.reason(args))

    def reason(self, args: FitArguments) -> str:
        """Say why training is stopped."""
        count, by = self.without_improvement, f" by more than {self.threshold:g}" if self.threshold else ""
        evaluations = f"{count} evaluation{'s' * (count != 1)}"
        return f"{args.best_metric} hasn't improved{by} in {evaluations} (best {self.best:.4g})"

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, and the number of evaluations without improvement since."""
        return {"best": self.best, "without_improvement": self.without_improvement}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from a saved state."""
        self.best, self.without_improvement = state["best"], state["without_improvement"]


class LearningRateMonitor(Callback):
    """Logs the learning rate of every parameter group, as ``learning_rate_group_<i>``."""

    def on_log(
        self,
        args: FitArguments,
        state: TrainState,
        control: Control,
        *,
        fit: Any,
        logs: dict[str, float],
        **context: Any,
    ) -> None:
        """Add the learning rates to a training log."""
        if "learning_rate" in logs:
            for index, group in enumerate(fit.optimizer.param_groups):
                logs[f"learning_rate_group_{index}"] = float(group["lr"])


class Throughput(Callback):
    """Logs items and updates per second since the last log; the time of evaluations and checkpoints is left out."""

    def on_train_begin(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Start the clock."""
        self.seconds = 0.0
        self.since: float | None = time.perf_counter()  # when the clock was started; None while it is stopped
        self.steps, self.items = state.global_step, state.items_seen

    def on_step_begin(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Start the clock again where a log, and what followed it, stopped it."""
        if self.since is None:
            self.since = time.perf_counter()

    def on_log(
        self,
        args: FitArguments,
        state: TrainState,
        control: Control,
        *,
        fit: Any,
        logs: dict[str, float],
        **context: Any,
    ) -> None:
        """Add both rates to a training log. Its numbers were read from the device, so the updates are really done."""
        now = time.perf_counter()
        if self.since is not None:
            self.seconds += now - self.since
            self.since = None
        if "loss" in logs and self.seconds:
            name = getattr(fit.module, "item_name", "samples")
            logs["steps_per_second"] = (state.global_step - self.steps) / self.seconds
            logs[f"{name}_per_second"] = (state.items_seen - self.items) / self.seconds
            self.seconds, self.steps, self.items = 0.0, state.global_step, state.items_seen


class FirstStepTime(Callback):
    """Adds to the first training log how long the first update took: with ``torch_compile``, mostly compilation.

    Args:
        updates: that are timed, from the first on, where more than one compile something.
    """

    def __init__(self, updates: int = 1) -> None:
        self.updates = updates

    def on_train_begin(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Forget the time of an earlier run's first update."""
        self.first = state.global_step
        self.seconds: float | None = None

    def on_step_begin(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Start the clock."""
        if state.global_step == self.first:
            self.began = time.perf_counter()

    def on_optimizer_step(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Stop the clock. Compilation runs on the host, so there is no need to wait for the device."""
        if state.global_step == self.first + self.updates - 1:
            self.seconds = time.perf_counter() - self.began

    def on_log(
        self, args: FitArguments, state: TrainState, control: Control, *, logs: dict[str, float], **context: Any
    ) -> None:
        """Add the time of the first update to the first training log."""
        if self.seconds is not None and "loss" in logs:
            logs["first_step_seconds"] = self.seconds
            self.seconds = None


class GradientHistograms(Callback):
    """Shows how the gradients of each parameter are spread, in loggers that can show histograms.

    They are counted on the device, and read at an update that is logged anyway, where the host waits for the device as
    it is. Gradients are clipped by then, where they are clipped.

    Args:
        every: updates from one to the next; the first log after so many shows them.
        bins: of a histogram.
    """

    def __init__(self, every: int = 100, bins: int = 32) -> None:
        if every < 1 or bins < 1:
            raise ValueError(f"every and bins must be at least 1. Received: every={every}, bins={bins}")
        self.every, self.bins = every, bins
        self.shown_at = 0

    def on_train_begin(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Refuse a run whose gradients no rank holds whole, or that isn't logged by updates."""
        kinds = fit.strategy.parameter_kinds()
        if kinds != {"whole"}:
            raise ValueError(
                f"GradientHistograms reads whole gradients, and strategy={fit.strategy.name!r} leaves each rank a part "
                f"of them ({', '.join(sorted(kinds))}). Leave it out, or use strategy='ddp'."
            )
        if args.logging_strategy != "steps":
            raise ValueError(
                f"GradientHistograms goes by the logs of updates, and logging_strategy={args.logging_strategy!r}. "
                "Write logging_strategy='steps'."
            )
        self.shown_at = state.global_step

    def on_pre_optimizer_step(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Count, where the update is logged."""
        update = state.global_step + 1
        if update - self.shown_at < self.every or update % args.logging_steps or not fit.strategy.is_main:
            return
        self.shown_at = update
        for name, parameter in fit.strategy.named_parameters().items():
            if parameter.grad is None or parameter.grad.is_complex():
                continue
            values = parameter.grad.detach().float().flatten()
            values = values[values.isfinite()]
            if len(values):
                least, most = values.min().item(), values.max().item()
                counts = torch.histc(values, self.bins, least, most)
                edges = torch.linspace(least, most, self.bins + 1)
                fit.loggers.histogram(f"gradients/{name}", (counts, edges), update)


class EmptyCache(Callback):
    """Gives cached memory back to the accelerator every few updates, which is slower, for models that barely fit.

    Args:
        steps: updates from one emptying to the next.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Empty the cache where the update is a multiple of ``steps``."""
        if state.global_step % self.steps == 0 and torch.accelerator.is_available():
            torch.accelerator.memory.empty_cache()


class LogBatchSize(Callback):
    """Logs a batch size that was found, once, when the first epoch that is trained with it begins."""

    def on_epoch_begin(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Log the batch size, unless the run that is resumed has logged it."""
        size = state.train_batch_size
        if size is not None and all(log.get("per_device_train_batch_size") != size for log in state.log_history):
            sizes = {
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": args.gradient_accumulation_steps,
            }
            fit.log(sizes)
