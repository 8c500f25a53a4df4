"""Evaluation and prediction: item-weighted means, torchmetrics, and outputs on the host."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .data import DataStream
from .module import move_to
from .objective import Weightless, labels_of

if TYPE_CHECKING:
    from .fit import Fit


@torch.no_grad()
def run(
    fit: "Fit", stream: DataStream, prefix: str, ignore_keys: Iterable[str] = (), *, predict: bool = False
) -> tuple[dict[str, float], Any]:
    """One pass over a stream in evaluation mode.

    The loss is the mean over all items of the data. Sums stay on the device; they are summed over ranks and read once,
    at the end.

    Args:
        fit: placed.
        stream: the data.
        prefix: of the metrics' names, "eval" gives "eval_loss".
        ignore_keys: entries of a mapping output that are left out of predictions.
        predict: keep the outputs; the loss is then computed only where a batch has labels.

    Returns:
        (metrics, predictions); predictions is None unless asked for.
    """
    strategy, objective, model = fit.strategy, fit.objective, fit.strategy.model
    metrics = {} if predict else dict(fit.module.metrics())
    for metric in metrics.values():
        metric.to(strategy.device)
    sums: dict[str, Tensor] = {}
    kept: list[Any] = []
    was_training = model.training
    model.eval()
    try:
        for batch in stream.epoch(0):
            count = objective.count(batch)
            is_mine = not isinstance(batch, Weightless)
            inputs = move_to(batch.batch if isinstance(batch, Weightless) else batch, strategy.device)
            with strategy.forward_context():
                outputs = objective.call(model, inputs)
                values: dict[str, Tensor] = {}
                if not predict or labels_of(inputs) is not None:
                    loss, extras = objective.loss(outputs, inputs)
                    values = {"loss": loss, **extras}
            if is_mine:
                if values:
                    sums["items"] = sums.get("items", 0) + torch.as_tensor(count, device=strategy.device)
                for name, value in values.items():
                    share = torch.nan_to_num(value) * 0.0 if isinstance(count, int) and count == 0 else value * count
                    sums[name] = sums.get(name, 0.0) + share.double()
                for metric in metrics.values():
                    metric.update(*fit.module.metric_inputs(outputs, inputs))
                if predict:
                    kept.append(to_host(outputs, set(ignore_keys)))
            fit.emit("on_prediction_step")
    finally:
        model.train(was_training)
    results: dict[str, float] = {}
    if sums:
        names = list(sums)
        totals = strategy.sum_over_data_ranks(torch.stack([sums[name].double() for name in names])).tolist()
        items = totals[names.index("items")]
        results = {f"{prefix}_{n}": total / items for n, total in zip(names, totals, strict=True) if n != "items"}
    for name, metric in metrics.items():
        results[f"{prefix}_{name}"] = float(metric.compute())
    return results, concatenate(kept) if predict else None


def to_host(outputs: Any, ignore_keys: set[str]) -> Any:
    """Outputs with their tensors on the host, without the entries that are not wanted."""
    if isinstance(outputs, Tensor):
        return outputs.detach().cpu()
    if isinstance(outputs, dict):
        return {k: to_host(v, ignore_keys) for k, v in outputs.items() if k not in ignore_keys and k != "loss"}
    if isinstance(outputs, tuple | list):
        return tuple(to_host(value, ignore_keys) for value in outputs)
    return outputs


def concatenate(parts: list[Any]) -> Any:
    """The batches' outputs, joined along the first dimension; what is no tensor becomes a list."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([part.reshape(-1) if part.ndim == 0 else part for part in parts])
    if isinstance(first, dict):
        return {key: concatenate([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        return tuple(concatenate([part[i] for part in parts]) for i in range(len(first)))
    return parts
