"""TrainModule: what the user writes, a module with forward and loss, and with methods that have defaults."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..strategies.batches import labels_in, tensors_of
from .arguments import FitArguments
from .in_run import InRun
from .optim.optimizers import make_optimizer
from .optim.schedulers import make_scheduler
from .rows import rows_of
from .turns import Turn
from .wrapping import wrap_late, wrap_model

IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's ignore_index


class TrainModule(InRun):
    """A module that says how it is trained. ``forward`` and ``loss`` are yours; all other methods have defaults.

    ``forward`` is given what it names: of a batch that is a mapping, the keys that are its parameters; of a tuple, the
    entries by position; and anything else whole: a tensor, a list (of samples, as ``collate_fn=list`` makes it), a
    dataclass, an object of a library. Samples that are tuples make a batch that is a tuple, also with torch's
    ``default_collate``.

    Example:
        >>> class Regressor(TrainModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Linear(3, 1)
        ...     def forward(self, x):
        ...         return self.net(x)
        ...     def loss(self, outputs, batch):
        ...         return nn.functional.mse_loss(outputs, batch["y"])
    """

    causal = False
    """Whether position i of the logits predicts label i + 1, as in a causal language model with unshifted labels."""

    item_name = "samples"
    """What ``count_items`` counts, for the progress display: "tokens" for a language model. Where the default is left,
    and a sample has another number of items than one, the display says "labels"."""

    weights_note = ""
    """What a person should know of the weights that ``wrap`` found in files: layers that are initialised instead."""

    def loss(self, outputs: Any, batch: Any) -> Tensor | Mapping[str, Tensor]:
        """Compute the mean loss over the items of the batch.

        The default finds the loss in the outputs of models that compute their own: ``outputs["loss"]``, else a first
        entry that is a scalar.

        Args:
            outputs: what ``forward`` returned.
            batch: the whole batch, on the device.

        Returns:
            A 0-dim tensor that carries a gradient, or a mapping that holds it as "loss", whose other entries (0-dim)
            are averaged and logged beside it. A ``loss`` with a parameter named ``num_items_in_batch`` is given the
            number of items in the whole update, over all ranks, and returns sum / num_items_in_batch.
        """
        if isinstance(outputs, Mapping) and "loss" in outputs:
            return outputs["loss"]
        if isinstance(outputs, tuple | list) and outputs and isinstance(outputs[0], Tensor) and outputs[0].ndim == 0:
            return outputs[0]
        received = f"the keys {sorted(outputs)}" if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}"
        raise ValueError(
            f"{type(self).__name__} defines no loss(outputs, batch), and forward returned none: it gave {received}. "
            "Write loss(self, outputs, batch), or have forward return {'loss': ...}."
        )

    def turns(self) -> Sequence[Turn]:
        """Return the turns by which the module is trained, where several optimizers move parts of it: a critic and a
        generator, an actor and a critic. The default lists none: ``loss`` and one optimizer move the whole module.

        An update is one round: batches are read until each turn was made as often as its ``every`` says, in the order
        of the list. ``global_step``, schedules, logs and checkpoints count rounds. See docs/turns.md.

        Example:
            >>> def turns(self):
            ...     return [
            ...         Turn("critic", loss=self.critic_loss, moves="critic", learning_rate=1e-4),
            ...         Turn("generator", loss=self.generator_loss, moves="generator", every=5),
            ...     ]
        """
        return ()

    def call_once(self, function: Callable[[], Any]) -> None:
        """Have the next call of this module be one of a function, and the calls after it of ``forward`` again, also
        within that function. So a turn's loss goes through what wraps the module, or hooks into it.
        """
        own = vars(self).get("forward")

        def forward() -> Any:
            if own is None:
                del self.forward
            else:
                self.forward = own
            return function()

        self.forward = forward

    def gather(self, rows: Tensor, pad_to: int | None = None) -> Any:
        """Return the rows of all data-parallel ranks, in ``loss``: what a contrastive loss takes its negatives from.

        This rank's own rows come first, so that row i of a sample is row i here too; those of the others follow. Ranks
        may have different numbers of rows. What a rank's loss says of others' rows goes back to the ranks that computed
        them: gradients are those of one batch that holds all. A micro-batch is gathered alone: with accumulation,
        negatives come from the micro-batch over all ranks. On one device it returns ``rows``.

        Args:
            rows: (rows, ...).
            pad_to: the most rows that a rank can have: each rank's are filled up with zeros to so many, and the host
                needn't wait for the others' numbers.

        Returns:
            (all rows, ...). With ``pad_to``, (rows, mask): (ranks * pad_to, ...), and which of them are rows.

        Raises:
            ValueError: it is called outside of a loss.

        Example:
            >>> def loss(self, outputs, batch):
            ...     images, texts = outputs
            ...     logits = images @ self.gather(texts).T / 0.07
            ...     return nn.functional.cross_entropy(logits, torch.arange(len(images), device=logits.device))
        """
        return rows_of(self).gather(rows, pad_to)

    def count_items(self, batch: Any) -> int | Tensor:
        """Count the items that ``loss`` is a mean over.

        The default counts labels other than -100 where the batch has "labels" (an entry of a mapping, an attribute of a
        dataclass or another object), else the samples: the size of the first dimension, or the samples in a list. It is
        called with the batch as the data gives it, before the batch moves to the device.
        """
        labels = labels_in(batch)
        if isinstance(labels, Tensor):
            if labels.is_floating_point() or labels.ndim == 0:
                return len(labels) if labels.ndim else 1
            if self.causal:  # no position predicts the first label
                labels = labels[..., 1:]
            if labels.device.type == "cpu":
                # numpy counts, since reading a count of torch's on the host would be a synchronisation wherever it is.
                return int(numpy.count_nonzero(labels.numpy() != IGNORED_LABEL))
            return (labels != IGNORED_LABEL).sum()
        return first_dimension(batch)

    def configure_optimizer(self, args: FitArguments) -> Optimizer | Mapping[str, Optimizer]:
        """Make the optimizer over the parameters of this module, which are placed, and may be sharded, when this is
        called. The default makes the one that ``args.optim`` names, without weight decay on norms and biases. A module
        with ``turns`` that writes this method returns a mapping, from each turn's name to its optimizer.
        """
        return make_optimizer(self, args)

    def configure_scheduler(self, optimizer: Any, args: FitArguments) -> LRScheduler | Mapping[str, LRScheduler]:
        """Make the schedule, which is stepped once an update. ``args.max_steps`` is the number of updates in the run,
        also where epochs set its length. A module with ``turns`` that writes this method is given the optimizers in a
        mapping by turn, and returns schedules in one; they are stepped once a round.
        """
        return make_scheduler(optimizer, args, args.max_steps)

    def flops_per_token(self, parameter_count: int) -> float:
        """Return the floating-point operations of forward and backward for one token (or one item, where tokens aren't
        counted). The default is 6 for each parameter (Kaplan et al., 2020).
        """
        return 6.0 * parameter_count

    def metrics(self) -> Mapping[str, Any]:
        """Make torchmetrics metrics, by name, for one evaluation. They are updated with ``metric_inputs``."""
        return {}

    def metric_inputs(self, outputs: Any, batch: Any) -> tuple[Any, ...]:
        """Return what the ``update`` of a metric is given: predictions, then targets. The default is the outputs (their
        "logits" where they are a mapping) and the "labels" of the batch (the second entry of a tuple of two without
        them).
        """
        predictions = outputs["logits"] if isinstance(outputs, Mapping) and "logits" in outputs else outputs
        labels = labels_in(batch)
        if labels is not None:
            return predictions, labels
        if isinstance(batch, tuple) and len(batch) == 2:
            return predictions, batch[1]
        raise ValueError(
            f"{type(self).__name__}.metrics() needs predictions and targets, and a {type(batch).__name__} batch "
            "without 'labels' doesn't say which they are. Write metric_inputs(self, outputs, batch)."
        )

    def build(self) -> None:
        """Create big layers, here and not in ``__init__`` where no rank should ever hold all of them: their parameters
        get memory after they are sharded, and values by ``init_weights``. It is called once, before the module is
        placed.
        """

    def init_weights(self, layer: nn.Module) -> None:
        """Give the parameters of one layer that ``build`` made their initial values. The same random numbers are drawn
        under every strategy. The default calls the layer's own ``reset_parameters``.

        Random numbers, fills and products with numbers, on all of a parameter or on some rows and columns of it
        (``weight[0] = 0``), are first noted and then done on each rank's own part. Where anything else is done (an
        orthogonal matrix, a copy of a tensor, values that are read), this is called once more, on the whole layer.

        Args:
            layer: it holds parameters of its own, of their whole shapes and uninitialised.
        """
        reset = getattr(layer, "reset_parameters", None)
        if reset is None:
            raise ValueError(
                f"build() made a {type(layer).__name__}, which has no reset_parameters() to fill its parameters. "
                "Write init_weights(self, layer) on your TrainModule."
            )
        reset()

    def initial_values(self, name: str, part: tuple[slice, ...]) -> Tensor | None:
        """Return the values of a part of a late parameter, as they are in a file for instance; None where
        ``init_weights`` fills it. A rank asks for the parts that it holds, so that none reads or holds a whole model.
        ``init_weights`` is called for layers of which some parameter was not given.

        Args:
            name: of the parameter, as ``named_parameters()`` has it, made in ``build``.
            part: a slice, with begin and end, for each dimension of the whole parameter. It may be empty.
        """
        return None

    def shard_units(self) -> Sequence[nn.Module]:
        """Return the blocks that fully sharded strategies gather one at a time, and that activation checkpointing
        recomputes.

        The default returns the layers of the outermost lists whose layers are all of one class; where these layers are
        lists again, which have no forward, the layers inside them. A layer whose parameters are used outside of its
        forward must not be among the blocks.
        """
        return repeated_blocks(self)

    def tensor_parallel_plan(self) -> Mapping[str, Any]:
        """Return how tensor parallelism cuts layers: patterns over names (``"blocks.*.up"``) to "colwise", "rowwise",
        ... (see ``stratagem.strategies.plans.plan.STYLES``) or a torch ParallelStyle. The models of transformers that
        docs/models.md lists need none.
        """
        return {}

    @staticmethod
    def wrap(
        model: nn.Module | str | PathLike[str] | Callable[[], nn.Module],
        causal: bool | None = None,
        *,
        weights: str | PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
        new_layers: Sequence[str] = (),
    ) -> "TrainModule":
        """Make a TrainModule of any module whose forward returns a loss, e.g. a transformers model given labels, or a
        peft model around one.

        Parameters keep the names that they have in ``model``, also in checkpoints and exports. A model that is given as
        a directory or a function has no memory until it is placed: each rank then reads, or draws, its part of the
        values (see docs/big_models.md). What the function does to values is lost.

        Args:
            model: its forward returns the mean loss over the batch's items. Or the directory of a transformers model
                with safetensors files (or its name, where huggingface_hub has it in its cache); or a function that
                makes the model, e.g. by ``AutoModelForCausalLM.from_config(config)``.
            causal: whether that loss shifts the labels itself, so that the first label of each row doesn't count; see
                ``causal``. None finds out for models that shift in their ``loss_function``, as those of transformers
                do; write True for a model that shifts within its forward.
            weights: with a function, the directory whose safetensors files hold the model's values; None has
                ``init_weights`` draw them, by the model's own rules where it is one of transformers.
            dtype: with a directory, the dtype that the model is made in; None takes its configuration's. The run's
                precision then decides what parameters are kept in.
            new_layers: names of layers that begin with new values, whatever the files hold of them: "classifier".

        Raises:
            ValueError: a tensor is missing in the files, is unexpected or of another shape; the message names it.

        Example:
            ``Fit(TrainModule.wrap(model), train_data=dataset)``,
            ``Fit(TrainModule.wrap("path/of/a/model"), train_data=dataset, strategy="fsdp2")``
        """
        if isinstance(model, nn.Module):
            if weights is not None or dtype is not None or new_layers:
                raise ValueError(
                    f"TrainModule.wrap was given a {type(model).__name__}, which is made, and weights, dtype or "
                    "new_layers, which say how one is made. Give it the function that makes the model: wrap(lambda: "
                    "AutoModelForCausalLM.from_config(config), weights=...)."
                )
            return model if isinstance(model, TrainModule) else wrap_model(model, TrainModule, causal)
        return wrap_late(model, TrainModule, causal, weights, dtype, new_layers)


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Find the layers of every outermost ModuleList or Sequential that has two or more, all of one class. In the place
    of layers without a forward, the layers inside them are returned.
    """
    found: list[nn.Module] = []
    for child in module.children():
        layers = list(child.children())
        repeats = isinstance(child, nn.ModuleList | nn.Sequential) and len(layers) > 1
        if repeats and all(
            type(layer) is type(layers[0]) and any(True for _ in layer.parameters()) for layer in layers
        ):
            found += [called for layer in layers for called in called_layers(layer)]
        else:
            found += repeated_blocks(child)
    return list(dict.fromkeys(found))


def called_layers(layer: nn.Module) -> list[nn.Module]:
    """Return the layer itself or, where it has no forward, as a ModuleList, the layers with parameters inside it,
    without single norms and projections where there are larger ones.
    """
    if type(layer).forward is not nn.Module.forward or "forward" in vars(layer):
        return [layer]
    parts = [part for child in layer.children() for part in called_layers(child)]
    parts = [part for part in parts if any(True for _ in part.parameters())]
    return [part for part in parts if any(True for _ in part.children())] or parts


def first_dimension(batch: Any) -> int:
    """Return the number of samples in a batch: the first dimension of its first tensor, or the number of samples in a
    list.

    Raises:
        ValueError: there is no such tensor, or a list may hold samples as well as whole columns of them.
    """
    if isinstance(batch, list) and batch:
        return length_of_list(batch)
    size = next((tensor.shape[0] for tensor in tensors_of(batch) if tensor.ndim), None)
    if size is None:
        raise ValueError(
            f"Can't tell how many items are in a batch of type {type(batch).__name__}: it holds no tensor with a first "
            "dimension. Write count_items(self, batch) on your TrainModule."
        )
    return size


def length_of_list(batch: list[Any]) -> int:
    """Return the number of samples in a list: its entries, unless these are the columns of a batch, as in [x, y].

    Tensors of different kinds (numbers of dimensions, dtypes) that agree in their first dimension are columns.

    Raises:
        ValueError: the tensors are of one kind and agree in the first dimension alone, so that they may be either.
    """
    if not all(isinstance(entry, Tensor) and entry.ndim for entry in batch) or len({e.shape[0] for e in batch}) > 1:
        return len(batch)
    size = batch[0].shape[0]
    if len({(entry.ndim, entry.dtype) for entry in batch}) > 1:
        return size
    if size == len(batch) or len({entry.shape for entry in batch}) == 1:
        return len(batch)
    raise ValueError(
        f"A batch that is a list of {len(batch)} tensors, each of {size} in its first dimension, may hold "
        f"{len(batch)} samples or {size}. Have collate_fn return a tuple if they are {size}, or write "
        "count_items(self, batch) on your TrainModule."
    )
