"""A run's numbers: the means of each log, and the totals at the end."""

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from .averages import mean_of_finite
from .flops import device_name, peak_flops
from .state import TrainState

if TYPE_CHECKING:
    from .fit import Fit


def book(fit: "Fit") -> dict[str, float] | None:
    """Means over the updates since the last log; they, items and tokens are added to the run's totals. None where no
    update was made; without a loss where none of them had an item that counts.

    Losses that aren't finite are left out of means and counted (``logging_nan_inf_filter``), or make the mean theirs.
    """
    taken, items, tokens = fit.averages.take()
    state, filters = fit.state, fit.args.logging_nan_inf_filter
    losses = taken.get("loss", [])
    finite = [value for value in losses if math.isfinite(value)]
    state.train_loss_sum += math.fsum(finite)
    state.train_loss_count += len(finite)
    state.items_seen += items
    state.num_input_tokens_seen += tokens
    if not taken:
        return None
    means = {
        name: mean_of_finite(values) if filters else sum(values) / len(values)
        for name, values in taken.items()
        if values
    }
    if len(finite) < len(losses) and filters:
        means["nonfinite_losses"] = len(losses) - len(finite)
    return means


def training_log(fit: "Fit") -> dict[str, float]:
    """The numbers of a training log; empty where no update was made since the last one."""
    state = fit.state
    logs = book(fit)
    if logs is None:
        return {}
    if fit.grad_norm is not None:
        logs["grad_norm"] = fit.grad_norm.item()
    logs["learning_rate"] = float(state.learning_rate)
    logs |= fit.strategy.precision.log_values()
    if state.skipped_updates:
        logs["skipped_updates"] = state.skipped_updates
    if fit.args.include_num_input_tokens_seen != "no":
        logs["num_input_tokens_seen"] = state.num_input_tokens_seen
    if fit.args.include_tokens_per_second:
        now = time.perf_counter()
        logs["tokens_per_second"] = (state.num_input_tokens_seen - fit.tokens_logged) / (now - fit.logged_at)
        fit.logged_at, fit.tokens_logged = now, state.num_input_tokens_seen
    return logs


def first_state(fit: "Fit") -> TrainState:
    """The state at the beginning of training; what a checkpoint holds of counts between two logs is counted already."""
    items, tokens = fit.averages.counts_settled
    state = fit.state
    return replace(
        state, items_seen=state.items_seen + items, num_input_tokens_seen=state.num_input_tokens_seen + tokens
    )


def final_metrics(fit: "Fit", began: float, first: TrainState) -> dict[str, float]:
    """Totals of what this call of ``train`` did; a resumed run's earlier part is left out of rates.

    Args:
        fit: at the end of training.
        began: time.perf_counter() when training began.
        first: see first_state.
    """
    book(fit)
    state, seconds = fit.state, time.perf_counter() - began
    updates = state.global_step - first.global_step
    metrics = {
        "train_runtime": seconds,
        "train_samples_per_second": (fit.earlier_samples + fit.stream.samples) / seconds,
        "train_steps_per_second": updates / seconds,
        "train_items_per_second": (state.items_seen - first.items_seen) / seconds,
    }
    tokens = state.num_input_tokens_seen - first.num_input_tokens_seen
    if tokens:
        metrics["train_tokens_per_second"] = tokens / seconds
    flops = fit.module.flops_per_token(fit.parameter_count) * (tokens or state.items_seen - first.items_seen)
    metrics["total_flos"] = flops
    if (peak := peak_flops(device_name(fit.strategy.device))) is not None:
        metrics["mfu"] = flops / seconds / (peak * fit.strategy.world_size)
    count = state.train_loss_count
    metrics["train_loss"] = state.train_loss_sum / count if count else math.nan
    return metrics | fit.memory.report()
