"""Evaluation and prediction: one pass over data in evaluation mode, one exchange among ranks, one report."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ...strategies.base import Strategy
from ..agreement import describe
from ..arguments import FitArguments
from ..data.stand_in import StandIn
from ..logged import Noted
from ..module import TrainModule
from ..objective import Count, Objective, labels_of
from .exchange import exchange
from .memory import MemoryByStage
from .metrics import merge_states, numbers_of, states_on_host
from .outputs import KeptOutputs, concatenate, in_order_of_data


class Batches(Protocol):
    """The micro-batches of a pass on this rank.

    Attributes:
        rows: samples in all of them at most; 0 where that isn't known.
    """

    rows: int

    def __iter__(self) -> Iterator[Any]:
        """Return an iterator over them, once."""


class FindLoss(Protocol):
    """How the loss of a batch is found: ``Fit.find_loss``."""

    def __call__(
        self, model: nn.Module, inputs: Any, count: Count, *, wants_outputs: bool
    ) -> tuple[Tensor, Any, Mapping[str, Tensor], bool]:
        """Return (loss, outputs, extras, whether the loss is divided by a count already) of a batch on the device."""


class Results(NamedTuple):
    """What an evaluation or prediction found, over all ranks.

    Attributes:
        metrics: numbers by name.
        predictions, labels: whole and on the host, of a prediction; None of an evaluation. Where they are written,
            what each rank says it has written, and None.
    """

    metrics: dict[str, float]
    predictions: Any
    labels: Any


@dataclass
class PassTotals:
    """What one rank adds up during a pass.

    Attributes:
        metrics: the module's torchmetrics metrics, by name.
        outputs: outputs and labels, where they are kept.
        sums: on the device: the loss and other values, each times the items of its batch.
        items: in the batches; a tensor on the device, where they were counted there.
        logged: what the module logs, by name: values times items, and items, in float64 on the device.
    """

    metrics: dict[str, Any]
    outputs: KeptOutputs | None
    sums: dict[str, Tensor] = field(default_factory=dict)
    items: Count = 0
    logged: dict[str, Tensor] = field(default_factory=dict)

    def add(self, loss: Tensor, extras: Mapping[str, Tensor], count: Count) -> None:
        """Add the means over the items of a batch, weighed by their number."""
        self.items = self.items + count
        self._add("loss", loss, count)
        for name, value in extras.items():
            self._add(name, value, count)

    def add_logged(self, noted: list[Noted], device: torch.device) -> None:
        """Add what the module logged in a batch. A name counts also where no item does, so that all ranks have it."""
        for name, value, items in noted:
            total = self.logged.get(name)
            if total is None:
                total = self.logged[name] = torch.zeros(2, dtype=torch.float64, device=device)
            if isinstance(value, Tensor) or isinstance(items, Tensor):
                weight = torch.as_tensor(items, dtype=torch.float64, device=device)
                total[0] += torch.where(weight == 0, 0.0, value * weight)
                total[1] += weight
            elif items:
                total += torch.tensor([value * items, items], dtype=torch.float64, device=device)

    def _add(self, name: str, mean: Tensor, count: Count) -> None:
        total = self.sums.get(name)
        if total is None:
            total = self.sums[name] = torch.zeros((), dtype=torch.float64, device=mean.device)
        if not isinstance(count, int):
            total.add_(mean.double() * count)
        elif count:  # the mean over no items is NaN, and its share is nothing
            total.add_(mean, alpha=count)


@dataclass(frozen=True)
class Evaluation:
    """Evaluates a placed module, or predicts with it.

    The loss is the mean over all items of the data. Sums stay on the device; they are added up over ranks and read
    once, at the end.

    Args:
        strategy: it has placed the module.
        module: the user's, for its metrics.
        objective: calls the model and counts items.
        args: says how many outputs stay on the device together, and what fills up shorter ones.
        memory: told of the stage.
        find_loss: finds the loss of a batch, and what forward returned.
        loss_name: what ``find_loss`` calls, in errors: "Fit.compute_loss".
        compute_metrics: (predictions, labels) of all data to numbers by name; None computes none.
        preprocess_logits: (outputs, labels) of a batch to what is kept of the outputs; None keeps them as they are.
        after_batch: called after each batch.
        keep: makes what keeps outputs, or writes them.
    """

    strategy: Strategy
    module: TrainModule
    objective: Objective
    args: FitArguments
    memory: MemoryByStage
    find_loss: FindLoss
    loss_name: str
    compute_metrics: Callable[[Any, Tensor], Mapping[str, float]] | None = None
    preprocess_logits: Callable[[Any, Any], Any] | None = None
    after_batch: Callable[[], None] = lambda: None
    keep: Callable[[Collection[str], int, Callable[[Any, Any], Any] | None], KeptOutputs] = KeptOutputs

    @torch.no_grad()
    def run(self, batches: Batches, prefix: str, ignore_keys: Iterable[str] = (), *, predict: bool = False) -> Results:
        """Go over the data once. Collective.

        Args:
            batches: this rank's; every rank has equally many.
            prefix: of the metrics' names: "eval" gives "eval_loss".
            ignore_keys: entries of a mapping output that are left out of predictions; where none are given, those of
                the module's ``config.keys_to_ignore_at_inference`` (the cache of a transformers model).
            predict: hand out the outputs; the loss is then computed only where a batch has labels.

        Raises:
            TypeError: outputs are needed, and an overridden compute_loss returns none.
            ValueError: a metric computes more than one number, or outputs of batches can't be joined.
        """
        totals = self._begin_totals(ignore_keys, predict, batches.rows)
        self.strategy.settle()
        with self.memory.during("predict" if predict else "eval"), self.objective.without_past(), self._evaluating():
            self._pass_over(batches, totals, predict)
        reports = self._exchange(totals)
        metrics = self._join_metrics(reports, totals.metrics, prefix)
        if totals.outputs is None:
            return Results(metrics, None, None)
        if totals.outputs.are_written:
            return Results(metrics, [report["written"] for report in reports], None)
        ranks = exchange(self.strategy, totals.outputs.on_host(), to_all=predict)
        joined: tuple[Any, Any] = (None, None)
        if predict:
            assert ranks is not None
            joined = self._join_outputs(ranks)
        if self.compute_metrics is not None:
            own = self._on_main(lambda: self._compute_own(joined if predict else self._join_outputs(ranks or [])))
            metrics |= {f"{prefix}_{name}": number for name, number in own.items()}
        return Results(metrics, *joined)

    def _compute_own(self, joined: tuple[Any, Any]) -> dict[str, float]:
        predictions, labels = joined
        if self.compute_metrics is None or not isinstance(labels, Tensor):
            return {}
        return {name: float(number) for name, number in self.compute_metrics(predictions, labels).items()}

    def _on_main(self, action: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Compute numbers on the main process, and tell all ranks. Collective.

        Raises:
            RuntimeError: on the other ranks, where it failed there; the main process raises the error itself.
        """
        strategy = self.strategy
        if strategy.world_size == 1:
            return action()
        failure: Exception | None = None
        found: dict[str, float] = {}
        try:
            found = action() if strategy.is_main else {}
        except Exception as error:
            failure = error
        why, numbers = strategy.broadcast((None if failure is None else describe(failure), found))
        if failure is not None:
            raise failure
        if why is not None:
            raise RuntimeError(f"Rank 0 failed at compute_metrics: {why}")
        return dict(numbers)

    def _begin_totals(self, ignore_keys: Iterable[str], predict: bool, rows: int) -> PassTotals:
        """Make what the pass adds up in; metrics are made anew for each pass."""
        metrics = {} if predict else dict(self.module.metrics())
        for metric in metrics.values():
            metric.to(self.strategy.device)
        if not predict and self.compute_metrics is None:
            return PassTotals(metrics, None)
        config = getattr(self.module, "config", None)
        ignored = {*ignore_keys} or {*getattr(config, "keys_to_ignore_at_inference", ())}
        together = self.args.eval_accumulation_steps or 1
        outputs = self.keep(ignored, together, self.preprocess_logits)
        outputs.expect(rows)
        return PassTotals(metrics, outputs)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Put the model into evaluation mode, and afterwards back into the mode in which it was."""
        model = self.strategy.model
        was_training = model.training
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)

    def _pass_over(self, batches: Iterable[Any], totals: PassTotals, predict: bool) -> None:
        """Run the model on every batch, and add up what it finds. Nothing waits for the device in here, but for outputs
        that move to the host.
        """
        strategy, objective, model = self.strategy, self.objective, self.strategy.model
        kept, metrics, find_loss, after_batch = (
            totals.outputs,
            totals.metrics.values(),
            self.find_loss,
            self.after_batch,
        )
        for batch in batches:
            is_mine = not isinstance(batch, StandIn)
            inputs = strategy.to_device(batch if is_mine else batch.batch)
            labels = labels_of(inputs) if predict or kept is not None else None
            objective.logged.open()
            if not predict or labels is not None:
                count = objective.count(batch)
                loss, outputs, extras, _ = find_loss(model, inputs, count, wants_outputs=True)
                loss = strategy.local_loss(loss)
                noted = objective.logged.take(count, strategy.local_loss, is_mine, {*extras, *totals.metrics})
                if not predict:
                    totals.add_logged(noted, strategy.device)
                if outputs is None and (metrics or kept is not None):
                    raise missing_outputs(self.loss_name)
                if is_mine:
                    totals.add(loss, extras, count)
            else:
                with strategy.forward_context():
                    outputs = objective.forward(model, inputs)
            if is_mine:
                for metric in metrics:
                    metric.update(*self.module.metric_inputs(outputs, inputs))
                if kept is not None:
                    kept.add(outputs, labels)
            elif kept is not None:
                kept.pass_by()
            objective.logged.close()
            strategy.flush()
            after_batch()

    def _exchange(self, totals: PassTotals) -> list[dict[str, Any]]:
        """Gather what every rank has added up, but its outputs, on the host, in one message. The tensor-parallel ranks
        of a sample have all counted it, and the first of them speaks for them.
        """
        sums, logged = totals.sums, totals.logged
        to_read = [*logged.values(), *sums.values(), *([totals.items] if isinstance(totals.items, Tensor) else [])]
        numbers = self.strategy.read(to_read) if to_read else []
        report = {
            "logged": {name: (numbers.pop(0), numbers.pop(0)) for name in logged},
            "sums": dict(zip(sums, numbers, strict=False)),
            "items": totals.items if isinstance(totals.items, int) else numbers[-1],
            "metrics": {name: states_on_host(metric) for name, metric in totals.metrics.items()},
            "written": totals.outputs.on_host() if totals.outputs is not None and totals.outputs.are_written else None,
        }
        return self.strategy.gather(report)[:: self.strategy.tensor_parallel_size]

    def _join_metrics(
        self, reports: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], prefix: str
    ) -> dict[str, float]:
        """Return means over the items of all ranks, and what the torchmetrics metrics compute of all ranks' states."""
        sums: dict[str, float] = {}
        for report in reports:
            for name, value in report["sums"].items():
                sums[name] = sums.get(name, 0.0) + value
        items = sum(report["items"] for report in reports)
        found = {f"{prefix}_{name}": value / items if items else math.nan for name, value in sums.items()}
        for name in sorted({name for report in reports for name in report["logged"]}):
            values, counts = zip(*(report["logged"].get(name, (0.0, 0.0)) for report in reports), strict=True)
            if sum(counts):
                found[f"{prefix}_{name}"] = sum(values) / sum(counts)
        for name, metric in metrics.items():
            if len(reports) > 1:
                merge_states(metric, [report["metrics"][name] for report in reports])
            found |= numbers_of(f"{prefix}_{name}", metric.compute())
        return found

    def _join_outputs(self, ranks: Sequence[list[Any]]) -> tuple[Any, Any]:
        """Return (predictions, labels) of all ranks in the order of the data; labels None where no batch had any."""
        sharing = self.strategy.context_parallel_size
        groups = [ranks[first : first + sharing] for first in range(0, len(ranks), sharing)]
        joined = [[self.strategy.join_outputs(batch) for batch in zip(*group, strict=True)] for group in groups]
        predictions, labels = concatenate(in_order_of_data(joined), self.args.pad_index)
        if isinstance(labels, list) and all(label is None for label in labels):
            labels = None
        return predictions, labels


def missing_outputs(loss_name: str) -> TypeError:
    """Make the error for an overridden compute_loss that returns no outputs where they are needed."""
    return TypeError(
        f"{loss_name} returned a loss alone, and metrics and predictions are made of the "
        "outputs. Have it return (loss, outputs) where return_outputs=True."
    )
