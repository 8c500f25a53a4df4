"""The study of a search, on the main process: it proposes trials, and is told how they went.

What must not happen in two processes at once (opening a study, finding trials of dead processes, counting, proposing)
happens under a lock in the directory of the study, which its processes share. A process holds a claim on the trial that
it works on. A running trial without a claim was left by a process that died. It is run again, in its directory and with
its seed, from its newest checkpoint: as a new trial with the same parameters, since Optuna can't restart a trial.
"""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import random_state
from ..arguments import FitArguments
from .locks import Claim, is_claimed, locked
from .options import SearchOptions, import_optuna
from .results import SearchOutput, TrialResult
from .space import sampled

ARGUMENTS, ORIGIN, RETRY_OF, ERROR, SECONDS = (
    "arguments",
    "origin",
    "retry_of",
    "error",
    "seconds",
)  # attributes of a trial
DIRECTORY, METRICS = "directory", "metrics"  # attributes of the study
LOCK, CLAIM = "lock", "claim"  # files in the directories
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}


@dataclass(frozen=True)
class Proposal:
    """What a trial will run, as every rank is told.

    Attributes:
        number: the number of the trial.
        args: the arguments of its run.
        given: the fields that the trial set, its seed included.
    """

    number: int
    args: FitArguments
    given: dict[str, Any]


class Study:
    """Optuna's study with its directory, its locks and the trial that this process works on.

    Args:
        options: the options of the search.
        args: the arguments of the Fit, without those of a trial.

    Raises:
        ValueError: the storage holds a study of that name with other objectives, directions or in another directory.
    """

    def __init__(self, options: SearchOptions, args: FitArguments) -> None:
        self.optuna = import_optuna()
        self.options, self.args = options, args
        self.is_shared = options.storage is not None
        self.directory = self._choose_directory()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        self.trial: Any = None
        self.claim: Claim | None = None
        verbosity = self.optuna.logging.get_verbosity()
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        try:
            with self._lock():
                self.study = self.optuna.create_study(
                    storage=self._storage(),
                    sampler=None if isinstance(options.sampler, str) else options.sampler,
                    pruner=make_pruner(options.pruner),
                    study_name=options.study_name,
                    directions=options.directions,
                    load_if_exists=True,
                )
                self._check_is_the_same()
        finally:
            self.optuna.logging.set_verbosity(verbosity)

    def _choose_directory(self) -> Path:
        """Choose the directory of the study. A study in memory, which ends with its process, gets a new one."""
        base = Path(self.args.output_dir) / self.options.study_name
        found, count = base, 1
        while not self.is_shared and found.exists():
            count += 1
            found = base.with_name(f"{base.name}-{count}")
        return found

    def _lock(self) -> Any:
        return locked(self.directory / LOCK) if self.is_shared else nullcontext()

    def _storage(self) -> Any:
        url = self.options.storage
        if not isinstance(url, str):
            return url
        if url.startswith("journal://"):
            from optuna.storages.journal import JournalFileBackend

            path = Path(url.removeprefix("journal://"))
            path.parent.mkdir(parents=True, exist_ok=True)
            return self.optuna.storages.JournalStorage(JournalFileBackend(str(path)))
        if "://" not in url:
            raise ValueError(
                f"storage={url!r} is no URL. Write 'sqlite:///{url}' for a database in that file, or 'journal://{url}' "
                "for Optuna's journal file, which suits network file systems better."
            )
        # Processes that share a study wait for the writes of the others instead of failing.
        waits = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
        return self.optuna.storages.RDBStorage(url, engine_kwargs=waits)

    def _check_is_the_same(self) -> None:
        """Compare a study that exists with this search, and write down what a new study is for."""
        found = [direction.name.lower() for direction in self.study.directions]
        metrics = self.study.user_attrs.get(METRICS, self.options.metrics)
        if found != self.options.directions or metrics != self.options.metrics:
            raise ValueError(
                f"The storage holds a study {self.options.study_name!r} that seeks to {' and '.join(found)} "
                f"{', '.join(metrics)}; this search: {' and '.join(self.options.directions)} "
                f"{', '.join(self.options.metrics)}. Give another study_name, or ask for the same."
            )
        before, now = self.study.user_attrs.get(DIRECTORY), str(self.directory.resolve())
        if before is not None and before != now and Path(before).is_dir():
            raise ValueError(
                f"The study {self.options.study_name!r} has its runs in {before}, where its processes find one "
                f"another's; this search would put them into {now}. Write output_dir={str(Path(before).parent)!r}, or "
                "give another study_name."
            )
        self.study.set_user_attr(DIRECTORY, now)
        self.study.set_user_attr(METRICS, self.options.metrics)

    # Proposing trials.

    def propose(self) -> Proposal | None:
        """Ask Optuna for the next trial, which is ``self.trial``.

        Returns:
            What the trial will run; None where the search is over.

        Raises:
            Exception: the error of the search space; the trial has failed.
        """
        while True:
            with self._lock():
                if self.is_shared:
                    self._retry_trials_of_the_dead()
                if self._is_over():
                    return None
                # Each trial has a sampler with a seed of its own. One sampler for the search would begin again with the
                # search, and in each process, and propose what was tried already.
                if self.options.sampler is None or isinstance(self.options.sampler, str):
                    self.study.sampler = make_sampler(
                        self.options.sampler or "tpe", self._seed(self._next_number(), "sampler")
                    )
                space = self.options.space
                trial = self.study.ask(dict(space) if isinstance(space, Mapping) else None)
                self.trial, self.asked_at = trial, time.monotonic()
                origin = trial.user_attrs.get(ORIGIN, trial.number)
                if self.is_shared:
                    self.claim = Claim(self.run_directory(origin) / CLAIM)
                trial.set_user_attr(ORIGIN, origin)
            try:
                return self._proposal(origin)
            except Exception as error:
                self.tell_failure(error)
                if not isinstance(error, self.options.catch):
                    raise

    def _proposal(self, origin: int) -> Proposal:
        given = {"seed": self._seed(origin, "run"), **sampled(self.options.space, self.trial)}
        for name in ("output_dir", "progress"):
            if name in given:
                raise ValueError(f"{name} can't be searched for: each trial has its own output_dir, and no progress.")
        args = self.args.replace(**given).replace(output_dir=str(self.run_directory(origin)), progress=False)
        if args.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size=True begins runs again itself, which a search does too. Leave it out, and pass "
                "catch=(torch.OutOfMemoryError,): a trial that doesn't fit into memory is then one that failed."
            )
        self.trial.set_user_attr(ARGUMENTS, given)
        return Proposal(self.trial.number, args, given)

    def _is_over(self) -> bool:
        options, trials = self.options, self.study.get_trials(deepcopy=False)
        if options.timeout is not None and time.monotonic() - self.began >= options.timeout:
            return True
        retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
        states = self.optuna.trial.TrialState
        counted = [t for t in trials if t.number not in retried and t.state != states.WAITING]
        return options.n_trials is not None and len(counted) >= options.n_trials

    def _next_number(self) -> int:
        trials = self.study.get_trials(deepcopy=False)
        waiting = (t.number for t in trials if t.state == self.optuna.trial.TrialState.WAITING)
        return min(waiting, default=len(trials))

    def _seed(self, number: int, purpose: str) -> int:
        """Return a seed that no other trial, and no other purpose, has."""
        return random_state.combine_seeds(self.args.seed, number, *purpose.encode()) >> 1

    def _retry_trials_of_the_dead(self) -> None:
        """Have each trial of a dead process wait to be run again, once, then have it failed. In this order, a process
        that dies in between loses no trial, and the next search doesn't repeat one.
        """
        states = self.optuna.trial.TrialState
        trials = self.study.get_trials(deepcopy=False)
        retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
        for trial in trials:
            origin = trial.user_attrs.get(ORIGIN, trial.number)
            if trial.state != states.RUNNING or is_claimed(self.run_directory(origin) / CLAIM):
                continue
            if trial.number not in retried:
                self.study.add_trial(
                    self.optuna.create_trial(
                        state=states.WAITING,
                        params=trial.params,
                        distributions=trial.distributions,
                        user_attrs={ORIGIN: origin, RETRY_OF: trial.number},
                        system_attrs={k: v for k, v in trial.system_attrs.items() if k == "fixed_params"},
                    )
                )
            self.study.tell(trial.number, state=states.FAIL)

    def run_directory(self, origin: int) -> Path:
        """Return the directory of the run of a trial, and of the trials that ran it again."""
        return self.directory / f"trial-{origin:05d}"

    # Telling how a trial went.

    def tell(self, values: list[float], pruned: bool) -> None:
        """Tell Optuna the values of the trial. A trial whose values aren't numbers has failed."""
        states = self.optuna.trial.TrialState
        if not pruned and any(value != value for value in values):
            self.tell_failure(f"{', '.join(self.options.metrics)} = {', '.join(map(str, values))}")
            return
        self.trial.set_user_attr(SECONDS, time.monotonic() - self.asked_at)
        if pruned:
            self.study.tell(self.trial, state=states.PRUNED)
        else:
            self.study.tell(self.trial, values)
        self.release()

    def tell_failure(self, why: str | BaseException) -> None:
        """Tell Optuna that the trial failed, and why."""
        said = why if isinstance(why, str) else f"{type(why).__name__}: {why}"
        self.trial.set_user_attr(ERROR, said[:2000])  # a database may take no longer text
        self.trial.set_user_attr(SECONDS, time.monotonic() - self.asked_at)
        self.study.tell(self.trial, state=self.optuna.trial.TrialState.FAIL)
        self.release()

    def release(self) -> None:
        """Release the claim on the trial: this process no longer works on it."""
        if self.claim is not None:
            self.claim.release()
            self.claim = None

    # Results.

    def result(self, trial: Any) -> TrialResult:
        """Make a TrialResult of a trial of Optuna's."""
        attributes = trial.user_attrs
        return TrialResult(
            number=trial.number,
            state=STATES[trial.state.name],
            values=tuple(trial.values or ()),
            params=dict(trial.params),
            arguments=attributes.get(ARGUMENTS, {}),
            directory=self.run_directory(attributes[ORIGIN]) if ORIGIN in attributes else None,
            error=attributes.get(ERROR),
            retry_of=attributes.get(RETRY_OF),
            seconds=attributes.get(SECONDS),
        )

    def output(self) -> SearchOutput:
        """Return the results so far, without the trials that were run again."""
        trials = self.study.get_trials(deepcopy=False)
        retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
        completed = any(trial.state == self.optuna.trial.TrialState.COMPLETE for trial in trials)
        best = [self.result(trial) for trial in self.study.best_trials] if completed else []
        several = len(self.options.metrics) > 1
        return SearchOutput(
            study_name=self.options.study_name,
            objectives=tuple(self.options.metrics),
            best=self.result(self.study.best_trial) if completed and not several else None,
            pareto=tuple(best) if several else (),
            trials=tuple(self.result(trial) for trial in trials if trial.number not in retried),
        )


def make_sampler(name: str, seed: int) -> Any:
    """Make a sampler of Optuna's by its name."""
    optuna = import_optuna()
    classes = {
        "tpe": optuna.samplers.TPESampler,
        "random": optuna.samplers.RandomSampler,
        "nsga2": optuna.samplers.NSGAIISampler,
    }
    return classes[name](seed=seed)


def make_pruner(choice: Any) -> Any:
    """Make a pruner of Optuna's by its name; None makes one that prunes nothing."""
    optuna = import_optuna()
    classes = {
        "median": optuna.pruners.MedianPruner,
        "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
    }
    if choice is None:
        return optuna.pruners.NopPruner()
    return classes[choice]() if isinstance(choice, str) else choice
