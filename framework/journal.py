"""A run's numbers: the means of each log, the totals at the end, and the memory it took."""

import math
import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from .averages import mean_of_finite
from .state import TrainState

if TYPE_CHECKING:
    from .fit import Fit

# Dense bf16 FLOP/s by a part of the device's name, from the makers' data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12}


def book(fit: "Fit") -> dict[str, float]:
    """Means over the updates since the last log; they, items and tokens are added to the run's totals.

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
    means = {n: mean_of_finite(values) if filters else sum(values) / len(values) for n, values in taken.items()}
    if len(finite) < len(losses) and filters:
        means["nonfinite_losses"] = len(losses) - len(finite)
    return means


def training_log(fit: "Fit") -> dict[str, float]:
    """The numbers of a training log; empty where no update was made since the last one."""
    state = fit.state
    tokens = state.num_input_tokens_seen
    logs = book(fit)
    if not logs:
        return logs
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
        logs["tokens_per_second"] = (state.num_input_tokens_seen - tokens) / (now - fit.logged_at)
        fit.logged_at = now
    return logs


def final_metrics(fit: "Fit", began: float, first: TrainState) -> dict[str, float]:
    """Totals of what this call of ``train`` did; a resumed run's earlier part is left out of rates.

    Args:
        fit: at the end of training.
        began: time.perf_counter() when training began.
        first: the state at that time.
    """
    book(fit)
    state, seconds = fit.state, time.perf_counter() - began
    updates = state.global_step - first.global_step
    metrics = {
        "train_runtime": seconds,
        "train_samples_per_second": samples_of(fit, first) / seconds,
        "train_steps_per_second": updates / seconds,
        "train_items_per_second": (state.items_seen - first.items_seen) / seconds,
    }
    tokens = state.num_input_tokens_seen - first.num_input_tokens_seen
    if tokens:
        metrics["train_tokens_per_second"] = tokens / seconds
    flops = fit.module.flops_per_token(fit.parameter_count) * (tokens or state.items_seen - first.items_seen)
    metrics["total_flos"] = flops
    if (peak := peak_flops(fit.strategy.device)) is not None:
        metrics["mfu"] = flops / seconds / (peak * fit.strategy.world_size)
    count = state.train_loss_count
    metrics["train_loss"] = state.train_loss_sum / count if count else math.nan
    return metrics | memory("train", fit.strategy.device)


def samples_of(fit: "Fit", first: TrainState) -> float:
    """Samples trained on since ``first``; by the epoch where its length is known, else by full updates."""
    if fit.stream.num_examples is not None:
        return fit.stream.num_examples * (fit.state.epoch - first.epoch)
    return (fit.state.global_step - first.global_step) * fit.get_total_train_batch_size(fit.args)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 FLOP/s; None where it isn't known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def memory(stage: str, device: torch.device) -> dict[str, float]:
    """Bytes at the end of a stage: resident on the host (and its peak since the process began), allocated on a GPU (and
    its peak since the last stage). Read from counters that are kept anyway: no thread watches.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found: dict[str, Any] = {
        f"{stage}_memory_cpu_resident": resident() or peak,
        f"{stage}_memory_cpu_peak": max(peak, resident() or 0),
    }
    if device.type == "cuda":
        found[f"{stage}_memory_gpu_allocated"] = torch.cuda.memory_allocated(device)
        found[f"{stage}_memory_gpu_peak"] = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    return found


def resident() -> int | None:
    """Bytes of host memory this process holds; None where the system doesn't say (no /proc)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return None
