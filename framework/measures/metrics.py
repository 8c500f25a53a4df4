"""torchmetrics metrics over ranks: their states on the host, joined, and what they compute as numbers by name."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def states_on_host(metric: Any) -> list[dict[str, Any]]:
    """Return what a metric (or a collection, or a wrapper of some) has added up, on the host."""
    return [
        tree_map(lambda value: value.cpu() if isinstance(value, Tensor) else value, dict(part.metric_state))
        for part in parts_with_state(metric)
    ]


def merge_states(metric: Any, ranks: list[list[dict[str, Any]]]) -> None:
    """Give a metric the states of all ranks, joined as each state says (``dist_reduce_fx``), and keep the metric from
    asking the ranks once more itself.

    Args:
        metric: whose states are replaced.
        ranks: what ``states_on_host`` returned on each rank.
    """
    for index, part in enumerate(parts_with_state(metric)):
        for name, reduce in part._reductions.items():
            values = [states[index][name] for states in ranks]
            if isinstance(values[0], list):
                merged: Any = [item.to(part.device) for value in values for item in value]
            else:
                stacked = torch.stack(values).to(part.device)
                merged = reduce(stacked) if reduce else stacked
            setattr(part, name, merged)
        part._computed = None
        part._update_count = max(1, part._update_count)  # a rank without samples has something to compute now
        part.sync_on_compute = part._to_sync = False


def parts_with_state(metric: Any) -> list[Any]:
    """Return the metrics inside a metric, itself included."""
    return [part for part in metric.modules() if hasattr(part, "_reductions")]


def numbers_of(name: str, result: Any) -> dict[str, float]:
    """Return what a metric computed as numbers by name; those of a collection carry its keys.

    Raises:
        ValueError: the metric computes more than one number.
    """
    if isinstance(result, dict):
        return {k: v for key, value in result.items() for k, v in numbers_of(f"{name}_{key}", value).items()}
    if isinstance(result, Tensor) and result.numel() != 1:
        raise ValueError(
            f"The metric {name!r} computes a tensor of shape {tuple(result.shape)}, but a log takes numbers. "
            "Give it an average (average='macro'), or wrap it in torchmetrics.ClasswiseWrapper."
        )
    return {name: float(result)}
