"""What is said of a run where it begins and where it ends: labels and the words beside them, in a few lines."""

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from ...strategies.base import Strategy
from .. import checkpoint
from ..arguments import FitArguments
from ..data import DataStream
from ..data.reread import LoaderStream
from ..measures.best import best_checkpoint, best_update
from ..measures.flops import device_name
from ..measures.parameters import ParameterCounts
from ..state import Control, TrainState
from .numbers import format_count, format_duration, format_value
from .shown_fit import ShownFit

Rows = list[tuple[str, str]]
"""Labels, and what is said under each."""

RESULTS = ("report.html", "log.jsonl", "metrics.csv", "weights.safetensors", "config.yaml")
"""What may lie in ``output_dir`` beside checkpoints, and is worth a word at the end."""

CLOCKS_DIFFER = 2.0  # seconds, between this machine and its disk, that don't matter


def beginning(fit: ShownFit) -> Rows:
    """Say what a run is, where it is about to begin or to go on. Reads what is on the host; other ranks aren't asked.

    Args:
        fit: its run has begun, and its module is placed.
    """
    args, strategy, state, run = fit.args, fit.strategy, fit.state, fit.run
    rows = [("run", args.run_name)] if args.run_name else []
    rows += [
        ("module", f"{fit.placement.layers[0].kind}: {parameters(fit.placement.parameters)}"),
        ("strategy", f"{strategy.name}, {strategy.precision.name}, {device(strategy)}"),
        *([("world", world(strategy))] if strategy.world_size * strategy.devices_per_rank > 1 else []),
        ("batch", batch(args, strategy, run.stream, run.plan.batches)),
        ("length", length(args.gradient_accumulation_steps * run.plan.batches, state, run.stream)),
        ("output", output(args)),
    ]
    if run.resumed_from is not None:
        done, whole = format_count(state.global_step), format_count(state.max_steps)
        if state.global_step >= state.max_steps:
            more = "a larger max_steps or num_train_epochs goes on"
            rows.append(("resumed", f"already finished: update {done} of {whole}, in {run.resumed_from}; {more}"))
        else:
            rows.append(("resumed", f"from {run.resumed_from.name} (update {done} of {whole})"))
    return rows


def ending(fit: ShownFit, first: int, seconds: float, item_name: str) -> Rows:
    """Say how a run ended, and where what it made lies.

    Args:
        fit: its run is over.
        first: updates that were done where it began or was resumed.
        seconds: that it took.
        item_name: what is counted in it.
    """
    args, state, results = fit.args, fit.state, fit.run.results
    rows = []
    if state.global_step < state.max_steps:
        rows.append(("stopped", stopped(fit.control, state)))
    if done := state.global_step - first:
        rows.append(("finished", totals(state, done, results, seconds, item_name)))
    if args.load_best_model_at_end and (path := best_checkpoint(args, best_update(state))) is not None:
        value = format_value("loss", state.best_metric or 0.0)
        rows.append(("best", f"loading {path.name} (update {state.best_global_step}, {args.best_metric} {value})"))
    rows.append(("results", found_in(args, time.time() - seconds - CLOCKS_DIFFER)))
    return rows


# What a run is.


def parameters(counts: ParameterCounts) -> str:
    """How many numbers are trained, and how many are frozen."""
    if not counts.frozen:
        return f"{format_count(counts.total)} parameters"
    share = 100 * counts.trainable / counts.total
    return (
        f"{format_count(counts.total)} parameters, {format_count(counts.trainable)} trainable ({share:.3g} %) and "
        f"{format_count(counts.frozen)} frozen"
    )


def device(strategy: Strategy) -> str:
    """The device of rank 0, by its maker's name where it has one."""
    name = device_name(strategy.device)
    return str(strategy.device) if name == strategy.device.type else f"{strategy.device} ({name})"


def world(strategy: Strategy) -> str:
    """How many ranks there are, and how they share the work."""
    parts = [
        (strategy.data_size, "data-parallel"),
        (strategy.tensor_parallel_size, "tensor-parallel"),
        (strategy.context_parallel_size, "context-parallel"),
        (strategy.devices_per_rank, "devices a rank"),
    ]
    ranks = f"{strategy.world_size} rank{'s' * (strategy.world_size > 1)}"
    told = [f"{size} {name}" for size, name in parts if size > 1]
    return ranks if strategy.data_size == strategy.world_size and len(told) < 2 else f"{ranks}: {' x '.join(told)}"


def batch(args: FitArguments, strategy: Strategy, stream: DataStream, turns: int) -> str:
    """How many samples are in an update, and how they come together; ``turns`` is the number of its batches."""
    accumulated = args.gradient_accumulation_steps
    if isinstance(stream, LoaderStream) and not stream.batch_size_is_known:
        batches = accumulated * strategy.data_size * turns
        return f"{format_count(batches)} batch{'es' * (batches != 1)} of the DataLoader's own in an update"
    per_device = stream.global_micro_batch // (strategy.data_size * strategy.devices_per_rank)
    factors = [f"{per_device} per device"]
    factors += [f"{accumulated} accumulated"] * (accumulated > 1)
    factors += [f"{turns} batches"] * (turns > 1)
    factors += [f"{strategy.devices_per_rank} devices"] * (strategy.devices_per_rank > 1)
    factors += [f"{strategy.data_size} ranks"] * (strategy.data_size > 1)
    whole = f"{format_count(stream.global_micro_batch * accumulated * turns)} samples in an update"
    return f"{whole} = {' x '.join(factors)}" if len(factors) > 1 else whole


def length(micro_batches: int, state: TrainState, stream: DataStream) -> str:
    """How many updates there are, of so many micro-batches, and passes over the data where they can be counted."""
    updates = f"{format_count(state.max_steps)} update{'s' * (state.max_steps != 1)}"
    if state.num_train_epochs >= sys.maxsize or stream.num_examples is None:
        return updates
    per_epoch = max(1, math.ceil(len(stream) / micro_batches))
    epochs = state.max_steps / per_epoch
    return f"{updates}, {epochs:.3g} epoch{'s' * (epochs != 1)} of {format_count(stream.num_examples)} samples"


def output(args: FitArguments) -> str:
    """Where results go, and when checkpoints are saved."""
    when = {
        "no": "no checkpoints",
        "steps": f"a checkpoint every {format_count(args.save_steps)} updates",
        "epoch": "a checkpoint every epoch",
        "best": "a checkpoint at each best evaluation",
    }[args.save_strategy]
    kept = f", {args.save_total_limit} kept" if args.save_total_limit and args.save_strategy != "no" else ""
    return f"{args.output_dir} ({when}{kept})"


# How it ended.


def stopped(control: Control, state: TrainState) -> str:
    """Where a run was left before its last update, and why."""
    at = f"early, at update {format_count(state.global_step)} of {format_count(state.max_steps)}"
    if not control.should_training_stop:
        return f"{at}: the data gave no more batches"
    return f"{at}: {control.stop_reason or 'a callback asked for it (control.stop_training says why)'}"


def totals(state: TrainState, done: int, results: Mapping[str, float], seconds: float, item_name: str) -> str:
    """What a run did, in what time."""
    duration = format_duration(seconds) if seconds >= 60 else f"{seconds:.1f} s"
    before = f", {format_count(state.global_step)} in all" if done < state.global_step else ""
    told = [f"{format_count(done)} update{'s' * (done != 1)} in {duration}{before}"]
    if math.isfinite(results.get("train_loss", math.nan)):
        told.append(f"train loss {format_value('loss', results['train_loss'])}")
    if results.get("train_items_per_second"):
        told.append(f"{format_count(results['train_items_per_second'])} {item_name}/s")
        rate = results["train_steps_per_second"]
        told.append(f"{format_count(rate) if rate >= 1000 else f'{rate:.3g}'} updates/s")
    if "mfu" in results:
        told.append(f"MFU {100 * results['mfu']:.1f} %")
    peaks = [value for name, value in results.items() if name.startswith("train_memory_") and name.endswith("_peak")]
    if peaks:
        told.append(f"peak memory {format_value('_memory_', peaks[0])}")
    return " | ".join(told)


def found_in(args: FitArguments, since: float) -> str:
    """Where what a run made lies: its directory, and what is in there. Looks at the disk.

    Args:
        args: of the run.
        since: when it began, as the disk tells the time; what is older is of other runs.
    """
    directory = Path(args.output_dir)
    saved = checkpoint.published(directory) if args.save_strategy != "no" else []
    found = [path.name for path in saved[-1:]]
    found += [name for name in RESULTS if written_at(directory / name) >= since]
    curves = (directory / (args.run_name or "") / "train").glob("events.out.tfevents.*")
    if any(written_at(path) >= since for path in curves):
        found.append("curves for TensorBoard")
    return f"{args.output_dir} ({', '.join(found)})" if found else "none: neither checkpoints nor logs were written"


def written_at(path: Path) -> float:
    """When a file was last written; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
