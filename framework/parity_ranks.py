"""The ranks of a parity run: each strategy on its own, started one after another by torch's elastic launcher.

``compare_strategies`` does the whole; the command ``stratagem parity`` prints its rows. One rank of one strategy is
``python -m stratagem.framework.parity_ranks <run.json>``.
"""

import dataclasses
import importlib
import importlib.util
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

from ..precision.names import did_you_mean
from ..strategies.base import Strategy
from ..strategies.registry import ALIASES, STRATEGIES, get_strategy
from .parity import (
    Difference,
    Recipe,
    Recording,
    compare,
    default_tolerance,
    record,
)
from .parity_forward import FailedInLayer

COMBINATIONS: Mapping[str, tuple[str, Mapping[str, Any], int]] = {
    "fsdp2xtp": ("fsdp2", {"tensor_parallel": 2}, 2),
    "fsdp2xcp": ("fsdp2", {"context_parallel": 2}, 2),
}
"""Strategies with options that deserve a row of their own: name to (strategy, options, factor on the ranks)."""


@dataclass(frozen=True)
class Case:
    """A strategy and the ranks it runs on.

    Args:
        name: as the user wrote it, and as the table shows it.
        strategy: name in the registry.
        options: of the strategy.
        ranks: processes.
    """

    name: str
    strategy: str
    options: Mapping[str, Any]
    ranks: int

    @classmethod
    def named(cls, name: str, ranks: int) -> "Case":
        """The case for a strategy's name or a combination ("fsdp2xtp").

        Args:
            name: known to the strategies' registry, or in COMBINATIONS.
            ranks: for strategies that use several; combinations multiply it.

        Raises:
            ValueError: neither knows the name.
        """
        if name not in (*STRATEGIES, *ALIASES, *COMBINATIONS):
            raise ValueError(f"Unknown strategy {name!r}. {did_you_mean(name, [*STRATEGIES, *ALIASES, *COMBINATIONS])}")
        strategy, options, factor = COMBINATIONS.get(name, (name, {}, 1))
        return cls(name, strategy, options, ranks * factor if get_strategy(strategy).needs_ranks else 1)

    def make(self) -> Strategy:
        """The strategy, with its options."""
        strategy = get_strategy(self.strategy)
        return type(strategy)(**self.options) if self.options else strategy


class RunFailed(Exception):
    """A run ended without a recording.

    Args:
        error: the last line of the first failing rank's error.
        report: its traceback, or what the launcher printed.
    """

    def __init__(self, error: str, report: str) -> None:
        super().__init__(error)
        self.error, self.report = error, report


@dataclass(frozen=True)
class Row:
    """What the table says about one strategy.

    Attributes:
        case: the strategy.
        difference: to the reference, which is the first row; None for itself, and where a run failed.
        failure: why there is no difference.
        seconds: that the run took, with the start of its ranks.
    """

    case: Case
    difference: Difference | None
    failure: RunFailed | None
    seconds: float

    @property
    def is_right(self) -> bool:
        """Whether it ran and differs by no more than is tolerated."""
        return self.failure is None and (self.difference is None or self.difference.is_tolerated)


def compare_strategies(
    recipe: Recipe,
    cases: Sequence[Case],
    tolerance: float | None = None,
    timeout: float = 1800.0,
    on_begin: Callable[[Case], None] = lambda case: None,
) -> list[Row]:
    """Run one case after another, and compare each with the first, whose weights all of them begin with.

    Args:
        recipe: what is trained.
        cases: the first is the reference.
        tolerance: None takes 1e-6, or 1e-4 where layers are cut, times what the precision rounds more than float32.
        timeout: seconds for one case.
        on_begin: told of each case before it runs.

    Returns:
        A row for each case; only the first where that one failed.
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
    """Record a case on ranks of its own.

    Args:
        case: the strategy.
        recipe: what is trained.
        directory: for everything that the run writes; made here.
        seed_checkpoint: see ``record``.
        timeout: seconds, after which the ranks are ended.
        most_ranks: of any case that this one is compared with: all of them use as many threads, on the same kind of
            device.

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
    command += ["-m", "stratagem.framework.parity_ranks", str(directory / "run.json")]
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
    """End the launcher where it still runs; it ends its ranks first."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)  # the launcher gives ranks 30 seconds
        except subprocess.TimeoutExpired:
            process.kill()


def failure_of(directory: Path, printed: str) -> RunFailed:
    """The first failing rank's error, which the others' (a lost connection) only follow."""
    failures = [json.loads(file.read_text()) for file in directory.glob("failure-*.json")]
    if not failures:  # killed, or it died outside Python
        lines = [line for line in printed.splitlines() if line.strip()]
        return RunFailed(lines[-1] if lines else "the ranks ended without an error", printed)
    first = min(failures, key=lambda failure: failure["time"])
    return RunFailed(first["error"], first["traceback"])


def load_functions(target: str, *others: str) -> list[Callable[[], Any]]:
    """The function that ``file.py:function`` or ``package.module:function`` means, and others of the same file.

    Args:
        target: a file is run once, with its own folder first on the path, as if it were started.
        others: names.

    Raises:
        ValueError: not of that form, there is no such file, or it lacks one of the functions.
    """
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise ValueError(f"Write path/to/file.py:function or package.module:function. Received: {target!r}")
    if place.endswith(".py"):
        path = Path(place).resolve()
        if not path.is_file():
            raise ValueError(f"There is no file {path}.")
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location("stratagem_parity_target", path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    for wanted in (name, *others):
        if not callable(getattr(module, wanted, None)):
            raise ValueError(f"{place} has no function {wanted}().")
    return [getattr(module, wanted) for wanted in (name, *others)]


def short(error: BaseException) -> str:
    """An error in a line: with the layer, where it comes from one."""
    if isinstance(error, FailedInLayer):
        return str(error)
    return traceback.format_exception_only(error)[-1].strip().splitlines()[-1]


def main() -> None:
    """One rank of one run."""
    file = Path(sys.argv[1])
    try:
        run = json.loads(file.read_text())
        recipe, strategy = Recipe(**run["recipe"]), Case(**run["case"]).make()
        build, data = load_functions(recipe.module, recipe.data)
        torch.manual_seed(recipe.seed)
        seed_checkpoint = run["seed_checkpoint"] and Path(run["seed_checkpoint"])
        recording = record(build(), data(), strategy, recipe, file.parent, seed_checkpoint)
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
