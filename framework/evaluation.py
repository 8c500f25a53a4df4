"""Evaluation and prediction: item-weighted means, torchmetrics, and outputs on the host."""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .data import DataStream
from .micro_batches import in_step
from .objective import Weightless, labels_of

if TYPE_CHECKING:
    from .fit import Fit


@torch.no_grad()
def run(
    fit: "Fit", stream: DataStream, prefix: str, ignore_keys: Iterable[str] = (), *, predict: bool = False
) -> tuple[dict[str, float], Any, Any]:
    """One pass over a stream in evaluation mode.

    The loss is the mean over all items of the data. Sums stay on the device; they are summed over ranks and read once,
    at the end.

    Args:
        fit: placed.
        stream: the data.
        prefix: of the metrics' names, "eval" gives "eval_loss".
        ignore_keys: entries of a mapping output that are left out of predictions; where none are given, those of the
            module's ``config.keys_to_ignore_at_inference`` (the cache of a transformers model).
        predict: hand out the outputs; the loss is then computed only where a batch has labels.

    Returns:
        (metrics, predictions, labels); the latter two are None unless asked for.
    """
    ignored = {*ignore_keys} or {*getattr(getattr(fit.module, "config", None), "keys_to_ignore_at_inference", ())}
    keeps = predict or fit.compute_metrics is not None
    strategy, objective, model = fit.strategy, fit.objective, fit.strategy.model
    metrics = {} if predict else dict(fit.module.metrics())
    for metric in metrics.values():
        metric.to(strategy.device)
    sums: dict[str, Tensor] = {}
    kept = Kept(ignored, fit.args.eval_accumulation_steps or 1, fit.preprocess_logits_for_metrics)
    strategy.settle_buffers()
    was_training, past, objective.past = model.training, objective.past, None
    stage = fit.memory.begin("predict" if predict else "eval")
    model.eval()
    try:
        for batch in in_step(strategy, stream, fit.batches(stream, 0)):
            count = objective.count(batch)
            is_mine = not isinstance(batch, Weightless)
            inputs = strategy.to_device(batch.batch if isinstance(batch, Weightless) else batch)
            values: dict[str, Tensor] = {}
            if not predict or labels_of(inputs) is not None:
                loss, outputs, extras, _ = fit.find_loss(model, inputs, count, wants_outputs=True)
                values = {"loss": strategy.local_loss(loss), **extras}
                if outputs is None and (metrics or keeps):
                    raise missing_outputs(fit)
            else:
                with strategy.forward_context():
                    outputs = objective.forward(model, inputs)
            if is_mine:
                if values:
                    sums["items"] = sums.get("items", 0.0) + torch.as_tensor(count, device=strategy.device).double()
                for name, value in values.items():
                    share = torch.nan_to_num(value) * 0.0 if isinstance(count, int) and count == 0 else value * count
                    sums[name] = sums.get(name, 0.0) + share.double()
                for metric in metrics.values():
                    metric.update(*fit.module.metric_inputs(outputs, inputs))
                if keeps:
                    kept.add(outputs, labels_of(inputs))
            strategy.execute()
            fit.emit("on_prediction_step")
    finally:
        model.train(was_training)
        objective.past = past
        fit.memory.begin(stage)
    report = {
        "sums": dict(zip(sums, strategy.read(list(sums.values())), strict=True)) if sums else {},
        "metrics": {name: host_states(metric) for name, metric in metrics.items()},
        "predictions": kept.on_host(),
    }
    # One exchange for everything. The tensor-parallel ranks of a sample have all counted it: the first speaks for them.
    reports = strategy.gather(report)[:: strategy.tensor_parallel_size]
    totals: dict[str, float] = {}
    for other in reports:
        for name, value in other["sums"].items():
            totals[name] = totals.get(name, 0.0) + value
    items = totals.pop("items", 0.0)
    results = {f"{prefix}_{name}": total / items if items else math.nan for name, total in totals.items()}
    for name, metric in metrics.items():
        if len(reports) > 1:
            merge_states(metric, [other["metrics"][name] for other in reports])
        results |= scalars(f"{prefix}_{name}", metric.compute())
    if not keeps:
        return results, None, None
    parts, sharing = [other["predictions"] for other in reports], strategy.context_parallel_size
    groups = [parts[i : i + sharing] for i in range(0, len(parts), sharing)]
    joined = [[strategy.join_outputs(batch) for batch in zip(*group, strict=True)] for group in groups]
    predictions, labels = concatenate(in_order(joined), fit.args.pad_index)
    if isinstance(labels, list) and all(label is None for label in labels):
        labels = None
    if fit.compute_metrics is not None and isinstance(labels, Tensor):
        results |= {f"{prefix}_{name}": float(n) for name, n in fit.compute_metrics(predictions, labels).items()}
    return results, *((predictions, labels) if predict else (None, None))


class Kept:
    """Outputs and labels of batches, which move to the host some batches at a time.

    Args:
        ignored: entries of a mapping output that are left out.
        batches: that stay on the device together.
        preprocess: (outputs, labels) to what is kept of the outputs; None keeps them as they are.
    """

    def __init__(self, ignored: set[str], batches: int, preprocess: Callable[[Any, Any], Any] | None) -> None:
        self.ignored, self.batches, self.preprocess = ignored, batches, preprocess
        self.moved: list[Any] = []
        self.on_device: list[Any] = []

    def add(self, outputs: Any, labels: Any) -> None:
        """Keep a batch's."""
        if self.preprocess is not None:
            outputs = self.preprocess(alone(without(outputs, self.ignored)), labels)
        self.on_device.append((outputs, labels))
        if len(self.on_device) >= self.batches:
            self.move()

    def move(self) -> None:
        """Move what is on the device to the host."""
        self.moved += [(to_host(outputs, self.ignored), to_host(labels, set())) for outputs, labels in self.on_device]
        self.on_device = []

    def on_host(self) -> list[Any]:
        """All of it, on the host."""
        self.move()
        return self.moved


def without(outputs: Any, ignored: set[str]) -> Any:
    """Outputs without the entries of a mapping that aren't wanted, and without its loss."""
    return (
        {k: v for k, v in outputs.items() if k not in ignored and k != "loss"} if isinstance(outputs, dict) else outputs
    )


def alone(outputs: Any) -> Any:
    """The only entry of a mapping or tuple that has one; anything else as it is."""
    if isinstance(outputs, dict | tuple) and len(outputs) == 1:
        return next(iter(outputs.values())) if isinstance(outputs, dict) else outputs[0]
    return outputs


def missing_outputs(fit: "Fit") -> TypeError:
    """The error for an overridden compute_loss whose outputs are needed and not there."""
    return TypeError(
        f"{type(fit).__name__}.compute_loss returned a loss alone, and metrics and predictions are made of the "
        "outputs. Have it return (loss, outputs) where return_outputs=True."
    )


def host_states(metric: Any) -> list[dict[str, Any]]:
    """What a torchmetrics metric (or a collection, or a wrapper of some) has summed up, on the host."""
    return [
        tree_map(lambda value: value.cpu() if isinstance(value, Tensor) else value, dict(part.metric_state))
        for part in parts_with_state(metric)
    ]


def merge_states(metric: Any, ranks: list[list[dict[str, Any]]]) -> None:
    """Give a metric the states of all ranks, joined as each state says (``dist_reduce_fx``), and keep it from asking
    the ranks once more itself.
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
    """The metrics inside a metric, itself included."""
    return [part for part in metric.modules() if hasattr(part, "_reductions")]


def scalars(name: str, result: Any) -> dict[str, float]:
    """A metric's result as numbers by name; a collection's carry its keys.

    Raises:
        ValueError: the metric computes more than one number.
    """
    if isinstance(result, dict):
        return {k: v for key, value in result.items() for k, v in scalars(f"{name}_{key}", value).items()}
    if isinstance(result, Tensor) and result.numel() != 1:
        raise ValueError(
            f"The metric {name!r} computes a tensor of shape {tuple(result.shape)}, but a log takes numbers. "
            "Give it an average (average='macro'), or wrap it in torchmetrics.ClasswiseWrapper."
        )
    return {name: float(result)}


def in_order(ranks: list[list[Any]]) -> list[Any]:
    """Every rank's parts in the order of the data: a global micro-batch is cut in the order of ranks, and only in the
    last one may a rank have none.
    """
    return [parts[i] for i in range(max(map(len, ranks))) for parts in ranks if i < len(parts)]


def to_host(outputs: Any, ignore_keys: set[str]) -> Any:
    """Outputs with their tensors on the host, without the entries that are not wanted."""
    if isinstance(outputs, Tensor):
        tensor = outputs.detach().cpu()
        # A view on the host would keep all that it was cut from: the whole sequence for the sake of its first token.
        return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
    if isinstance(outputs, dict):
        return {k: to_host(v, ignore_keys) for k, v in without(outputs, ignore_keys).items()}
    if isinstance(outputs, tuple | list):
        return tuple(to_host(value, ignore_keys) for value in outputs)
    return outputs


def concatenate(parts: list[Any], pad_index: int) -> Any:
    """The batches' outputs, joined along the first dimension; what is no tensor becomes a list.

    Args:
        parts: one for each batch.
        pad_index: fills up the other dimensions, at their ends, where batches differ in them.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        rows = [part.reshape(-1) if part.ndim == 0 else part for part in parts]
        return torch.cat(padded(rows, pad_index) if any(row.shape[1:] != rows[0].shape[1:] for row in rows) else rows)
    if isinstance(first, dict):
        return {key: concatenate([part[key] for part in parts], pad_index) for key in first}
    if isinstance(first, tuple):
        return tuple(concatenate([part[i] for part in parts], pad_index) for i in range(len(first)))
    return parts


def padded(rows: list[Tensor], pad_index: int) -> list[Tensor]:
    """Tensors of one shape but for their first dimension.

    Raises:
        ValueError: they have no dimensions in common.
    """
    if len({row.ndim for row in rows}) > 1:
        shapes = ", ".join(sorted({str(tuple(row.shape)) for row in rows}))
        raise ValueError(
            f"The outputs of batches can't be joined: their shapes are {shapes}. Have forward return as many "
            "dimensions for every batch, or leave the entry out by ignore_keys."
        )
    longest = [max(sizes) for sizes in zip(*(row.shape[1:] for row in rows), strict=True)]
    filled = []
    for row in rows:
        whole = row.new_full((len(row), *longest), False if row.dtype is torch.bool else pad_index)
        whole[(slice(None), *(slice(size) for size in row.shape[1:]))] = row
        filled.append(whole)
    return filled
