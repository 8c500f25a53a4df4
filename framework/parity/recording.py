"""Parity of strategies: how far runs of one module, from one checkpoint, over the same global batches, differ.

A run records, whole and by name: the loss and the gradient norm of every update, the gradients of the first update, the
weights after it, and a few numbers of what goes into each layer and comes out of it in the first update. The gradients
are those that the optimizer is given: reduced over ranks and unscaled. They are recorded after clipping, but at a limit
that no norm reaches, so that the norm is computed and compared too, and a wrong norm can't change gradients that are
right. "First" means the first update that loss scaling doesn't skip.

``record`` runs in every rank of one strategy; ``ranks.compare_strategies`` starts one strategy after another.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ...strategies.base import Strategy
from ..callbacks import Callback
from ..fit import Fit
from ..module import TrainModule
from .forward import FailedInLayer, LayerWatch, WithoutDropout

NO_LIMIT = 1e30  # the limit of the gradient norm


@dataclass(frozen=True)
class Recipe:
    """What is trained, the same under every strategy.

    Args:
        module: ``path/to/file.py:function`` or ``package.module:function``, a function without arguments that returns a
            TrainModule.
        data: the name of a function beside it, without arguments, that returns the same Dataset at every call; empty
            for parity_data(), where there is one, else data(), which ``stratagem fit`` takes, too.
        precision: the number format.
        updates: the number of optimizer steps.
        batch_size: samples of an update over all ranks; each data-parallel rank takes an even part.
        learning_rate: the peak of Fit's default schedule.
        seed: the seed of the weights and of the order of the data.
    """

    module: str
    data: str = ""
    precision: str = "32-true"
    updates: int = 20
    batch_size: int = 8
    learning_rate: float = 1e-3
    seed: int = 42


@dataclass
class Recording:
    """What is recorded of a run, for a comparison.

    Attributes:
        losses, norms: the loss and the gradient norm of each update, over all ranks; norms before clipping.
        first: the first update with finite gradients, counted from 1; 0 where none had any.
        gradients: whole gradients of the first update, by parameter name in the order of the module.
        weights: whole parameters and persistent buffers after the first update, by name.
        reorders_sums: whether the strategy adds up the sums inside layers in another order.
        layers: inputs and outputs of layers in the first update, see ``forward.LayerWatch.gathered``.
    """

    losses: list[float]
    norms: list[float]
    first: int
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    reorders_sums: bool
    layers: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def save(self, directory: Path) -> None:
        """Write the recording: numbers and the order of names as JSON, tensors as safetensors."""
        # safetensors stores tensors in an order of its own.
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
        """Read a recording that ``save`` wrote."""
        content = json.loads((directory / "recording.json").read_text())
        tensors: dict[str, Any] = {}
        for part, names in content["names"].items():
            held = load_file(directory / f"{part}.safetensors")
            tensors[part] = {name: held[name] for name in names}
        return cls(**content["numbers"], **tensors)


class Recorder(Callback):
    """Records the losses and norms of a run and, on the main process, gradients and weights of the first update.

    Args:
        saves_seed: save a checkpoint before the first update, in the output_dir of the run.
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
        """Save the checkpoint that other runs begin with, and watch the layers, which are placed now."""
        if self.saves_seed:
            fit.save_checkpoint()
        self.watch.watch(fit.module)

    def on_step_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Have the watch note inputs and outputs of layers until the first update is found."""
        self.watch.begin(is_noting=not self.first)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
        """Record the gradients of the first update, which all ranks gather."""
        if not self.first and torch.isfinite(fit.grad_norm):  # the norm is the same on all ranks
            self.first = state.global_step + 1
            self.layers = self.watch.gathered(fit.strategy)
            self.gradients = copy_on_main(fit.strategy, fit.strategy.full_gradients())

    def on_step_end(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
        """Record the weights after the first update, which all ranks gather."""
        if state.global_step == self.first:
            self.weights = copy_on_main(fit.strategy, fit.strategy.full_state())

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **context: Any) -> None:
        """Record the numbers of an update. There is a log after every update, and one of totals at the end."""
        if "loss" not in logs:
            return
        self.losses.append(logs["loss"])
        self.norms.append(logs["grad_norm"])


def copy_on_main(strategy: Strategy, tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return copies, on the main process, of tensors that all ranks gather together."""
    return {name: tensor.clone() for name, tensor in tensors if strategy.is_main}


def record(
    module: TrainModule,
    data: Any,
    strategy: Strategy,
    recipe: Recipe,
    directory: Path,
    seed_checkpoint: Path | None = None,
) -> Recording:
    """Train under one strategy, and record the run. Collective.

    Args:
        module: the module, which isn't placed yet.
        data: a Dataset or IterableDataset.
        strategy: the strategy, which isn't set up yet.
        recipe: what is trained.
        directory: where the seed checkpoint is written (as ``checkpoint-0``), if none is given.
        seed_checkpoint: the checkpoint with which the run begins.

    Returns:
        The recording, with its tensors on the main process alone.

    Raises:
        TypeError: the data brings batches of its own.
        ValueError: the data-parallel ranks can't share the batch evenly.
    """
    if isinstance(data, DataLoader):
        function = f"{recipe.data or 'the data function'}()"
        raise TypeError(f"{function} returned a DataLoader; return its dataset, which parity cuts into batches.")
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
        report=False,
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
    # How many ranks share the batch is known only once the strategy is set up.
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
    """Switch off dropout layers: ranks draw masks of their own, so that no two strategies would compute the same.
    ``WithoutDropout`` switches off dropout functions that a forward calls.
    """
    for layer in module.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            layer.p = 0.0
        elif isinstance(getattr(layer, "dropout", None), float):  # attention and recurrent layers
            layer.dropout = 0.0  # type: ignore[assignment]
