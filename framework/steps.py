"""Steps: what a Fit does with a placed module on request, and the only methods that are meant to be overridden."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import checkpoint, overriding
from .averaging import Average, using
from .data import DataStream, limit_evaluation, make_stream, sets_by_name
from .data.stand_in import StandIn
from .measures import best
from .measures.evaluation import Evaluation
from .measures.outputs import KeptOutputs
from .members import Members
from .objective import NO_EXTRAS, Count, Objective, weigh, without_loss
from .run.in_step import Pass
from .run.micro_batches import read_update
from .state import PredictionOutput

if TYPE_CHECKING:
    from .predictions.options import PredictionWriter


class Steps(Members):
    """The verbs of a Fit. ``overriding.OVERRIDABLE`` lists those that are called by name wherever they are needed."""

    PHASES = {
        "get_batch_samples": "data", "compute_loss": "forward", "turn_loss": "forward", "evaluate": "evaluation",
        "save_checkpoint": "saving", "log_training": "logging",
    }  # fmt: skip

    # A micro-batch.

    def accumulate(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Make a context for one micro-batch's forward and backward; the last one of an update reduces gradients."""
        return self.strategy.accumulate(last) if self._cached is None else self._cached.micro_batch(last)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Count | None = None) -> Tensor:
        """Forward, loss and backward of one micro-batch.

        Args:
            model: the placed model.
            inputs: a micro-batch as the data gave it.
            num_items_in_batch: items in the whole update over all ranks; None if this batch is all of it.

        Returns:
            This micro-batch's share of the update's mean loss, detached, 0-dim, on the device.
        """
        strategy, objective, run = self.strategy, self._objective, self._run
        assert objective is not None and run is not None
        averages, logged = run.averages, objective.logged
        count, is_mine = objective.count(inputs), not isinstance(inputs, StandIn)
        averages.count(count, self._count_tokens(inputs))
        logged.open()
        inputs = strategy.to_device(inputs.batch if isinstance(inputs, StandIn) else inputs)
        is_empty = isinstance(count, int) and count == 0  # all padding, or a stand-in
        if self.overrides_loss or is_empty:
            loss, outputs, extras, is_share = self.find_loss(model, inputs, count, num_items_in_batch, is_empty)
            if is_empty:
                loss, is_share = without_loss(loss, [outputs, *objective.gathered]), False
        else:  # called from here: every frame between a user's forward and train is one more to read in a traceback
            loss = self.compute_loss(model, inputs, False, num_items_in_batch)
            extras, is_share = objective.note()
        num_items = count if num_items_in_batch is None else num_items_in_batch
        loss = objective.share(strategy.local_loss(loss), count, num_items, is_share, strategy)
        averages.note(logged.take(count, strategy.local_loss, is_mine, extras))
        if self._cached is None:
            run.backward(loss)
        else:
            around = self.compute_loss_context_manager if self.overrides_loss else contextlib.nullcontext
            self._cached.backward(loss, run.backward, f"{type(self).__name__}.compute_loss", around)
        logged.close()
        for name, value in extras.items():
            averages.add_share(name, weigh(value, count, num_items, 1, strategy.factor))
        ranks = strategy.gradient_ranks
        return loss.detach() if ranks == 1 else loss.detach() / ranks

    def turn_step(self, objective: Objective, inputs: Any, num_items_in_batch: Count | None, is_first: bool) -> Tensor:
        """Forward, loss and backward of one micro-batch in a turn; ``training_step`` of a module with turns.

        Args:
            objective: of the turn.
            inputs: a micro-batch as the data gave it.
            num_items_in_batch: items in the whole batch of the round over all ranks; None if this micro-batch is it.
            is_first: whether no other turn was given the micro-batch before.

        Returns:
            This micro-batch's share of the turn's mean loss, detached, 0-dim, on the device.
        """
        strategy, run = self.strategy, self._run
        assert run is not None
        averages, logged = run.averages, objective.logged
        count, is_mine = objective.count(inputs), not isinstance(inputs, StandIn)
        if is_first:
            averages.count(count, self._count_tokens(inputs))
        logged.open()
        inputs = strategy.to_device(inputs.batch if isinstance(inputs, StandIn) else inputs)
        loss, extras = self.turn_loss(objective, inputs, num_items_in_batch)
        is_share = objective.note()[1] and not (isinstance(count, int) and count == 0)
        num_items = count if num_items_in_batch is None else num_items_in_batch
        loss = objective.share(strategy.local_loss(loss), count, num_items, is_share, strategy)
        taken = {*extras, *(f"loss_{turn.name}" for turn in run.turns or ())}
        averages.note(logged.take(count, strategy.local_loss, is_mine, taken))
        run.backward(loss)
        logged.close()
        for name, value in extras.items():
            averages.add_share(name, weigh(value, count, num_items, 1, strategy.factor))
        ranks = strategy.gradient_ranks
        return loss.detach() if ranks == 1 else loss.detach() / ranks

    def turn_loss(
        self, objective: Objective, inputs: Any, num_items: Count | None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of a micro-batch in a turn, and the other entries of a mapping loss."""
        strategy = self.strategy
        with strategy.forward_context():
            return objective.loss(strategy.model, strategy.precision.cast_batch(inputs), num_items)

    def find_loss(
        self, model: nn.Module, inputs: Any, count: Count, num_items: Count | None = None, wants_outputs: bool = False
    ) -> tuple[Tensor, Any, Mapping[str, Tensor], bool]:
        """Find the loss of one micro-batch by ``compute_loss``, Fit's own or an overridden one.

        Args:
            model: the placed model.
            inputs: on the device.
            count: items in the micro-batch.
            num_items: items in the whole update; None if this batch is all of it.
            wants_outputs: also return what forward returned.

        Returns:
            (loss, outputs, extras, is_share): outputs None where they aren't wanted, or not returned; extras by name,
            0-dim; whether the loss is divided by ``num_items`` already.
        """
        objective, outputs = self.objective, None
        if not self.overrides_loss:
            loss = self.compute_loss(model, inputs, wants_outputs, num_items)
            if wants_outputs:
                loss, outputs = loss
            return loss, outputs, *objective.note()
        objective.forget_note()
        at_least = max(count, 1) if isinstance(count, int) else count.clamp(min=1)
        with self.compute_loss_context_manager():
            found = self.compute_loss(
                model,
                overriding.own_inputs(inputs),
                return_outputs=wants_outputs,
                num_items_in_batch=at_least if num_items is None else num_items,
            )
        loss, outputs, own_extras = overriding.loss_and_outputs(found)
        extras, is_share = objective.note() if objective.noted else (NO_EXTRAS, self.override_divides)
        return loss, outputs, {**extras, **own_extras}, is_share

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Count | None = None
    ) -> Any:
        """Forward and loss of one micro-batch, in the run's precision. Override it to compute the loss otherwise, with
        or without this method's help: training, evaluation and ``predict`` follow it (docs/overriding.md).

        Args:
            model: the placed model.
            inputs: on the device.
            return_outputs: also return what forward returned.
            num_items_in_batch: items in the whole update; handed to a loss that names it.

        Returns:
            The 0-dim mean loss, or (loss, outputs). An override may return a mapping that holds "loss" in its place.
            One that reads ``num_items_in_batch``, and doesn't call this method, returns a sum over items divided by it.
        """
        objective = self._objective
        assert objective is not None
        with self.strategy.forward_context():
            outputs = objective.forward(model, inputs)
            loss, _ = objective.loss(outputs, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def compute_loss_context_manager(self) -> contextlib.AbstractContextManager[Any]:
        """Entered around an overridden ``compute_loss``: the run's precision, and the strategy's own operators."""
        return self.strategy.forward_context()

    # Data.

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Count | None]:
        """The next update's micro-batches, and how many items they hold over all ranks.

        Args:
            epoch_iterator: over this rank's micro-batches.
            num_batches: at most this many; fewer at the end of an epoch, none after it.
            device: where a count summed over ranks is put.

        Returns:
            (batches, num_items); num_items is a tensor on the device where there are several ranks. It is None where
            no micro-batch is weighed against another.
        """
        run, objective = self._run, self._objective
        assert run is not None and objective is not None
        return read_update(run, objective, self._saver, epoch_iterator, num_batches, device)

    def get_train_dataloader(self) -> Any:
        """The stream of training batches of this rank. An override may return a DataLoader, a Dataset or an
        IterableDataset, which is then taken as ``train_data`` would be.
        """
        return self.stream_over(self.train_data, training=True)

    def get_eval_dataloader(self, data: Any) -> Any:
        """The stream of evaluation batches of this rank; an override as for training. Called for each evaluation."""
        return self.stream_over(data, training=False)

    def stream_over(self, data: Any, *, training: bool) -> DataStream:
        """A stream as it is, and a stream over any other data."""
        if isinstance(data, DataStream):
            return data
        rest = self.args, self.strategy, self.data_collator
        return make_stream(data, *rest, training=training, batches=self.plan.batches)

    def batches(self, stream: DataStream, epoch: int) -> Iterator[Any]:
        """This rank's micro-batches of one epoch, each cut to the rank's part where ranks share samples."""
        split = self.strategy.split_batch
        return (
            StandIn(split(batch.batch)) if isinstance(batch, StandIn) else split(batch) for batch in stream.epoch(epoch)
        )

    # Logs.

    def log_training(self) -> None:
        """Log the means since the last log, the last norm and the learning rate of the last update."""
        run = self.run
        run.report_updates()
        if logs := run.training_log():  # none at an epoch's end right after a log
            self.log(logs)
        run.end_if_it_must()

    def log(self, logs: dict[str, float]) -> None:
        """Hand numbers to callbacks and loggers, as of the current update."""
        logs = {**logs, "epoch": round(self.state.epoch, 6)}
        self.emit("on_log", logs=logs)
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.loggers.log(logs, self.state.global_step)

    def emit(self, event: str, **context: Any) -> None:
        """Tell the callbacks that listen to an event."""
        if self.callbacks.listeners[event]:
            self.callbacks.emit(event, self.plan.args, self.state, self.control, fit=self, **context)

    # Evaluation.

    def evaluate(
        self, eval_data: Any = None, ignore_keys: Iterable[str] | None = None, metric_key_prefix: str = "eval",
        weights: Average | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Loss and metrics over held-out data.

        Args:
            eval_data: None means the Fit's own. A mapping holds several sets by name; their metrics carry it:
                "eval_<name>_loss".
            ignore_keys: entries of a mapping output that are left out of predictions.
            metric_key_prefix: of the names.
            weights: an Average among the callbacks, whose weights are evaluated instead of the module's own.

        Returns:
            ``{"eval_loss": mean over all items, "eval_<metric>": ...}``; it is logged too.
        """
        overfits = eval_data is None and self.args.overfit_batches is not None
        if eval_data is None and self.eval_data is None and not overfits:
            raise ValueError("There is nothing to evaluate on: pass eval_data= to Fit, or to evaluate.")
        metrics: dict[str, float] = {}
        self.follow_counters()
        with self.placement.mode.evaluating(), using(weights, self.strategy):
            for name, part in sets_by_name(self.eval_data if eval_data is None else eval_data).items():
                prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
                batches = self.eval_batches(None if overfits else part, limited=True)
                metrics |= self.evaluation().run(batches, prefix, ignore_keys or ()).metrics
        self.log(metrics)
        self.emit("on_evaluate", metrics=metrics)
        return metrics

    def evaluate_in_training(self) -> dict[str, float]:
        """Evaluate with what ``train`` was told of evaluations."""
        return self.evaluate(ignore_keys=self.ignore_keys_for_eval)

    def predict(
        self,
        data: Any,
        ignore_keys: Iterable[str] | None = None,
        metric_key_prefix: str = "test",
        output: "str | Path | PredictionWriter | None" = None,
        weights: Average | None = None,
    ) -> PredictionOutput:
        """The module's outputs over all of ``data``, in its order, on the host, with labels and loss where it has them.

        Args:
            data: a Dataset, an IterableDataset or a ready DataLoader.
            ignore_keys, metric_key_prefix, weights: see ``evaluate``.
            output: writes them instead, batch by batch, and ``predictions`` is the path: of a Parquet file
                ("predictions.parquet") or a directory of safetensors files, see ``read_predictions``.
        """
        placement, batches = self.placement, self.eval_batches(data)
        self.follow_counters()
        written: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if output is not None:
            from .predictions import writing as of_predictions  # who writes none needn't import it

            written = of_predictions.written(output, self)
        with placement.mode.evaluating(), using(weights, self.strategy), written as writing:
            evaluation = self.evaluation(KeptOutputs if writing is None else writing.keep)
            metrics, predictions, labels = evaluation.run(batches, metric_key_prefix, ignore_keys or (), predict=True)
            predictions = predictions if writing is None else writing.finish(predictions)
        if metrics:
            self.log(metrics)
        self.emit("on_predict", metrics=metrics)
        return PredictionOutput(predictions, labels, metrics)

    def eval_batches(self, data: Any, limited: bool = False) -> Pass:
        """This rank's micro-batches of an evaluation; every rank has equally many. None: over what is trained on."""
        given = self.get_train_dataloader() if data is None else self.get_eval_dataloader(data)
        stream = self.stream_over(given, training=data is None)
        if limited:
            limit_evaluation(stream, self.args)
        return Pass(self.strategy, stream, self.batches(stream, 0), self._watch)

    def evaluation(self, keep: Any = KeptOutputs) -> Evaluation:
        """What evaluates the placed module; ``keep`` makes what keeps its outputs.

        Raises:
            ValueError: the module is trained in turns, and has no forward.
        """
        kind = type(self.module)
        if kind.forward is nn.Module.forward and self._turns is not None:
            raise ValueError(
                f"{kind.__name__} is trained in turns and defines no forward, by which evaluate and predict compute. "
                "Write forward, and for evaluate loss(self, outputs, batch)."
            )
        return Evaluation(
            self.strategy, self.module, self.objective, self.args, self.memory, self.find_loss,
            loss_name=f"{type(self).__name__}.compute_loss",
            compute_metrics=self.compute_metrics,
            preprocess_logits=self.preprocess_logits_for_metrics,
            after_batch=partial(self.emit, "on_prediction_step"),
            keep=keep,
        )  # fmt: skip

    # Checkpoints.

    def save_checkpoint(self, name: str | None = None) -> Path:
        """Save the run as ``<output_dir>/checkpoint-<update>``, then remove the oldest of its line beyond
        ``save_total_limit``. Outside of ``train`` it is there when this returns, with ``async_save`` too.

        Args:
            name: rotation never removes a checkpoint with a name, and ``resume_from_checkpoint=name`` finds it.
        """
        run, saver = self.run, self.saver
        run.settle_schedule()
        choice = None if self.choice is None else self.choice.to_dict()
        with self.placement.mode.evaluating():
            # The best evaluations are those of now: what is written in the background is published later.
            path = saver.save(
                partial(checkpoint.take, run, saver.directory.line, choice=choice),
                self.state.global_step,
                best.best_updates(self.args, self.state),
                name,
            )
        if run.rescue is not None:
            run.rescue.note_saved(self.state.global_step)
        self.emit("on_save", path=path)
        return path
