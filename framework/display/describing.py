"""A Fit in a few lines, for ``repr``: cheap, without a message to other ranks, whatever state it is in."""

from typing import Any

from .numbers import format_epoch


def describe_fit(fit: Any) -> str:
    """Describe a Fit. What isn't there yet, or not any more, is left out."""
    kind = type(fit).__name__
    lines = [line for describe in (module, strategy, progress, output) if (line := said(describe, fit))]
    return f"{kind}(\n  " + "\n  ".join(lines) + "\n)" if lines else f"{kind}()"


def said(describe: Any, fit: Any) -> str:
    """A line, or nothing where an object that it is about is missing or fails."""
    try:
        return str(describe(fit))
    except Exception:  # a repr is asked for where things went wrong
        return ""


def module(fit: Any) -> str:
    """The class of the module, and whether it is placed."""
    return f"module: {fit.placement.layers[0].kind}, placed" if fit.placed else f"module: {type(fit.module).__name__}"


def strategy(fit: Any) -> str:
    """How and where it runs."""
    own = fit.strategy
    where = f", {own.device}, rank {own.rank} of {own.world_size}"
    return f"strategy: {own!r}, precision: {own.precision.name}{where}"


def progress(fit: Any) -> str:
    """How far the run is; nothing where there is no training data."""
    state = fit.state
    return (
        f"update {state.global_step} of {state.max_steps or fit.run.args.max_steps}, epoch {format_epoch(state.epoch)}"
    )


def output(fit: Any) -> str:
    """Where its results go."""
    return f"output_dir: {fit.args.output_dir!r}"
