"""The search itself: the main process asks and tells, every rank runs each trial from a fresh start.

Whatever only the main process does (the study, the space, the module's own parameters) ends on all ranks in the same
way. A trial that fails on one rank is met as auto_find_batch_size meets a full memory: the others are woken, and all
meet again in another process group; see ``strategies/meeting.py``.
"""

import contextlib
import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from .. import checkpoint
from ..arguments import FitArguments
from ..callbacks import Callback
from ..module import TrainModule
from ..printing import say
from ..run.attempts import forget_frames
from ..run.in_step import OtherRankError
from ..state import Control, TrainState
from .options import SearchOptions, import_optuna
from .reporting import draw_pictures, print_table, progress_line, write_hparams
from .results import SearchOutput
from .searched_fit import SearchedFit
from .study import Proposal, Study

Result = TypeVar("Result")


class MainProcessError(RuntimeError):
    """What failed on the main process, on the other ranks.

    Args:
        said: what it failed with.
        is_caught: whether the search goes on after it.
    """

    def __init__(self, said: str, is_caught: bool) -> None:
        super().__init__(said)
        self.is_caught = is_caught


class Report(Callback):
    """Tells the study of each evaluation in training, and ends a trial that it gives up.

    Args:
        options: of the search.
        trial: of Optuna; None on other ranks than the main one.
    """

    def __init__(self, options: SearchOptions, trial: Any) -> None:
        self.options = options
        self.trial = trial if len(options.metrics) == 1 else None  # Optuna takes reports of one objective only
        self.is_pruned = False

    def on_train_begin(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """A trial that is run again, from its checkpoint on, reports what was evaluated before."""
        for log in state.log_history:
            if self.options.metrics[0] in log:
                self.report(log[self.options.metrics[0]], log["step"])

    def on_evaluate(
        self, args: FitArguments, state: TrainState, control: Control, *, metrics: Mapping[str, float], **context: Any
    ) -> None:
        """Report, and stop where the trial is to be pruned; the flag is agreed at once."""
        missing = [name for name in self.options.metrics if name not in metrics]
        if missing:
            raise ValueError(
                f"The objective {', '.join(missing)} isn't among what an evaluation gives: {', '.join(sorted(metrics))}"
            )
        if state.global_step == 0:  # before training: nothing to compare, and no moment at which ranks agree
            return
        self.report(metrics[self.options.metrics[0]], state.global_step)
        if self.trial is not None and state.global_step < state.max_steps and self.trial.should_prune():
            self.is_pruned = True
            control.stop_training("the search gave the trial up")

    def on_train_end(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Evaluate a run at its end that had no evaluation."""
        if not any(self.options.metrics[0] in log for log in state.log_history):
            fit.evaluate()

    def report(self, value: float, step: int) -> None:
        """Report a number; others tell a pruner nothing."""
        if self.trial is not None and value == value:
            self.trial.report(value, step)


class Search:
    """A search of a Fit. Every rank makes one and runs it.

    Args:
        fit: whose module was not placed yet, or that has a ``module_init``.
        options: of the search.
    """

    def __init__(self, fit: SearchedFit, options: SearchOptions) -> None:
        if fit.train_data is None or fit.eval_data is None:
            raise ValueError("A search trains and evaluates. Pass train_data= and eval_data= to Fit.")
        if fit.own_args.fast_dev_run:
            raise ValueError(
                f"fast_dev_run={fit.own_args.fast_dev_run} makes a few updates, by which a search can't choose. Try "
                "fit.train() with it, and leave it out for the search."
            )
        if options.pruner is not None and fit.own_args.eval_strategy == "no":
            raise ValueError(
                f"pruner={options.pruner!r} compares evaluations in the middle of runs, and eval_strategy='no'. Write "
                "eval_strategy='steps' or 'epoch', or leave pruner out."
            )
        if fit.placed and not fit.source.can_begin_again:
            raise ValueError(
                "This Fit's module was placed by an earlier run, and a search begins each trial with the module as it "
                "was made. Search before train or evaluate, or write Fit(module_init=...), which makes a fresh one."
            )
        self.fit, self.options, self.base = fit, options, fit.own_args
        self.callback_states = copy.deepcopy(fit.callbacks.state_dict())
        self.study: Study | None = None  # on the main process
        self.is_shown = fit.own_args.progress

    def run(self) -> SearchOutput:
        """Run trials until the search is over. Afterwards the Fit has the best one's arguments."""
        fit = self.fit
        if fit.placed:
            fit.take_apart()
        elif not fit.source.can_begin_again:
            fit.source.keep_copy()
        try:
            self.on_main(self.open)
            while (proposal := self.on_main(self.ask)) is not None:
                self.run_trial(proposal)
        finally:
            if self.study is not None:
                self.study.release()
            fit.take_apart()
            self.begin(self.base, fit.make_module(fit.own_trial, self.base.seed))
        output = self.on_main(self.end)
        if output.best is not None:
            self.take_best(output)
        return replace(output, study=self.study.study) if self.study is not None else output

    def open(self) -> None:
        """Open the study."""
        self.study = Study(self.options, self.base)

    def ask(self) -> Proposal | None:
        """The next trial."""
        assert self.study is not None
        return self.study.propose()

    def run_trial(self, proposal: Proposal) -> None:
        """Run a trial, and tell the study how it went.

        Raises:
            Exception: what it failed with, unless it is one that the search catches.
        """
        fit, strategy, study = self.fit, self.fit.strategy, self.study
        trial = None if study is None else study.trial
        report = Report(self.options, trial)
        error: BaseException | None = None
        try:
            with strategy.attempt():
                self.begin(proposal.args, self.make_module(trial, proposal), report)
                fit.train_trial()
                strategy.sum_on_host([0])  # a rank that is done must hear of one that failed after it
        except BaseException as caught:
            error = caught
        if error is None:
            values = [self.options.value(i, self.history(name)) for i, name in enumerate(self.options.metrics)]
            fit.take_apart()
            self.on_main(lambda: self.tell(values, report.is_pruned))
            return
        is_caught = isinstance(error, self.options.catch) or getattr(error, "is_caught", False)
        if not isinstance(error, Exception):
            raise error  # an interrupt: the trial is run again by the search that continues this one
        if isinstance(error, OtherRankError):
            reason = strategy.hear_failure()
        else:
            reason = strategy.tell_failure(f"{type(error).__name__}: {error}" if is_caught else None)
        if reason is None:
            if study is not None:
                with contextlib.suppress(Exception):  # the first error is the one to show
                    study.tell_failure(error)
            raise error
        forget_frames(error)  # their variables hold tensors
        fit.take_apart()
        strategy.begin_again()
        self.on_main(lambda: self.tell_failure(reason))

    def begin(self, args: FitArguments, module: TrainModule | None, *more: Callback) -> None:
        """Give the Fit other arguments, its callbacks as they were before the search, and some more."""
        self.fit.loggers.close(waits=False)  # a trial's life is over; the next has a directory of its own
        self.fit.begin_afresh(args, module, more)
        self.fit.callbacks.load_state_dict(copy.deepcopy(self.callback_states))

    def make_module(self, trial: Any, proposal: Proposal) -> TrainModule | None:
        """The trial's own module. What ``module_init`` asks the trial for on the main process, other ranks are given;
        there, it asks a FixedTrial.
        """
        source, seed = self.fit.source, proposal.args.seed
        if source.module_init is None:
            return None
        made: list[TrainModule] = []

        def on_main() -> dict[str, Any]:
            made.append(source.make(trial, seed))
            return dict(trial.params)

        params = self.on_main(on_main)
        if not made:
            made.append(source.make(import_optuna().trial.FixedTrial(params, proposal.number), seed))
        return made[0]

    def history(self, name: str) -> list[float]:
        """A metric in each evaluation of the run, in order."""
        return [log[name] for log in self.fit.state.log_history if name in log]

    def tell(self, values: list[float], is_pruned: bool) -> None:
        """The study is told how a trial went; its HParams are written, and it is shown."""
        assert self.study is not None
        self.study.tell(values, is_pruned)
        self.after_trial()

    def tell_failure(self, reason: str) -> None:
        """The same for one that failed."""
        assert self.study is not None
        self.study.tell_failure(reason)
        self.after_trial()

    def after_trial(self) -> None:
        """Write and show what is known of the last trial, and remove checkpoints that no one is to load."""
        assert self.study is not None
        output = self.study.output()
        trial = next(each for each in output.trials if each.number == self.study.trial.number)
        if trial.values:
            write_hparams(trial, output.objectives)
        if self.is_shown:
            say(progress_line(trial, output, self.options))
        if self.options.remove_losing_checkpoints:
            kept = {each.directory for each in (output.best, *output.pareto) if each is not None}
            for each in output.trials:
                if each.state in ("complete", "pruned", "failed") and each.directory not in kept:
                    remove_checkpoints(each.directory)

    def end(self) -> SearchOutput:
        """Show the results."""
        assert self.study is not None
        output = self.study.output()
        if self.is_shown:
            print_table(output)
        if self.options.plot:
            draw_pictures(self.study.study, output, self.study.directory)
        if not any(trial.state == "complete" for trial in output.trials):
            say(f"No trial of {output.study_name!r} was completed: the arguments stay as they were.", sys.stderr)
        return output

    def take_best(self, output: SearchOutput) -> None:
        """Give the Fit the best trial's arguments and, where it has a ``module_init``, its module."""
        fit, best = self.fit, output.best
        assert best is not None
        fit.callbacks.load_state_dict(copy.deepcopy(self.callback_states))
        own_trial = import_optuna().trial.FixedTrial(best.params, best.number)
        fit.take_own(self.base.replace(**best.arguments), own_trial)

    def on_main(self, action: Callable[[], Result]) -> Result:
        """What only the main process does; its result on every rank. Collective.

        Raises:
            Exception: what it raised; on other ranks, a MainProcessError that says it.
        """
        strategy = self.fit.strategy
        error: Exception | None = None
        told: tuple[Any, str | None, bool] = (None, None, False)
        if strategy.is_main:
            try:
                told = (action(), None, False)
            except Exception as caught:
                error = caught
                told = (None, f"{type(error).__name__}: {error}", isinstance(error, self.options.catch))
        result, failure, is_caught = strategy.broadcast(told)
        if error is not None:
            raise error
        if failure is not None:
            raise MainProcessError(failure, is_caught)
        return result


def remove_checkpoints(directory: Path | None) -> None:
    """Remove a run's checkpoints, those of its own line; its logs stay."""
    for path in checkpoint.checkpoints_of_last_run(directory) if directory is not None else []:
        with contextlib.suppress(OSError):
            checkpoint.remove(path)
