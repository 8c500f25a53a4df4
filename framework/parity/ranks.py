"""The ranks of parity runs: torch's elastic launcher starts one strategy after another.

``compare_strategies`` runs all strategies, and the command ``stratagem parity`` prints its rows. One rank of one
strategy is ``python -m stratagem.framework.parity.ranks <run.json>``.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...precision.names import did_you_mean
from ...strategies.base import Strategy
from ...strategies.registry import ALIASES, STRATEGIES, get_strategy
from ..configuration.targets import load_module_and_data
from .comparing import Difference, compare, default_tolerance
from .forward import FailedInLayer
from .recording import Recipe, Recording, record

COMBINATIONS: Mapping[str, tuple[str, Mapping[str, Any], int]] = {
    "fsdp2xtp": ("fsdp2", {"tensor_parallel": 2}, 2),
    "fsdp2xcp": ("fsdp2", {"context_parallel": 2}, 2),
}
"""Names for strategies with options: name to (strategy, options, factor on the number of ranks)."""


@dataclass(frozen=True)
class Case:
    """A strategy and the ranks it runs on.

    Args:
        name: the name that the user wrote, and that the table shows.
        strategy: the name in the registry.
        options: options of the strategy.
        ranks: the number of processes.
    """

    name: str
    strategy: str
    options: Mapping[str, Any]
    ranks: int

    @classmethod
    def named(cls, name: str, ranks: int) -> "Case":
        """Make the case for the name of a strategy or a combination ("fsdp2xtp").

        Args:
            name: a name in the registry of strategies, or in COMBINATIONS.
            ranks: the number of ranks of strategies that use several; combinations multiply it.

        Raises:
            ValueError: there is no such name.
        """
        if name not in (*STRATEGIES, *ALIASES, *COMBINATIONS):
            raise ValueError(f"Unknown strategy {name!r}. {did_you_mean(name, [*STRATEGIES, *ALIASES, *COMBINATIONS])}")
        strategy, options, factor = COMBINATIONS.get(name, (name, {}, 1))
        if get_strategy(strategy).chooses:
            raise ValueError(f"strategy={name!r} stands for one of the others, which parity compares. Name those.")
        return cls(name, strategy, options, ranks * factor if get_strategy(strategy).needs_ranks else 1)

    def make(self) -> Strategy:
        """Make the strategy, with its options."""
        strategy = get_strategy(self.strategy)
        return type(strategy)(**self.options) if self.options else strategy


class RunFailed(Exception):
    """A run ended without a recording.

    Args:
        error: the last line of the error of the rank that failed first.
        report: the traceback of that rank, or what the launcher printed.
    """

    def __init__(self, error: str, report: str) -> None:
        super().__init__(error)
        self.error, self.report = error, report


@dataclass(frozen=True)
class Row:
    """What the table says about one strategy.

    Attributes:
        case: the strategy.
        difference: the difference to the reference, which is the first row; None for the reference itself, and where
            the run failed.
        failure: why the run failed; None where it didn't.
        seconds: how long the run took, with the start of its ranks.
    """

    case: Case
    difference: Difference | None
    failure: RunFailed | None
    seconds: float

    @property
    def is_right(self) -> bool:
        """Whether the strategy ran and differs by no more than is tolerated."""
        return self.failure is None and (self.difference is None or self.difference.is_tolerated)


def compare_strategies(
    recipe: Recipe,
    cases: Sequence[Case],
    tolerance: float | None = None,
    timeout: float = 1800.0,
    on_begin: Callable[[Case], None] = lambda case: None,
) -> list[Row]:
    """Run one case after another, and compare each with the first. All begin with the weights of the first.

    Args:
        recipe: what is trained.
        cases: the first one is the reference.
        tolerance: None means 1e-6, or 1e-4 where layers are cut, times how much coarser than float32 the precision
            rounds.
        timeout: seconds for one case.
        on_begin: called with each case before it runs.

    Returns:
        A row for each case; the first row alone where that one failed.
    """
    rows: list[Row] = []
    most = max(case.ranks for case in cases)
    with tempfile.TemporaryDirectory(prefix="stratagem-parity-") as directory:
        reference, seed_checkpoint = None, None
        for number, case in enumerate(cases):
            on_begin(case)
            folder, began = Path(directory) / str(number), time.monotonic()
            difference, failure = None, None
            try:
                recording = launch(case, recipe, folder, seed_checkpoint, timeout, most)
            except RunFailed as error:
                failure = error
            else:
                if reference is None:
                    reference, seed_checkpoint = recording, folder / "checkpoint-0"
                else:
                    default = default_tolerance(recipe.precision, recording.reorders_sums)
                    difference = compare(reference, recording, default if tolerance is None else tolerance)
            rows.append(Row(case, difference, failure, time.monotonic() - began))
            if reference is None:
                break
    return rows


def launch(
    case: Case, recipe: Recipe, directory: Path, seed_checkpoint: Path | None, timeout: float, most_ranks: int
) -> Recording:
    """Start the ranks of a case, and wait for its recording.

    Args:
        case: the strategy and its ranks.
        recipe: what is trained.
        directory: the folder for everything that the run writes, which is made here.
        seed_checkpoint: see ``record``.
        timeout: seconds after which the ranks are ended.
        most_ranks: the largest number of ranks of a case. All cases use as many threads as that one can, and the same
            kind of device.

    Raises:
        RunFailed: a rank failed, or they took too long.
    """
    directory.mkdir()
    run = {
        "case": dataclasses.asdict(case),
        "recipe": dataclasses.asdict(recipe),
        "seed_checkpoint": None if seed_checkpoint is None else str(seed_checkpoint),
    }
    (directory / "run.json").write_text(json.dumps(run))
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // most_ranks)))
    if torch.accelerator.device_count() < most_ranks:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
    command += ["-m", "stratagem.framework.parity.ranks", str(directory / "run.json")]
    log = directory / "log.txt"
    with log.open("w") as printed:
        process = subprocess.Popen(command, env=environment, stdout=printed, stderr=subprocess.STDOUT)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise RunFailed(f"not done after {timeout:g} seconds", log.read_text(errors="replace")) from None
        finally:
            end(process)
    if process.returncode == 0 and (directory / "recording.json").exists():
        return Recording.load(directory)
    raise failure_of(directory, log.read_text(errors="replace"))


def end(process: subprocess.Popen[bytes]) -> None:
    """End the launcher where it is still running. It ends its ranks first."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)  # the launcher gives ranks 30 seconds
        except subprocess.TimeoutExpired:
            process.kill()


def failure_of(directory: Path, printed: str) -> RunFailed:
    """Return the error of the rank that failed first; errors of other ranks (a lost connection) follow from it."""
    failures = [json.loads(file.read_text()) for file in directory.glob("failure-*.json")]
    if not failures:  # the ranks were killed, or died outside Python
        lines = [line for line in printed.splitlines() if line.strip()]
        return RunFailed(lines[-1] if lines else "the ranks ended without an error", printed)
    first = min(failures, key=lambda failure: failure["time"])
    return RunFailed(first["error"], first["traceback"])


def short(error: BaseException) -> str:
    """Write an error in one line, with the layer where it comes from a layer."""
    if isinstance(error, FailedInLayer):
        return str(error)
    return traceback.format_exception_only(error)[-1].strip().splitlines()[-1]


def main() -> None:
    """Run one rank of one case."""
    file = Path(sys.argv[1])
    try:
        run = json.loads(file.read_text())
        recipe, strategy = Recipe(**run["recipe"]), Case(**run["case"]).make()
        torch.manual_seed(recipe.seed)
        module, data = load_module_and_data(recipe.module, recipe.data)
        seed_checkpoint = run["seed_checkpoint"] and Path(run["seed_checkpoint"])
        recording = record(module, data, strategy, recipe, file.parent, seed_checkpoint)
        if strategy.is_main:
            recording.save(file.parent)
        strategy.barrier()
        strategy.tear_down()
    except BaseException as error:
        failure = {
            "time": time.time_ns(),
            "error": short(error),
            "traceback": traceback.format_exc(),
        }
        (file.parent / f"failure-{os.environ['RANK']}.json").write_text(json.dumps(failure))
        raise


if __name__ == "__main__":
    main()
