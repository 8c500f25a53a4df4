"""Parity: one module, one seed checkpoint, the same global batches, under several strategies; how far they come apart.

A run records, whole and by name: the loss and the gradient norm of every update, the gradients of the first update, and
the weights after it. The gradients are those that the optimizer is given: reduced over ranks and unscaled. They are
taken after clipping, but at a limit that no norm reaches, so that the norm is computed and compared like everything
else, and a wrong one can't change gradients that are right.

Each strategy runs on its own ranks, started by torch's elastic launcher: ``python -m stratagem.framework.parity
<run.json>`` is one such rank. ``compare_strategies`` does the whole; the command ``stratagem parity`` prints its rows.
"""

import dataclasses
import importlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..precision.registry import did_you_mean, get_precision
from ..strategies.base import Strategy
from ..strategies.registry import ALIASES, STRATEGIES, get_strategy
from .callbacks import Callback
from .fit import Fit
from .module import TrainModule

COMBINATIONS: Mapping[str, tuple[str, Mapping[str, Any], int]] = {
    "fsdp2xtp": ("fsdp2", {"tensor_parallel": 2}, 2),
}
"""Strategies with options that deserve a row of their own: name to (strategy, options, factor on the ranks)."""

TOLERANCE, TENSOR_PARALLEL_TOLERANCE = 1e-6, 1e-4  # relative, in float32
NO_LIMIT = 1e30  # of the gradient norm


@dataclass(frozen=True)
class Recipe:
    """What is trained, the same under every strategy.

    Args:
        module: ``path/to/file.py:function`` or ``package.module:function``; without arguments it returns a TrainModule.
        data: name of a function beside it; without arguments it returns a Dataset, the same at every call.
        precision: number format.
        updates: optimizer steps.
        batch_size: samples of an update over all ranks; each data-parallel rank takes an even part.
        learning_rate: peak of Fit's default schedule.
        seed: of the weights and of the order of the data.
    """

    module: str
    data: str = "parity_data"
    precision: str = "32-true"
    updates: int = 20
    batch_size: int = 8
    learning_rate: float = 1e-3
    seed: int = 42


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
        return type(get_strategy(self.strategy))(**self.options)


@dataclass
class Recording:
    """What a run leaves to be compared.

    Attributes:
        losses, norms: of each update, over all ranks; norms before clipping.
        gradients: of the first update, whole, by parameter name in the module's order.
        weights: parameters and persistent buffers after the first update, whole, by name.
        tensor_parallel_size: ranks that held each layer together.
    """

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    tensor_parallel_size: int

    def save(self, directory: Path) -> None:
        """Write it: numbers and the order of names as JSON, tensors as safetensors."""
        # safetensors orders tensors its own way.
        names = {"gradients": list(self.gradients), "weights": list(self.weights)}
        numbers = {"losses": self.losses, "norms": self.norms, "tensor_parallel_size": self.tensor_parallel_size}
        save_file(self.gradients, directory / "gradients.safetensors")
        save_file(self.weights, directory / "weights.safetensors")
        (directory / "recording.json").write_text(json.dumps({"names": names, "numbers": numbers}))

    @classmethod
    def load(cls, directory: Path) -> "Recording":
        """Read what ``save`` wrote."""
        content = json.loads((directory / "recording.json").read_text())
        tensors = {}
        for part, names in content["names"].items():
            held = load_file(directory / f"{part}.safetensors")
            tensors[part] = {name: held[name] for name in names}
        return cls(**content["numbers"], **tensors)


class Recorder(Callback):
    """Notes a run's losses and norms, and on the main process the first update's gradients and weights.

    Args:
        saves_seed: save a checkpoint before the first update, in the run's output_dir.
    """

    def __init__(self, saves_seed: bool) -> None:
        self.saves_seed = saves_seed
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.gradients: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Save the seed."""
        if self.saves_seed:
            context["fit"].save_checkpoint()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Take the gradients. All ranks gather them."""
        if state.global_step == 0:
            self.gradients = taken(context["fit"].strategy, context["fit"].strategy.full_gradients())

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Take the weights. All ranks gather them."""
        if state.global_step == 1:
            self.weights = taken(context["fit"].strategy, context["fit"].strategy.full_state())

    def on_log(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Take the numbers; a log is due after every update."""
        self.losses.append(context["logs"]["loss"])
        self.norms.append(context["logs"]["grad_norm"])


def taken(strategy: Strategy, tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The main process's copies of tensors that all ranks gather together."""
    return {name: tensor.clone() for name, tensor in tensors if strategy.is_main}


def record(
    module: TrainModule,
    data: Any,
    strategy: Strategy,
    recipe: Recipe,
    directory: Path,
    seed_checkpoint: Path | None = None,
) -> Recording:
    """Train under one strategy, on every rank that it runs on. Collective.

    Args:
        module: not placed yet.
        data: a Dataset or IterableDataset.
        strategy: not set up yet.
        recipe: gives everything else.
        directory: for the seed checkpoint, which is written (as ``checkpoint-0``) where none is given.
        seed_checkpoint: where weights and the order of the data begin.

    Returns:
        The recording; its tensors are there on the main process only.

    Raises:
        TypeError: the data brings batches of its own.
        ValueError: the data-parallel ranks can't share the batch evenly.
    """
    if isinstance(data, DataLoader):
        raise TypeError(f"{recipe.data}() returned a DataLoader; return its dataset, which parity cuts into batches.")
    silence_dropout(module)
    recorder = Recorder(saves_seed=seed_checkpoint is None)
    fit = Fit(
        module,
        train_data=data,
        strategy=strategy,
        precision=recipe.precision,
        callbacks=[recorder],
        loggers=(),
        progress=False,
        output_dir=str(directory),
        max_steps=recipe.updates,
        learning_rate=recipe.learning_rate,
        max_grad_norm=NO_LIMIT,
        logging_steps=1,
        save_strategy="no",
        seed=recipe.seed,
    )
    share, rest = divmod(recipe.batch_size, strategy.data_size)
    if rest or not share:
        raise ValueError(
            f"{strategy.data_size} data-parallel ranks can't share a batch of {recipe.batch_size} evenly. Take a "
            f"multiple of {strategy.data_size}."
        )
    # Only now is it known how many ranks the batch is for.
    fit.train(resume_from_checkpoint=seed_checkpoint, trial={"per_device_train_batch_size": share})
    return Recording(
        recorder.losses, recorder.norms, recorder.gradients, recorder.weights, strategy.tensor_parallel_size
    )


def silence_dropout(module: nn.Module) -> None:
    """Switch dropout off: ranks draw masks of their own, so no two strategies would compute the same."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            layer.p = 0.0
        elif isinstance(getattr(layer, "dropout", None), float):  # attention and recurrent layers
            layer.dropout = 0.0  # type: ignore[assignment]


# The comparison.


@dataclass(frozen=True)
class Difference:
    """How far a run is from the reference. Relative numbers; infinite where one of the two isn't finite.

    Attributes:
        loss: the largest over updates.
        norm: of the first update's gradient norm.
        gradient: the largest over parameters, of the first update.
        tolerance: what each may be.
        diverges_at: what exceeds the tolerance first, in words; empty where nothing does.
    """

    loss: float
    norm: float
    gradient: float
    tolerance: float
    diverges_at: str

    @property
    def is_tolerated(self) -> bool:
        """Whether nothing exceeds the tolerance."""
        return max(self.loss, self.norm, self.gradient) <= self.tolerance


def compare(reference: Recording, other: Recording, tolerance: float) -> Difference:
    """Compare two recordings.

    A parameter's gradient differs by the 2-norm of the difference, relative to the 2-norm of the whole gradient. (To
    its own norm would not do: a gradient that is zero in exact arithmetic, such as that of the bias of attention's
    keys, is nothing but rounding.) The first to diverge is sought from the loss backwards, since a wrong gradient makes
    wrong what comes after it. Where all gradients agree and the losses don't, it is sought in the weights after the
    first update, relative to their own norm: then the optimizer did something else.

    Args:
        reference: what is right.
        other: what is judged.
        tolerance: for every relative difference.
    """
    losses = [relative(a, b) for a, b in zip(reference.losses, other.losses, strict=True)]
    norm = relative(reference.norms[0], other.norms[0])
    whole = math.sqrt(math.fsum(float(g.double().square().sum()) for g in reference.gradients.values()))
    gradients = {
        name: distance(reference.gradients.get(name), other.gradients.get(name), whole)
        for name in reversed(list({**reference.gradients, **other.gradients}))
    }
    gradient = max(gradients.values(), default=0.0)
    diverges_at = ""
    if wrong := [name for name, value in gradients.items() if value > tolerance]:
        diverges_at = f"{wrong[0]} ({len(wrong)} of {len(gradients)} gradients)"
    elif norm > tolerance:
        diverges_at = "gradient norm of update 1"
    elif max(losses) > tolerance:
        update = next(number for number, value in enumerate(losses, start=1) if value > tolerance)
        weights = {name: distance(w, other.weights.get(name)) for name, w in reference.weights.items()}
        wrong = [name for name, value in weights.items() if value > tolerance]
        after = f", {wrong[0]} after update 1 ({len(wrong)} of {len(weights)} weights)" if wrong and update > 1 else ""
        diverges_at = f"loss of update {update}{after}"
    return Difference(max(losses), norm, gradient, tolerance, diverges_at)


def relative(reference: float, other: float) -> float:
    """The difference of two numbers, relative to the first; infinite where one of them isn't finite."""
    if not (math.isfinite(reference) and math.isfinite(other)):
        return math.inf
    return abs(other - reference) / max(abs(reference), sys.float_info.min)


def distance(reference: Tensor | None, other: Tensor | None, scale: float | None = None) -> float:
    """The 2-norm of the difference, relative to ``scale`` or to the first one's norm. An absent gradient is zero."""
    present = other if reference is None else reference
    if present is None:
        return 0.0
    reference, other = (torch.zeros_like(present) if t is None else t for t in (reference, other))
    if reference.shape != other.shape:
        return math.inf
    difference = (other.double() - reference.double()).norm().item()
    scale = reference.double().norm().item() if scale is None else scale
    return difference / max(scale, sys.float_info.min) if math.isfinite(difference) else math.inf


# Each strategy on ranks of its own.


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
                    default = default_tolerance(recipe.precision, recording.tensor_parallel_size)
                    difference = compare(reference, recording, default if tolerance is None else tolerance)
            rows.append(Row(case, difference, failure, time.monotonic() - began))
            if reference is None:
                break
    return rows


def default_tolerance(precision: str, tensor_parallel_size: int) -> float:
    """The relative difference that rounding explains.

    Args:
        precision: its compute dtype tells how coarsely it rounds.
        tensor_parallel_size: sums inside a layer are added in another order where it is cut.
    """
    dtype = get_precision(precision).compute_dtype or torch.float32
    coarser = max(1.0, torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)
    return min(0.1, coarser * (TOLERANCE if tensor_parallel_size == 1 else TENSOR_PARALLEL_TOLERANCE))


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
    command += ["-m", "stratagem.framework.parity", str(directory / "run.json")]
    with (directory / "log.txt").open("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            message = f"the run took longer than {timeout:g} seconds"
            raise RunFailed(message, message) from None
        finally:
            end(process)
        if status == 0:
            return Recording.load(directory)
        log.seek(0)
        printed = log.read()
    raise failure_of(directory, printed)


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


def load_function(target: str, name: str | None = None) -> Callable[[], Any]:
    """The function that ``file.py:function`` or ``package.module:function`` means.

    Args:
        target: a file is run once, with its own folder first on the path, as if it were started.
        name: another function of the same file.

    Raises:
        ValueError: not of that form, or there is no such file.
        AttributeError: there is no such function.
    """
    place, _, function = target.rpartition(":")
    if not place or not function:
        raise ValueError(f"Write path/to/file.py:function or package.module:function. Received: {target!r}")
    if place.endswith(".py"):
        module = sys.modules.get(FILE_MODULE)
        if module is None:
            path = Path(place).resolve()
            if not path.is_file():
                raise ValueError(f"There is no file {path}.")
            sys.path.insert(0, str(path.parent))
            spec = importlib.util.spec_from_file_location(FILE_MODULE, path)
            assert spec is not None and spec.loader is not None
            module = sys.modules[FILE_MODULE] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    function = name or function
    if not callable(getattr(module, function, None)):
        raise AttributeError(f"{place} has no function {function}().")
    return getattr(module, function)


FILE_MODULE = "stratagem_parity_target"  # what the user's file is called while it is imported


def main() -> None:
    """One rank of one run."""
    file = Path(sys.argv[1])
    try:
        run = json.loads(file.read_text())
        recipe, strategy = Recipe(**run["recipe"]), Case(**run["case"]).make()
        build, data = load_function(recipe.module), load_function(recipe.module, recipe.data)
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
            "error": traceback.format_exception_only(error)[-1].strip().splitlines()[-1],
            "traceback": traceback.format_exc(),
        }
        (file.parent / f"failure-{os.environ['RANK']}.json").write_text(json.dumps(failure))
        raise


# The table.


def table(recipe: Recipe, rows: Sequence[Row]) -> Table:
    """The rows as people read them."""
    drawn = Table(
        title=f"{recipe.module}: {recipe.updates} updates of {recipe.batch_size} samples in {recipe.precision}",
        caption="Largest relative differences to the first row: loss over all updates, gradients of the first update.",
    )
    for heading in ("strategy", "ranks", "loss", "gradient", "norm", "tolerance", "first to diverge"):
        drawn.add_column(heading, justify="left" if heading in ("strategy", "first to diverge") else "right")
    for row in rows:
        style = "" if row.is_right else "red"
        name, ranks = row.case.name, str(row.case.ranks)
        if row.failure is not None:
            drawn.add_row(name, ranks, "failed", "", "", "", row.failure.error, style=style)
        elif row.difference is None:
            drawn.add_row(name, ranks, "reference", "", "", "", "", style=style)
        else:
            found = row.difference
            numbers = (f"{value:.1e}" for value in (found.loss, found.gradient, found.norm, found.tolerance))
            drawn.add_row(name, ranks, *numbers, found.diverges_at or "-", style=style)
    return drawn


if __name__ == "__main__":
    main()
