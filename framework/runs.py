"""Runs: one run of a Fit after another, each with a plan of its own, over a module that is placed, or placed anew."""

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..precision.base import Precision
from . import checkpoint, loop, overriding
from .agreement import check_ranks_agree
from .arguments import FitArguments
from .callbacks import Callback, Callbacks
from .combinations import check_combination, check_optimizer_by_name
from .data import DataStream
from .exchange import Exchange
from .fields.compilation import UPDATE
from .measures import best
from .measures.tokens import TokenCounter
from .module import TrainModule
from .run import elastic, resuming
from .run.cached_representations import make_objective
from .run.length import run_length
from .run.placement import MADE_IN_PLACING
from .run.plan import Plan
from .run.run import Run
from .search.space import arguments_and_module
from .state import TrainOutput
from .steps import Steps
from .switches import torch_settings
from .switches.preparation import callbacks_of
from .switches.ranks_agree import RanksAgree
from .turns import turns_of
from .watch.endings import Interrupted
from .watch.watch import Watch

if TYPE_CHECKING:
    from .configuration.written_run import WrittenRun
    from .profiling import Profiler
    from .run.program import UpdateProgram

BY_FIT_ALONE = ("auto_find_batch_size", "fast_dev_run")
"""Arguments that a Fit is made with, and a trial can't switch on."""


class Runs(Exchange):
    """What a Fit does between two runs: begins the next, takes the last one apart, changes arguments and module.

    Attributes:
        compute_loss_func: as it was given to Fit.
        own_args: the arguments that the Fit was given, or that a search has found for it.
        own_callbacks: the callbacks that the Fit was given.
        own_trial: what ``module_init`` is asked for where a run is the Fit's own: None, or the best trial of a search.
        written: what the run's own configuration file holds beside its arguments.
    """

    compute_loss_func: Callable[..., Tensor] | None
    own_args: FitArguments
    own_callbacks: list[Callback]
    own_trial: Any
    profiler: "Profiler | None"
    written: "WrittenRun"
    _trial_callbacks: tuple[Callback, ...]

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer, once training has begun."""
        assert self.strategy.optimizer is not None, "the optimizer is made when training begins"
        return self.strategy.optimizer

    @property
    def scheduler(self) -> LRScheduler:
        """The schedule of the learning rate, once training has begun."""
        return self.run.scheduler

    @property
    def grad_norm(self) -> Tensor | None:
        """The gradients' norm in the last update, before clipping, on the device; None where they aren't clipped."""
        return self.run.grad_norm

    # One run.

    @contextmanager
    def _in_directory(self, resume_from_checkpoint: bool | str | Path | None) -> Iterator[Path | None]:
        """Entered around a run: no other process trains in ``output_dir`` meanwhile. Gives the checkpoint that the run
        resumes from; see ``train``.
        """
        if self._saver is not None:
            self._saver.close()
        saver = self._saver = checkpoint.Saver(self.strategy, self.args, self.callbacks, self.loggers.note_checkpoint)
        launch = elastic.find_launch(self.strategy, self.args, self.run.stream)
        with Watch(self.strategy, self.args, self.state, saver) as watch:
            self._watch = watch
            try:
                with saver.directory.at_work(resume_from_checkpoint, launch) as path:
                    try:
                        self._keep_samples(saver.directory.launch)
                        yield path
                    except BaseException:
                        with contextlib.suppress(Exception):  # what it writes is still this run's
                            saver.finish()
                        raise
                    saver.close()
            finally:
                self._watch = None

    def _keep_samples(self, launch: "checkpoint.Launch") -> None:
        """Have a run that its launcher has started again, on other ranks, keep the samples of an update."""
        asked, stream, samples = self.args, self.run.stream, launch.global_batch
        if launch.keeps_samples and samples != stream.global_micro_batch * asked.gradient_accumulation_steps:
            args = elastic.with_global_batch(asked, stream, samples, self.train_data)
            elastic.explain(args, asked, self.strategy, samples)
            self.follow(self.plan.with_batch_size(args))

    def _write_configuration(self) -> None:
        """Write down, on the main process, what repeats the run, where the run leaves anything in its directory."""
        leaves = self.args.save_strategy != "no" or self.args.report
        if self.strategy.is_main and leaves and not self.args.fast_dev_run:
            self.written.write(self.plan.given)

    def train_from(self, path: Path | None) -> TrainOutput:
        """Train from a checkpoint, or from the beginning where it is None, to the end of the run."""
        with torch_settings.of_run(self.args, self.strategy.device):
            run = self._begin(path)
            assert self._watch is not None
            run.begin_training(self._watch)
            self.memory.begin("train")
            try:
                self.loggers.begin()
                self._write_configuration()
                loop.train(self, run, self._make_program(run))
                if self.args.load_best_model_at_end:
                    checkpoint.load_weights(self.strategy, best.checkpoint_to_load(self.args, self.state))
                self._tell_end("finish", self.control.stop_reason)
            except BaseException as error:
                if run.rescue is not None:
                    run.rescue.save(error, self.state.global_step, self._save_at_once)
                with contextlib.suppress(Exception):  # the first error is the one to show
                    self.emit("on_exception", exception=error)
                self.saver.abandon()
                interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
                self._tell_end("interrupt" if interrupted else "fail", one_line(error))
                self.loggers.flush(in_hurry=True)
                raise
            self.loggers.flush(in_hurry=bool(self._watch.wish))
        return TrainOutput(self.state.global_step, run.results["train_loss"], run.results)

    def _make_program(self, run: Run) -> "UpdateProgram | None":
        """Make what makes updates by one program, where ``torch_compile`` asks for that."""
        if self.args.torch_compile != UPDATE:
            return None
        from .run.program import UpdateProgram  # who doesn't ask for it needn't import it

        return UpdateProgram(run, self.objective, self._count_tokens, self.emit)

    def _tell_end(self, event: str, reason: str) -> None:
        self.loggers.event(event, self.state.global_step, {"reason": reason} if reason else {})

    def _begin(self, path: Path | None) -> Run:
        """Place the module and stand where the run begins, or continues from the checkpoint at ``path``."""
        saved = None if path is None else checkpoint.read_state(path)
        stream = self.run.stream
        run = self._follow(self.plan.settled(stream), stream)  # a resume may have set another length
        if path is not None and saved is not None:
            run = self._follow(resuming.compare(run, self.module, path, saved), stream)
        placement = self.placement
        placement.reset_optimizer(run.args)
        self.state.reset()
        if saved is not None and not run.plan.has_updates_of(saved, stream):
            stream.load_state_dict({"position": 0} if run.args.ignore_data_skip else saved["data"])
            run = self._follow(run.plan.resumed(saved, stream), stream)
        can_evaluate = self.eval_data is not None or run.args.overfit_batches is not None
        run.begin(placement, can_evaluate and run.args.eval_strategy != "no")
        if path is None or saved is None:
            run.begin_anew()
        else:
            run.go_on_from(path, saved)
        return run

    def follow(self, plan: Plan) -> None:
        """Have the next run follow a plan, over data that it cuts anew.

        Raises:
            ValueError: the data can't be cut so, or the run has no length.
        """
        self.plan = plan
        if self._objective is None:
            self._interpret_module()
        stream = self.stream_over(self.get_train_dataloader(), training=True)
        self._follow(plan.settled(stream), stream)

    def _follow(self, plan: Plan, stream: DataStream) -> Run:
        self.plan = plan
        self._run = Run(plan, self.strategy, stream, self.state, self.control, self.callbacks, self._turns)
        return self._run

    def _save_at_once(self) -> Path:
        path = self.save_checkpoint()
        self.saver.close()
        return path

    # Its checkpoints.

    def rotate_checkpoints(self) -> None:
        """Remove the oldest checkpoints beyond ``save_total_limit``; ``Saver.rotate`` says which stay. Collective."""
        self.saver.rotate(best.best_updates(self.args, self.state))

    # The length of a run, under transformers' names.

    def get_total_train_batch_size(self, args: FitArguments) -> int:
        """Samples in an update over all data-parallel ranks; ranks that share a sample count once."""
        return self.run.stream.global_micro_batch * args.gradient_accumulation_steps * self.plan.batches

    def get_tp_size(self) -> int:
        """Ranks that hold one layer together."""
        return self.strategy.tensor_parallel_size

    def set_initial_training_values(
        self, args: FitArguments, dataloader: Any, total_train_batch_size: int
    ) -> tuple[int, int, int, float, bool, int | None, int]:
        """The length of a run, see RunLength: (num_train_epochs, num_update_steps_per_epoch, num_examples,
        num_train_samples, epoch_based, len_dataloader, max_steps).
        """
        return run_length(args, dataloader, total_train_batch_size, self.plan.batches)

    # Another run than the last: a trial's, one with a smaller batch. Search and auto_find_batch_size call these.

    def take_apart(self) -> None:
        """Undo what a run made, and what placing did: no memory, connection or thread of it is left on this rank. The
        module is what it was where there is a copy; one of ``module_init`` is gone, and another must come.
        """
        if self._objective is None:  # it was taken apart already
            return
        if self._saver is not None:
            self._saver.let_go()
        if self._placement is not None:
            self._placement.reset_scaling()  # else the next placement begins with the scale that this one ended with
        # A worker process that loads data would keep this rank's connections open, as it has inherited them.
        self._placement = self._run = self._objective = None
        self.strategy.release(self.module)
        self.source.give_back()
        if self.args.torch_compile:
            torch.compiler.reset()
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.memory.empty_cache()

    def begin_afresh(
        self, args: FitArguments, module: TrainModule | None = None, callbacks: Iterable[Callback] = ()
    ) -> None:
        """Have the next run of a Fit that was taken apart follow other arguments.

        Args:
            args: of the run.
            module: a fresh one; None trains the one that there is, as it was given.
            callbacks: of this run alone, after those of the Fit.

        Raises:
            ValueError: the arguments can't work with the module, the data or the strategy.
        """
        if module is not None:
            self.source.take(module)
        self.control.set([0] * len(self.control.flags()))
        self._trial_callbacks = tuple(callbacks)
        self._change_arguments(args)

    def take_own(self, args: FitArguments, trial: Any) -> None:
        """Have arguments be the Fit's own, and the trial what ``module_init`` is asked for from here on."""
        self.own_args, self.own_trial = args, trial
        self._take_own()

    def train_trial(self) -> TrainOutput:
        """Train on from the newest checkpoint of a trial that a process began which has died, or from the beginning."""
        self.ignore_keys_for_eval = ()
        with self._in_directory(resume_from_checkpoint=True) as path:
            return self.train_from(path)

    def make_module(self, trial: Any, seed: int) -> TrainModule | None:
        """A fresh module for a trial; None where there is no ``module_init``, and the one that was given is taken."""
        return None if self.source.module_init is None else self.source.make(trial, seed)

    def _take_trial(self, trial: Any) -> None:
        """Have the next run be a trial's: with its arguments and, where there is a ``module_init``, a fresh module."""
        args, module = arguments_and_module(trial, self.own_args, self.source)
        check_ranks_agree(self.strategy, {"argument of the trial": args.to_dict()})
        if module is not None:
            self._check_together(args, module, self.strategy.precision)
            if self.placed:
                self.take_apart()
            self.begin_afresh(args, module)
        elif args != self.plan.given:
            self._change_arguments(args)

    def _take_own(self) -> None:
        """Have the next run be the Fit's own again, after one of a trial."""
        args = self.own_args
        module = self.make_module(self.own_trial, args.seed)
        if module is None:
            self._change_arguments(args)
        else:
            self.take_apart()
            self.begin_afresh(args, module)

    def _change_arguments(self, args: FitArguments) -> None:
        """Let the next run have other arguments than the last.

        Raises:
            ValueError: they can't work with the module, the data or the strategy, or come too late.
        """
        self._check_together(args, self.module, self.strategy.precision)
        check_optimizer_by_name(args, self.strategy, turns_of(self.module))
        for name in BY_FIT_ALONE:
            if getattr(args, name) and not getattr(self.own_args, name):
                raise ValueError(f"{name} can't be switched on by a trial. Write Fit({name}={getattr(args, name)}).")
        late = [name for name in MADE_IN_PLACING if getattr(args, name) != getattr(self.plan.given, name)]
        if self.placed and late:
            raise ValueError(
                f"{', '.join(late)}: the module was placed, and its optimizer made, by an earlier run of this Fit with "
                "another choice. Write Fit(module_init=...), which makes a fresh module for each trial, or another Fit."
            )
        self.plan = Plan.of(args)
        self._interpret_module()
        self._collect_callbacks()
        self.follow(self.plan)
        if self._placement is not None:
            self._placement.take_options(self.args)

    # What follows from the arguments and the module.

    def _interpret_module(self) -> None:
        """Make what follows from the module and the arguments: how a loss is found, and what is counted.

        Raises:
            ValueError: the strategy can't place such a module.
        """
        args, module = self.args, self.module
        if not self.placed and type(module).build is TrainModule.build:  # else its layers are still to come
            self.strategy.check_module(module)
        turns = self._turns = turns_of(module)
        self.plan = self.plan.of_batches(1 if turns is None else turns.batches)
        if turns is not None and not self.placed and type(module).build is TrainModule.build:
            turns.moved(module)  # what it refuses is refused now, not when the module is placed
        self._of_run = module._enter_run(self.strategy.device)
        self._objective, self._cached = make_objective(module, args, self.strategy, self.compute_loss_func)
        self._count_tokens = TokenCounter(module, args, warns=self.strategy.is_main)

    def _collect_callbacks(self) -> None:
        """Gather the callbacks: what arguments stand for, those given, what shows progress and what compares ranks."""
        args, strategy = self.args, self.strategy
        first = [*callbacks_of(args), *self.own_callbacks, *self._trial_callbacks]
        last: list[Callback] = []
        if self.profiler is not None:
            from .profiling.callback import Profiling

            first.insert(0, Profiling(self.profiler))
        if args.progress and strategy.is_main:
            from .display.progress import Progress

            last.append(Progress())
        if strategy.world_size > 1 and strategy.replicas_agree:
            last.append(RanksAgree(args.debug == "ranks_agree"))
        self.callbacks = Callbacks(first, last)

    def _check_together(self, args: FitArguments, module: TrainModule, precision: Precision) -> None:
        check_combination(args, self.strategy, module, self.eval_data, self.compute_loss_func, precision)
        overriding.check_called(type(self), Steps, args.torch_compile == UPDATE, turns_of(module) is not None)


def one_line(error: BaseException) -> str:
    """Write an exception in a line: its class, and the beginning of what it says."""
    if isinstance(error, Interrupted):
        return str(error)
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:500]}" if said else type(error).__name__
