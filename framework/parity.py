"""Parity: one module, one seed checkpoint, the same global batches, under several strategies; how far they come apart.

A run records, whole and by name: the loss and the gradient norm of every update, the gradients of the first update, the
weights after it, and in a few numbers what goes into each layer and comes out of it in the first update. The gradients
are those that the optimizer is given: reduced over ranks and unscaled. They are taken after clipping, but at a limit
that no norm reaches, so that the norm is computed and compared like everything else, and a wrong one can't change
gradients that are right. "First" is the first that loss scaling doesn't skip.

``record`` runs in every rank of one strategy; ``parity_ranks.compare_strategies`` starts one strategy after another.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..precision.registry import get_precision
from ..strategies.base import Strategy
from .callbacks import Callback
from .fit import Fit
from .module import TrainModule
from .parity_forward import FailedInLayer, LayerWatch, WithoutDropout, first_difference

TOLERANCE, REORDERED_TOLERANCE = 1e-6, 1e-4  # relative, in float32
# torch adds up squares in float32: over some million entries the norm is right to a few 1e-6, and better where shards
# are added up apart. A norm that lacks a rank's share is wrong by far more.
NORM_TOLERANCE = 1e-4
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


@dataclass
class Recording:
    """What a run leaves to be compared.

    Attributes:
        losses, norms: of each update, over all ranks; norms before clipping.
        first: the first update with finite gradients, counted from 1; 0 where none had any.
        gradients: of the first update, whole, by parameter name in the module's order.
        weights: parameters and persistent buffers after the first update, whole, by name.
        reorders_sums: the strategy's.
        layers: inputs and outputs of layers in the first update, see ``parity_forward.LayerWatch.gathered``.
    """

    losses: list[float]
    norms: list[float]
    first: int
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    reorders_sums: bool
    layers: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def save(self, directory: Path) -> None:
        """Write it: numbers and the order of names as JSON, tensors as safetensors."""
        # safetensors orders tensors its own way.
        tensors = {"gradients": self.gradients, "weights": self.weights, "layers": self.layers}
        numbers = {
            "losses": self.losses,
            "norms": self.norms,
            "first": self.first,
            "reorders_sums": self.reorders_sums,
        }
        for part, held in tensors.items():
            save_file({name: tensor.contiguous() for name, tensor in held.items()}, directory / f"{part}.safetensors")
        names = {part: list(held) for part, held in tensors.items()}
        (directory / "recording.json").write_text(json.dumps({"names": names, "numbers": numbers}))

    @classmethod
    def load(cls, directory: Path) -> "Recording":
        """Read what ``save`` wrote."""
        content = json.loads((directory / "recording.json").read_text())
        tensors: dict[str, Any] = {}
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
        self.first = 0
        self.gradients: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.watch = LayerWatch()
        self.layers: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
        """Save the seed, and watch the layers, which are placed."""
        if self.saves_seed:
            fit.save_checkpoint()
        self.watch.watch(fit.module)

    def on_step_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Note what layers do until the first update is found."""
        self.watch.begin(is_noting=not self.first)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
        """Take the gradients. All ranks gather them."""
        if not self.first and torch.isfinite(fit.grad_norm):  # the norm is the same on all ranks
            self.first = state.global_step + 1
            self.layers = self.watch.gathered(fit.strategy)
            self.gradients = taken(fit.strategy, fit.strategy.full_gradients())

    def on_step_end(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
        """Take the weights. All ranks gather them."""
        if state.global_step == self.first:
            self.weights = taken(fit.strategy, fit.strategy.full_state())

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **context: Any) -> None:
        """Take the numbers; a log is due after every update, and one of totals at the end."""
        if "loss" not in logs:
            return
        self.losses.append(logs["loss"])
        self.norms.append(logs["grad_norm"])


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
    readers = strategy.data_size * strategy.devices_per_rank
    share, rest = divmod(recipe.batch_size, readers)
    if rest or not share:
        raise ValueError(
            f"{readers} data-parallel ranks or devices can't share a batch of {recipe.batch_size} evenly. Take a "
            f"multiple of {readers}."
        )
    # Only now is it known how many ranks the batch is for.
    try:
        with WithoutDropout():
            fit.train(resume_from_checkpoint=seed_checkpoint, trial={"per_device_train_batch_size": share})
    except Exception as error:
        if recorder.watch.inside:
            raise FailedInLayer(recorder.watch.inside[-1], error) from error
        raise
    return Recording(
        recorder.losses,
        recorder.norms,
        recorder.first,
        recorder.gradients,
        recorder.weights,
        strategy.reorders_sums,
        recorder.layers,
    )


def silence_dropout(module: nn.Module) -> None:
    """Switch dropout layers off: ranks draw masks of their own, so no two strategies would compute the same. Those that
    a forward calls as functions are switched off by ``WithoutDropout``.
    """
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
        gradient: the largest over parameters, of the first update.
        norm: of the first update's gradient norm, before clipping.
        tolerance: what loss and gradient may be.
        diverges_at: what exceeds its tolerance first, in words; empty where nothing does.
    """

    loss: float
    gradient: float
    norm: float
    tolerance: float
    diverges_at: str

    @property
    def is_tolerated(self) -> bool:
        """Whether nothing diverges."""
        return not self.diverges_at


def default_tolerance(precision: str, reorders_sums: bool) -> float:
    """The relative difference that rounding explains.

    Args:
        precision: its compute dtype tells how coarsely it rounds.
        reorders_sums: whether sums inside a layer are added in another order.
    """
    dtype = get_precision(precision).compute_dtype or torch.float32
    coarser = max(1.0, torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)
    return min(0.1, coarser * (REORDERED_TOLERANCE if reorders_sums else TOLERANCE))


def compare(reference: Recording, other: Recording, tolerance: float) -> Difference:
    """Compare two recordings.

    A parameter's gradient differs by the 2-norm of the difference, relative to the 2-norm of the whole gradient. (To
    its own norm would not do: a gradient that is zero in exact arithmetic, such as that of the bias of attention's
    keys, is nothing but rounding.) The first to diverge is sought from the loss backwards, since a wrong gradient makes
    wrong what comes after it. Where all gradients agree and the losses don't, it is sought in the weights after the
    first update, relative to their own norm: then the optimizer did something else.

    Where something is wrong from the first update on, and the forward passes part, that is where it begins: the layer
    that parts first is named before the gradients. Where they don't part and the loss does, the loss is.

    Args:
        reference: what is right.
        other: what is judged.
        tolerance: for every relative difference.
    """
    losses = [relative(a, b) for a, b in zip(reference.losses, other.losses, strict=True)]
    first = reference.first
    norm = relative(reference.norms[first - 1], other.norms[first - 1])
    whole = math.sqrt(math.fsum(float(g.double().square().sum()) for g in reference.gradients.values()))
    gradients = {
        name: distance(reference.gradients.get(name), other.gradients.get(name), whole)
        for name in reversed(list({**reference.gradients, **other.gradients}))
    }
    gradient = max(gradients.values(), default=0.0)
    diverges_at = ""
    if not first:
        diverges_at = "nowhere told: the reference has no update with finite gradients"
    elif first != other.first:
        diverges_at = f"the first update with finite gradients is {other.first or 'none'}, not {first}"
    elif wrong := [name for name, value in gradients.items() if value > tolerance]:
        diverges_at = f"{wrong[0]} ({len(wrong)} of {len(gradients)} gradients)"
        begins_at = first_difference(reference.layers, other.layers, tolerance)
        if not begins_at and losses[first - 1] > tolerance and reference.layers and other.layers:
            begins_at = f"loss of update {first} (forward agrees)"
        if begins_at:
            diverges_at = f"{begins_at}, {diverges_at}"
    elif norm > max(tolerance, NORM_TOLERANCE):
        diverges_at = f"gradient norm of update {first}, by {norm:.1e}"
    elif max(losses) > tolerance:
        update = next(number for number, value in enumerate(losses, start=1) if value > tolerance)
        weights = {name: distance(w, other.weights.get(name)) for name, w in reference.weights.items()}
        wrong = [name for name, value in weights.items() if value > tolerance]
        diverges_at = f"loss of update {update}"
        if wrong and update > first:
            diverges_at += f", {wrong[0]} after update {first} ({len(wrong)} of {len(weights)} weights)"
    return Difference(max(losses), gradient, norm, tolerance, diverges_at)


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
