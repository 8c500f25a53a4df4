"""Fit: joins a module, data, a strategy and a precision, and trains, evaluates, predicts and saves."""

import contextlib
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..precision.base import Precision
from ..precision.registry import get_precision
from ..strategies.base import Strategy
from ..strategies.launch import start_ranks
from ..strategies.registry import get_strategy
from . import (
    batch_size,
    beginning,
    best,
    checkpoint,
    evaluation,
    fresh,
    journal,
    loop,
    overriding,
    pretrained,
    random_state,
    torch_settings,
)
from .agreement import UpdateExchange, check_ranks_agree, on_all_ranks
from .arguments import FitArguments
from .averages import Averages
from .callbacks import Callback, Callbacks
from .closure import Closure
from .combinations import check_combination, check_optimizer_by_name, check_precision
from .data import DataStream, make_stream
from .in_step import InStep
from .loggers import Logger, Loggers, get_loggers
from .memory import MemoryByStage
from .micro_batches import read_update
from .module import TrainModule
from .objective import NO_EXTRAS, Count, Objective, Weightless, weigh, without_loss
from .optimizer_mode import OptimizerMode
from .rescue import Rescue
from .run_length import run_length
from .schedulers import waits_for_metric
from .search.options import SearchOptions, Space
from .search.results import SearchOutput
from .search.space import begin_own, begin_trial
from .state import Control, PredictionOutput, TrainOutput, TrainState
from .tokens import TokenCounter


class Fit:
    """Trains a module: give it the module and the data, and pick placement and number format by a word each.

    Args:
        module: a TrainModule. None where ``module_init`` makes it.
        train_data: a Dataset, an IterableDataset or a ready DataLoader (which brings its own batch size and order).
        eval_data: the same, for ``evaluate``; or several, in a mapping by name.
        strategy: "single", ... or an instance from stratagem.strategies.
        precision: "32-true", "bf16-mixed", "16-mixed", ... or an instance from stratagem.precision.
        devices: ranks on this machine. Where torchrun didn't start them, the calling script is run again once for each,
            and this process ends with their status. "auto" takes one for each accelerator.
        max_restarts: how often the ranks are started again after one of them failed.
        args: options; their defaults are FitArguments'.
        callbacks: Callback instances; they hear events in this order.
        loggers: names ("jsonl", "tensorboard") or Logger instances.
        compute_loss_func: (outputs, labels[, num_items_in_batch]) to loss, in place of the module's own.
        compute_metrics: (predictions, labels) of a whole evaluation, on the host, to numbers by name. Metrics that
            can be summed up batch by batch are better returned by the module's ``metrics()``.
        preprocess_logits_for_metrics: (outputs, labels) of a batch, on the device, to what is kept of the outputs for
            ``compute_metrics`` and ``predict``: their argmax instead of a vocabulary's logits. Outputs with one entry
            are given as that entry.
        module_init: makes the module: a function of an Optuna trial, which it may ask for parameters of its own, or of
            None where there is no trial. Each trial of a search, and each ``train()`` but the first, has a fresh one.
        **arguments: fields of FitArguments; they override ``args``.

    Attributes:
        module: the user's module. Its parameters may be sharded once training has begun.
        state: progress, as a TrainState.
        control: the flags that callbacks set.
        optimizer, scheduler: there once training has begun.

    Raises:
        TypeError, ValueError: an argument can't work; the message says why and what to write instead.

    Example:
        >>> options = FitArguments(max_steps=100, learning_rate=0.01, progress=False)
        >>> fit = Fit(Regressor(), train_data=dataset, strategy="single", precision="bf16-mixed", args=options)
        >>> fit.train(resume_from_checkpoint=True)
        TrainOutput(global_step=100, training_loss=..., metrics={...})
    """

    # Made by the module and the arguments (fresh.py).
    objective: Objective
    count_tokens: TokenCounter
    callbacks: Callbacks

    directory: "checkpoint.RunDirectory"  # of the last run that was begun

    # Set where a run begins (beginning.py).
    scheduler: LRScheduler
    optimizer_mode: OptimizerMode
    num_train_epochs: int
    parameter_count: int
    earlier_samples: int  # that were handed out in earlier epochs of this run
    initial_options: dict[int, dict[str, Any]]  # of the optimizer's groups, by parameter
    initial_state: dict[Any, dict[str, Any]]  # of an optimizer that has one from the start, as Adagrad
    initial_scaling: dict[str, Any]

    def __init__(
        self,
        module: TrainModule | None = None,
        train_data: Any = None,
        eval_data: Any = None,
        *,
        strategy: str | Strategy = "single",
        precision: str | Precision = "32-true",
        devices: int | str = "auto",
        max_restarts: int = 0,
        args: FitArguments | None = None,
        callbacks: Iterable[Callback] = (),
        loggers: Iterable[str | Logger] = ("jsonl",),
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[[Any, Tensor], Mapping[str, float]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        module_init: Callable[[Any], TrainModule] | None = None,
        **arguments: Any,
    ) -> None:
        overriding.check_fit(type(self), Fit)
        self.args = batch_size.checked((args or FitArguments()).replace(**arguments), train_data)
        self.requested = self.running = self.args  # as given, and of this run: max_steps is not resolved yet
        output_dir = Path(self.args.output_dir)
        taken = next((path for path in (output_dir, *output_dir.parents) if path.is_file()), None)
        if taken is not None:
            raise ValueError(f"output_dir={self.args.output_dir!r} can't be a directory: {str(taken)!r} is a file.")
        self.strategy, number_format = get_strategy(strategy), get_precision(precision)
        self.strategy.check_precision(number_format)  # set_up would refuse it when every rank is there, on each
        self.module = module = fresh.given_module(module, module_init, self.args.seed)
        self.module_init, self.compute_loss_func, self.compute_metrics = module_init, compute_loss_func, compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.own_trial: Any = None  # whose arguments are the Fit's own: the best one of a search
        self.given_callbacks = list(callbacks)
        check_combination(self.args, self.strategy, module, eval_data, compute_loss_func)
        overriding.check_module(type(module), TrainModule)
        overriding.warn_options_without_effect(
            type(self),
            Fit,
            {
                "compute_loss_func": compute_loss_func,
                "label_smoothing_factor": self.args.label_smoothing_factor,
                "past_index": self.args.past_index >= 0,
            },
        )
        start_ranks(self.strategy, devices, max_restarts)
        given_loggers = get_loggers(loggers)
        self.strategy.set_up(number_format)
        self.loggers = Loggers(given_loggers if self.strategy.is_main else ())
        weakref.finalize(self, self.loggers.close)  # where nobody calls close()
        check_precision(self.args, number_format)
        if self.args.tf32:
            torch_settings.check_tf32(self.strategy.device)
        self.placed = False
        fresh.equip(self)
        self.train_data, self.eval_data = train_data, eval_data
        check_ranks_agree(
            self.strategy,
            {
                "argument": self.args.to_dict(),
                "Fit": {"strategy": repr(self.strategy), "precision": repr(self.strategy.precision)},
                "data": {"train_data": length(train_data), "eval_data": length(eval_data)},
                "parameter": {name: f"{tuple(p.shape)} {p.dtype}" for name, p in module.named_parameters()},
            },
        )
        if train_data is not None:
            if self.args.save_strategy != "no":
                self.check_can_save()
            check_optimizer_by_name(self.args, self.strategy)
            self.stream = self.train_stream()
            beginning.resolve_length(self)
        if eval_data is not None:
            for data in eval_data.values() if isinstance(eval_data, Mapping) else [eval_data]:
                self.eval_stream(data)  # so that unusable data is refused now, not after an hour of training
        self.state = TrainState()
        self.control = Control()
        self.exchange = UpdateExchange(self.strategy, self.control, InStep(self.strategy, "train_data"))
        fresh.listen(self)
        self.averages = Averages(self.strategy)
        self.memory = MemoryByStage(self.strategy.device)
        self.epoch_index = 0
        self.grad_norm: Tensor | None = None
        self.schedule_is_due = False
        self.closure: Closure | None = None
        self.frozen: dict[str, Any] = {}  # fingerprints of what checkpoints leave out
        self.unplaced: fresh.Unplaced | None = None
        self.writer: checkpoint.BackgroundWriter | None = None
        self.rescue = Rescue(is_on=False)  # outside of training
        self._loss_was_checked = False
        self.overrides_loss = overriding.is_overridden(type(self), Fit, "compute_loss")
        self.override_divides = self.overrides_loss and overriding.reads_count(type(self), Fit)
        self.random_to_restore: dict[str, Any] | None = None
        self.has_trained = False
        self.emit("on_init_end")

    # Training.

    def train(
        self,
        resume_from_checkpoint: bool | str | Path | None = None,
        trial: Any = None,
        ignore_keys_for_eval: Iterable[str] | None = None,
    ) -> TrainOutput:
        """Train to the end of the run.

        A second call trains on from the weights that the first one left, with an optimizer and counters that begin
        anew; with ``module_init``, from a fresh module.

        Args:
            resume_from_checkpoint: True continues from the newest whole checkpoint of the last run in ``output_dir``
                (and begins anew where there is none); a path continues from that one, a URL ("s3://...") from a copy
                of it there.
            trial: fields of FitArguments to change for this run, in a mapping or a trial of Optuna's (a FixedTrial, a
                study's best one). The same on every rank. With ``module_init``, the run has a fresh module.
            ignore_keys_for_eval: entries of a mapping output that evaluation leaves out of predictions.

        Returns:
            Updates done, mean training loss, and run time and rates.

        Raises:
            CheckpointError: the checkpoint that was asked for is damaged or belongs to another model, or ``output_dir``
                is in use by another process.
        """
        if self.train_data is None:
            raise ValueError("This Fit has no train_data. Pass train_data= to Fit.")
        if trial is not None:
            begin_trial(self, trial)
        elif self.requested != self.running or (self.module_init is not None and self.has_trained):
            begin_own(self)
        self.has_trained = True
        self.ignore_keys_for_eval = tuple(ignore_keys_for_eval or ())
        with self.in_directory(resume_from_checkpoint) as path:
            return batch_size.find(self, path) if self.args.auto_find_batch_size else self.run(path)

    @contextmanager
    def in_directory(self, resume_from_checkpoint: bool | str | Path | None) -> Iterator[Path | None]:
        """Entered around a run: no other process trains in ``output_dir`` meanwhile. Gives the checkpoint that the run
        resumes from; see ``train``.
        """
        self.close_writer()
        self.directory = checkpoint.RunDirectory(self.strategy, self.args)
        with self.directory.at_work(resume_from_checkpoint) as path:
            try:
                yield path
            except BaseException:
                if self.writer is not None:  # what it writes is still this run's
                    with contextlib.suppress(Exception):
                        self.writer.finish()
                raise
            self.close_writer()

    def run(self, path: Path | None) -> TrainOutput:
        """Train from a checkpoint, or from the beginning where it is None, to the end of the run."""
        with torch_settings.of_run(self.args.full_determinism, self.args.tf32, self.strategy.device):
            beginning.begin(self, path)
            self.began, self.first_state = time.perf_counter(), journal.first_state(self)
            self.logged_at, self.tokens_logged = self.began, self.first_state.num_input_tokens_seen
            self.memory.begin("train")
            self.rescue = Rescue(self.args.save_on_exception)
            try:
                self.loggers.begin(self)
                loop.run(self)
                if self.args.load_best_model_at_end:
                    checkpoint.load_weights(self, best.checkpoint_to_load(self.args, self.state))
            except BaseException as error:
                self.rescue.save(self, error)
                with contextlib.suppress(Exception):  # the first error is the one to show
                    self.emit("on_exception", exception=error)
                if self.writer is not None:
                    self.writer.abandon()
                raise
            finally:
                self.loggers.flush()
        return TrainOutput(self.state.global_step, self.totals["train_loss"], self.totals)

    def hyperparameter_search(
        self,
        space: Space,
        objective: str | Sequence[str] | None = None,
        direction: str | Sequence[str] = "minimize",
        *,
        take: str = "best",
        n_trials: int | None = 20,
        timeout: float | None = None,
        storage: Any = None,
        study_name: str = "search",
        pruner: Any = None,
        sampler: Any = None,
        catch: tuple[type[Exception], ...] = (),
        remove_losing_checkpoints: bool = False,
        plot: bool = False,
    ) -> SearchOutput:
        """Search for the arguments that train best, with Optuna (Akiba et al., 2019; the extra ``search``).

        Each trial is a run in ``<output_dir>/<study_name>/trial-<number>``, with a fresh module (``module_init``'s, or
        the module as it was given), optimizer, data order and seed. Afterwards the Fit has the best trial's arguments,
        and ``train()`` repeats its run; with several objectives they stay, and the output has the Pareto front.

        Args:
            space: a trial to fields of FitArguments, or fields to Optuna's distributions.
            objective: the metric of an evaluation that counts, with or without "eval_"; None means "loss". Several
                give the Pareto front.
            direction: "minimize" or "maximize", for each objective.
            take: a run's "best" value of the objective, or its "last".
            n_trials: in the study, over all of its processes and whether completed, pruned or failed.
            timeout: seconds after which no trial is begun.
            storage: None keeps the study in memory. "sqlite:///search.db" or "journal:///path/search.log" keep it: a
                search that was killed goes on when it is run again, and several processes may run the same one, with
                the same ``output_dir``.
            study_name: in the storage, and of the directory.
            pruner: gives up trials whose evaluations are poor: "median", "successive_halving", "hyperband", or one of
                Optuna's; None gives up none.
            sampler: "tpe" (the default), "random", "nsga2", or one of Optuna's.
            catch: exceptions that fail a trial, and not the search.
            remove_losing_checkpoints: keep those of the best trials alone.
            plot: write pictures of history and importance into the study's directory. Needs matplotlib.

        Raises:
            ImportError: Optuna isn't installed.
            ValueError, TypeError: the search can't work; the message says why and what to write instead.

        Example:
            >>> found = fit.hyperparameter_search(
            ...     lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)},
            ...     n_trials=12, pruner="median", storage="sqlite:///search.db")
            >>> best = fit.train()  # with the best trial's arguments
        """
        from .search.running import Search

        options = SearchOptions(
            space, objective, direction, take, n_trials, timeout, storage, study_name, pruner, sampler, catch,
            remove_losing_checkpoints, plot,
        )  # fmt: skip
        return Search(self, options).run()

    def place(self) -> None:
        """Give the module to the strategy, once; its optimizer is made with it where there is something to train on."""
        if not self.placed:
            beginning.place(self)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer, once training has begun."""
        assert self.strategy.optimizer is not None, "the optimizer is made when training begins"
        return self.strategy.optimizer

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Count | None = None) -> Tensor:
        """Forward, loss and backward of one micro-batch.

        Args:
            model: the placed model.
            inputs: a micro-batch as the data gave it.
            num_items_in_batch: items in the whole update over all ranks; None if this batch is all of it.

        Returns:
            This micro-batch's share of the update's mean loss, detached, 0-dim, on the device.
        """
        count = self.objective.count(inputs)
        self.averages.count(count, self.count_tokens(inputs))
        if isinstance(inputs, Weightless):
            inputs = inputs.batch
        inputs = self.strategy.to_device(inputs)
        is_empty = isinstance(count, int) and count == 0  # all padding, or a stand-in
        if self.overrides_loss or is_empty:
            loss, outputs, extras, is_share = self.find_loss(model, inputs, count, num_items_in_batch, is_empty)
            if is_empty:
                loss = without_loss(loss, outputs)
        else:  # called from here: every frame between a user's forward and train is one more to read in a traceback
            loss = self.compute_loss(model, inputs, False, num_items_in_batch)
            extras, is_share = self.objective.note()
        loss = self.strategy.local_loss(loss)
        if not self._loss_was_checked:
            self.objective.check(loss)
            self._loss_was_checked = True
        ranks = self.strategy.gradient_ranks
        num_items = count if num_items_in_batch is None else num_items_in_batch
        if is_empty or not is_share:
            loss = weigh(loss, count, num_items, ranks, self.strategy.factor)
        elif ranks > 1:
            loss = loss * ranks
        self.strategy.backward(loss)
        for name, value in extras.items():
            self.averages.add_share(name, weigh(value, count, num_items, 1, self.strategy.factor))
        return loss.detach() if ranks == 1 else loss.detach() / ranks

    def find_loss(
        self, model: nn.Module, inputs: Any, count: Count, num_items: Count | None = None, wants_outputs: bool = False
    ) -> tuple[Tensor, Any, Mapping[str, Tensor], bool]:
        """The loss of one micro-batch by ``compute_loss``, Fit's own or an overridden one, in training and evaluation.

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
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Count | None = None,
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
        with self.strategy.forward_context():
            outputs = self.objective.forward(model, inputs)
            loss, _ = self.objective.loss(outputs, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def compute_loss_context_manager(self) -> contextlib.AbstractContextManager[Any]:
        """Entered around an overridden ``compute_loss``: the run's precision, and the strategy's own operators."""
        return self.strategy.forward_context()

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
        return read_update(self, epoch_iterator, num_batches, device)

    def settle_schedule(self) -> None:
        """Move the schedule for the last update, or count it as skipped, once it is known which."""
        if self.schedule_is_due:
            self.schedule_is_due = False
            if self.strategy.step_was_skipped():
                self.state.skipped_updates += 1
            elif not waits_for_metric(self.scheduler):
                self.scheduler.step()

    def end_training(self) -> None:
        """After the last update: the schedule settled, the weights those to use, every checkpoint on the disk, and the
        run's totals logged.
        """
        self.settle_schedule()
        self.strategy.settle_buffers()
        self.optimizer_mode.eval()
        self.close_writer()
        self.totals = journal.final_metrics(self, self.began, self.first_state)
        self.log(self.totals)

    def close_writer(self) -> None:
        """Wait for the checkpoint under way, and end the thread and the process group that wrote it. Collective."""
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.close()

    def begin_next_epoch(self) -> None:
        """The data stands at the beginning of the next epoch; a checkpoint saved from here on continues there."""
        self.epoch_index += 1
        self.earlier_samples += self.stream.samples
        self.stream.position = 0
        self.rescue.stand(self)

    def restore_random_state(self) -> None:
        """After a resume, once the data stands where it stood: the random state of that moment."""
        if self.random_to_restore is not None:
            random_state.restore(self.random_to_restore)
            self.strategy.restore_random_state(self.random_to_restore)
            self.random_to_restore = None

    def get_train_dataloader(self) -> Any:
        """The stream of training batches of this rank. An override may return a DataLoader, a Dataset or an
        IterableDataset, which is then taken as ``train_data`` would be.
        """
        return make_stream(self.train_data, self.args, self.strategy, training=True)

    def get_eval_dataloader(self, data: Any) -> Any:
        """The stream of evaluation batches of this rank; an override as for training. Called for each evaluation."""
        return make_stream(data, self.args, self.strategy, training=False)

    def train_stream(self) -> DataStream:
        """What ``get_train_dataloader`` gives, as a stream."""
        return self.as_stream(self.get_train_dataloader(), training=True)

    def eval_stream(self, data: Any) -> DataStream:
        """What ``get_eval_dataloader`` gives, as a stream."""
        return self.as_stream(self.get_eval_dataloader(data), training=False)

    def as_stream(self, data: Any, *, training: bool) -> DataStream:
        """A stream as it is, and a stream over any other data."""
        return data if isinstance(data, DataStream) else make_stream(data, self.args, self.strategy, training=training)

    def batches(self, stream: DataStream, epoch: int) -> Iterator[Any]:
        """This rank's micro-batches of one epoch, each cut to the rank's part where ranks share samples."""
        split = self.strategy.split_batch
        return (
            Weightless(split(batch.batch)) if isinstance(batch, Weightless) else split(batch)
            for batch in stream.epoch(epoch)
        )

    def get_total_train_batch_size(self, args: FitArguments) -> int:
        """Samples in an update over all data-parallel ranks; ranks that share a sample count once."""
        return self.stream.global_micro_batch * args.gradient_accumulation_steps

    def get_tp_size(self) -> int:
        """Ranks that hold one layer together."""
        return self.strategy.tensor_parallel_size

    def set_initial_training_values(
        self, args: FitArguments, dataloader: Any, total_train_batch_size: int
    ) -> tuple[int, int, int, float, bool, int | None, int]:
        """The length of a run, see RunLength: (num_train_epochs, num_update_steps_per_epoch, num_examples,
        num_train_samples, epoch_based, len_dataloader, max_steps).
        """
        return run_length(args, dataloader, total_train_batch_size)

    # Logs.

    def log_training(self) -> None:
        """Log the means since the last log, the last norm and the learning rate of the last update."""
        self.settle_schedule()
        logs = journal.training_log(self)
        if logs:  # none at an epoch's end right after a log
            self.log(logs)

    def log(self, logs: dict[str, float]) -> None:
        """Hand numbers to callbacks and loggers, as of the current update."""
        logs = {**logs, "epoch": round(self.state.epoch, 6)}
        self.emit("on_log", logs=logs)
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.loggers.log(self, logs, self.state.global_step)

    def add_callback(self, callback: Callback | type[Callback]) -> None:
        """Have a callback hear events from here on, after those that were given; of a class, an instance is made."""
        made = callback() if isinstance(callback, type) else callback
        self.callbacks.add(made)
        self.given_callbacks.append(made)

    def pop_callback(self, callback: Callback | type[Callback]) -> Callback | None:
        """Have a callback hear no more events, and hand it out.

        Args:
            callback: the instance, or a class, of which the first instance goes.

        Returns:
            The callback that is gone; None where there is none such.
        """
        found = self.callbacks.pop(callback)
        self.given_callbacks = [other for other in self.given_callbacks if other is not found]
        return found

    def remove_callback(self, callback: Callback | type[Callback]) -> None:
        """Have a callback hear no more events; see ``pop_callback``."""
        self.pop_callback(callback)

    def emit(self, event: str, **context: Any) -> None:
        """Tell the callbacks that listen to an event."""
        if self.callbacks.listeners[event]:
            self.callbacks.emit(event, self, **context)

    # Evaluation.

    def evaluate(
        self, eval_data: Any = None, ignore_keys: Iterable[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and metrics over held-out data.

        Args:
            eval_data: None means the Fit's own. A mapping holds several sets by name; their metrics carry it:
                "eval_<name>_loss".
            ignore_keys: entries of a mapping output that are left out of predictions.
            metric_key_prefix: of the names.

        Returns:
            ``{"eval_loss": mean over all items, "eval_<metric>": ...}``; it is logged too.
        """
        if eval_data is None and self.eval_data is None:
            raise ValueError("There is nothing to evaluate on: pass eval_data= to Fit, or to evaluate.")
        self.place()
        data = self.eval_data if eval_data is None else eval_data
        named = data if isinstance(data, Mapping) else {"": data}
        metrics: dict[str, float] = {}
        with self.optimizer_mode.evaluating():
            for name, part in named.items():
                prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
                metrics |= evaluation.run(self, self.eval_stream(part), prefix, ignore_keys or ())[0]
        self.log(metrics)
        self.emit("on_evaluate", metrics=metrics)
        return metrics

    def predict(
        self, data: Any, ignore_keys: Iterable[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """The module's outputs over all of ``data``, in its order, on the host, with labels and loss where it has
        them.
        """
        self.place()
        stream = self.eval_stream(data)
        with self.optimizer_mode.evaluating():
            found = evaluation.run(self, stream, metric_key_prefix, ignore_keys or (), predict=True)
        metrics, predictions, labels = found
        if metrics:
            self.log(metrics)
        self.emit("on_predict", metrics=metrics)
        return PredictionOutput(predictions, labels, metrics)

    # The end of a Fit.

    def close(self) -> None:
        """End what the Fit keeps open between two calls: its loggers, and the thread that writes checkpoints. The end
        of ``with Fit(...) as fit`` calls it, and the loggers are closed with the process at the latest. What is called
        afterwards opens anew what it needs. Every rank calls it.
        """
        self.close_writer()
        self.loggers.close()

    def __enter__(self) -> "Fit":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
        else:  # other ranks may not come here
            self.loggers.close()

    # Checkpoints.

    def check_can_save(self) -> None:
        """Refuse an ``output_dir`` that can't be written to now, not at the first checkpoint. Collective.

        Raises:
            ValueError: on every rank; the message names the directory and the reason.
        """

        def check() -> None:
            if self.strategy.is_main:
                checkpoint.check_can_write(Path(self.args.output_dir))

        on_all_ranks(self.strategy, check, ValueError)

    def save_checkpoint(self) -> Path:
        """Save the run as ``<output_dir>/checkpoint-<update>``, then remove the oldest of its line beyond
        ``save_total_limit``. Outside of ``train`` it is there when this returns, with ``async_save`` too.
        """
        self.settle_schedule()
        best_update = best.best_update(self.state)  # of now: written in the background, it is published later

        with self.directory.saving(self.state.global_step) as path:

            def published() -> None:
                if self.strategy.is_main:
                    self.directory.note_published(path)
                    self.callbacks.checkpoint_published(path)
                    self._rotate(best_update)

            with self.optimizer_mode.evaluating():
                snapshot = checkpoint.take(self)
                if self.args.async_save:
                    if self.writer is None:
                        self.writer = checkpoint.BackgroundWriter(self.strategy)
                    self.writer.start(snapshot, path, then=published)
                    if not self.directory.is_at_work:
                        self.writer.finish()
                else:
                    checkpoint.write(snapshot, path, self.strategy)
                    on_all_ranks(self.strategy, published, checkpoint.CheckpointError)
        self.rescue.saved(self.state.global_step)
        self.emit("on_save", path=path)
        return path

    def rotate_checkpoints(self) -> None:
        """Remove the oldest checkpoints of the run's line beyond ``save_total_limit``, but for the best one, the newest
        and those that a callback still needs. Collective.
        """

        def rotate() -> None:
            if self.strategy.is_main:
                self._rotate(best.best_update(self.state))

        on_all_ranks(self.strategy, rotate, checkpoint.CheckpointError)

    def _rotate(self, best_update: int | None) -> None:
        kept = best.best_checkpoint(self.args, best_update)
        self.directory.rotate(
            self.args.save_total_limit,
            keep=[kept] if kept else [],
            spare=self.callbacks.checkpoints_to_keep(),
        )

    def export(self, path: str | Path) -> Path:
        """Write the module's plain whole weights, by parameter name, as one safetensors file; only the trainable ones
        with ``save_only_trainable``.
        """
        self.place()
        path = Path(path).expanduser()
        with self.optimizer_mode.evaluating():
            checkpoint.export(self.strategy, path, only_trainable=self.args.save_only_trainable)
        return path

    def save_pretrained(self, directory: str | Path, **options: Any) -> Path:
        """Have a transformers or peft model write the directory that its ``from_pretrained`` loads. Every rank calls
        it. ``options`` are those of the model's own ``save_pretrained``.
        """
        self.place()
        directory = Path(directory).expanduser()
        with self.optimizer_mode.evaluating():
            pretrained.save_pretrained(self.strategy, directory, self.args.save_only_trainable, **options)
        return directory


def length(data: Any) -> int | None:
    """The number of samples, or batches of a loader; None where there is none."""
    try:
        return len(data)
    except TypeError:
        return None
