"""Fit: joins a module, data, a strategy and a precision, and trains, evaluates, predicts and saves."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..precision.base import Precision
from ..precision.registry import get_precision
from ..strategies.base import Strategy
from ..strategies.launch import start_ranks
from ..strategies.registry import get_strategy
from . import first_checks, overriding
from .arguments import FitArguments
from .callbacks import Callback
from .combinations import check_optimizer_by_name
from .configured import Configured
from .data import as_dataset, sets_by_name
from .display.shown import Shown
from .fields.argument_ranges import names_in
from .loggers import Logger, Loggers, get_loggers
from .measures.memory import MemoryByStage
from .module import TrainModule
from .run import batch_size
from .run.plan import Plan
from .run.source import Source
from .search.options import SearchOptions, Space
from .search.results import SearchOutput
from .state import Control, TrainOutput, TrainState
from .switches import torch_settings
from .switches.trying import begin_trying
from .watch.requeue import check_requeue, requeued

if TYPE_CHECKING:
    from .configuration.configuration import Built
    from .profiling import Profiler


class Fit(Configured, Shown):
    """Trains a module: give it the module and the data, and pick placement and number format by a word each.

    Args:
        module: a TrainModule. None where ``module_init`` makes it.
        train_data: a Dataset, an IterableDataset or a ready DataLoader (which brings its own batch size and order); or
            samples by column: a mapping of tensors or numpy arrays, or a table of pyarrow's. See docs/data.md.
        eval_data: the same, for ``evaluate``; or several, in a mapping by name.
        strategy: "single", ... or an instance from stratagem.strategies. "auto" plans candidates and takes one of them;
            see docs/plan.md.
        precision: "32-true", "bf16-mixed", "16-mixed", ... or an instance from stratagem.precision.
        devices: ranks on this machine. Where torchrun didn't start them, the calling script is run again once for each,
            and this process ends with their status: what stands before Fit in it has run once more, unless ``stratagem
            launch --devices 2 train.py`` started them. "auto" takes one for each accelerator. After a rank was killed,
            a range ("1:2": the fewest and the most) goes on without it once, and then tries all again.
        max_restarts: how often the ranks are started again after one of them failed. The run then goes on from its own
            newest checkpoint, with as many samples in an update as before.
        args: options; their defaults are FitArguments'.
        callbacks: Callback instances; they hear events in this order.
        loggers: names ("jsonl", "csv", "tensorboard", "wandb", "mlflow", "trackio", "comet") or Logger instances; see
            docs/loggers.md. ``fit.loggers.image``, ``text``, ``histogram`` and ``table`` show more than numbers.
        profiler: "torch" (traces of some updates), "simple" (the time of each phase), or a TorchProfiler or
            SimpleProfiler with options; see docs/profiling.md. None costs nothing.
        data_collator: a list of samples to a batch, in place of torch's default, for training, evaluation and
            ``predict``; transformers' collators are such.
        compute_loss_func: (outputs, labels[, num_items_in_batch]) to loss, in place of the module's own.
        compute_metrics: (predictions, labels) of a whole evaluation, on the host, to numbers by name. It is called on
            the main process, and every rank is told the numbers. Metrics that can be summed up batch by batch are
            better returned by the module's ``metrics()``.
        preprocess_logits_for_metrics: (outputs, labels) of a batch, on the device, to what is kept of the outputs for
            ``compute_metrics`` and ``predict``: their argmax instead of a vocabulary's logits. Outputs with one entry
            are given as that entry.
        module_init: makes the module: a function of an Optuna trial, which it may ask for parameters of its own, or of
            None where there is no trial. Each trial of a search, and each ``train()`` but the first, has a fresh one.
        built_by: what ``from_config`` called for module and data, for the file that repeats the run.
        **arguments: fields of FitArguments; they override ``args``.

    Attributes:
        module: the user's module. Its parameters may be sharded once training has begun.
        state: progress, as a TrainState.
        control: the flags that callbacks set.
        optimizer, scheduler: there once training has begun.
        choice: why ``strategy="auto"`` took its strategy; None where one was named.

    Raises:
        TypeError, ValueError: an argument can't work; the message says why and what to write instead.

    Example:
        >>> options = FitArguments(max_steps=100, learning_rate=0.01, progress=False)
        >>> fit = Fit(Regressor(), train_data=dataset, strategy="single", precision="bf16-mixed", args=options)
        >>> fit.train(resume_from_checkpoint=True)
        TrainOutput(global_step=100, training_loss=..., metrics={...})
    """

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
        profiler: "str | Profiler | None" = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[[Any, Tensor], Mapping[str, float]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        module_init: Callable[[Any], TrainModule] | None = None,
        built_by: "Built | None" = None,
        **arguments: Any,
    ) -> None:
        overriding.check_fit(type(self), Fit)
        own = batch_size.with_loader_batch_size((args or FitArguments()).replace(**arguments), train_data)
        first_checks.check_output_dir(own.output_dir)
        self.strategy = chooser = get_strategy(strategy)
        self.asked, number_format = own, get_precision(precision)
        if chooser.chooses:
            from .planning import automatic  # who names a strategy plans nothing

            make = partial(Fit.__init__, self, module, train_data, module_init=module_init, precision=precision)
            make = partial(make, data_collator=data_collator, compute_loss_func=compute_loss_func)
            self.strategy, own, self.choice = automatic.choose_for(make, self, own, chooser, devices, max_restarts)
        self.profiler = self._find_profiler(profiler)
        self.strategy.check_precision(number_format)  # set_up would refuse it when every rank is there, on each
        self.source = Source(module, module_init, own.seed)
        self.train_data, self.eval_data = as_dataset(train_data), as_dataset(eval_data)
        self.data_collator = data_collator
        self.compute_loss_func, self.compute_metrics = compute_loss_func, compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.own_callbacks, self._trial_callbacks = list(callbacks), ()
        self.own_args, self.own_trial = own, None
        self.plan = Plan.of(own)
        self._check_together(own, self.module, number_format)
        self._check_overriding(own)
        if self.args.requeue:
            check_requeue()
        from .record.recorder import Recorder  # a Fit needs it, and who imports stratagem doesn't

        loggers = loggers if isinstance(loggers, str | Logger) else list(loggers)
        given_loggers = get_loggers(loggers)
        start_ranks(self.strategy, devices, max_restarts, names_in(own.preemption_signals), is_quiet=not own.progress)
        self.strategy.set_up(number_format)
        heard = self.strategy.is_main and not own.fast_dev_run
        self.loggers = Loggers(given_loggers if heard else (), self, Recorder(self) if heard else None)
        weakref.finalize(self, self.loggers.close)  # where nobody calls close()
        if own.tf32:
            torch_settings.check_tf32(self.strategy.device)
        self.state, self.control = TrainState(), Control()
        self.memory = MemoryByStage(self.strategy.device)
        self._placement = self._run = self._saver = self._watch = None
        self._interpret_module()
        first_checks.check_ranks_were_given_the_same(self)
        if train_data is not None:
            if self.args.save_strategy != "no":
                first_checks.check_can_save(self.strategy, self.args.output_dir)
            check_optimizer_by_name(own, self.strategy, self._turns)
        if eval_data is not None:
            for data in sets_by_name(eval_data).values():
                # So that unusable data is refused now, not after an hour of training.
                self.stream_over(self.get_eval_dataloader(data), training=False)
        self.ignore_keys_for_eval = ()
        self._collect_callbacks()
        if train_data is not None:
            self.follow(self.plan)
        self._has_trained = False
        from .configuration.written_run import written_by

        self.written = written_by(self, max_restarts, loggers, built_by)
        self._measure(chooser.candidates_to_measure)
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
                of it there, and a name ("before-surgery") from the one in ``output_dir`` that was saved with it.
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
            self._take_trial(trial)
        elif self.own_args != self.plan.given or (self.source.module_init is not None and self._has_trained):
            self._take_own()
        if self.args.requeue and resume_from_checkpoint is not True:
            raise ValueError(
                "requeue=True runs the program again after an interruption, and "
                f"train(resume_from_checkpoint={resume_from_checkpoint!r}) would begin at the same place each time. "
                "Write train(resume_from_checkpoint=True)."
            )
        if self.args.fast_dev_run:
            begin_trying(self.args, self.strategy, resume_from_checkpoint)
        self._has_trained = True
        self.ignore_keys_for_eval = tuple(ignore_keys_for_eval or ())
        with requeued(self.strategy, self.args.requeue), self._in_directory(resume_from_checkpoint) as path:
            return self._way_to_train(path)(path)

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
        if self.args.requeue and storage is None:
            raise ValueError(
                "requeue=True runs the program again after an interruption, and a search without storage= would begin "
                "anew. Write storage='sqlite:///search.db', or leave requeue out."
            )
        with requeued(self.strategy, self.args.requeue):
            return Search(self, options).run()

    # Callbacks.

    def add_callback(self, callback: Callback | type[Callback]) -> None:
        """Have a callback hear events from here on, after those that were given; of a class, an instance is made."""
        made = callback() if isinstance(callback, type) else callback
        self.callbacks.add(made)
        self.own_callbacks.append(made)

    def pop_callback(self, callback: Callback | type[Callback]) -> Callback | None:
        """Have a callback hear no more events, and hand it out.

        Args:
            callback: the instance, or a class, of which the first instance goes.

        Returns:
            The callback that is gone; None where there is none such.
        """
        found = self.callbacks.pop(callback)
        self.own_callbacks = [other for other in self.own_callbacks if other is not found]
        return found

    def remove_callback(self, callback: Callback | type[Callback]) -> None:
        """Have a callback hear no more events; see ``pop_callback``."""
        self.pop_callback(callback)

    # What is checked once.

    def _find_profiler(self, choice: "str | Profiler | None") -> "Profiler | None":
        if choice is None:
            return None
        from .profiling import get_profiler  # who measures nothing needn't import it

        return get_profiler(choice, self.strategy)

    def _check_overriding(self, args: FitArguments) -> None:
        """Warn of what a subclass, or the module's class, defines in vain, and note what it overrides."""
        kind = type(self)
        overriding.check_module(self.module, TrainModule)
        options = {
            "compute_loss_func": self.compute_loss_func,
            "label_smoothing_factor": args.label_smoothing_factor,
            "past_index": args.past_index >= 0,
        }
        overriding.warn_options_without_effect(kind, Fit, options)
        self.overrides_loss = overriding.is_overridden(kind, Fit, "compute_loss")
        self.override_divides = self.overrides_loss and overriding.reads_count(kind, Fit)

    # The end of a Fit.

    def close(self) -> None:
        """End what the Fit keeps open between two calls: its loggers, and the thread that writes checkpoints. The end
        of ``with Fit(...) as fit`` calls it, and the loggers are closed with the process at the latest. What is called
        afterwards opens anew what it needs. Every rank calls it.
        """
        if self._saver is not None:
            self._saver.close()
        self.loggers.close()

    def __enter__(self) -> "Fit":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
        else:  # other ranks may not come here
            self.loggers.close()
