"""Averaged weights: a moving average (EMA) or a plain mean (SWA) of the weights that are trained, beside them."""

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ..precision.frozen import parts_by_layer
from ..strategies.base import Strategy
from ..strategies.local_parts import copy_each
from .arguments import FitArguments
from .callbacks import Callback
from .state import Control, TrainState

KINDS = ("ema", "swa")


class Average(Callback):
    """Keeps an average of the trained weights, which is evaluated, predicted with, exported and saved in checkpoints.

    Each rank averages its own shards, elementwise and in float32: nothing is sent, and nothing is ever whole. Weights
    that aren't trained, and buffers, are the module's own.

    ``ema``: after each averaged update the average moves by 1 - decay towards the weights (Polyak & Juditsky, 1992).
    ``swa``: the mean of the weights after each averaged update (Izmailov et al., 2018).

    Args:
        decay: of ``ema``: the share of the average that stays, from 0 to below 1.
        kind: "ema" or "swa".
        every: updates from one averaging to the next.
        begin: the update that it begins after, or the share of the run (0.75) where it is a float. The average is the
            weights until then.
        warm_up: the n-th averaging has a decay of at most n / (n + 9), so that the first weights are soon forgotten.
        device: "cpu" keeps the average in the host's memory; None beside the weights.
        evaluate: evaluate it, too, whenever the run evaluates: its metrics begin with "eval_average_".
        batch_norm_batches: of the training data, by which the running statistics of BatchNorm layers are taken anew at
            the end of training, since those of the module belong to other weights than the average. Each rank reads so
            many of its own. 0 leaves them as they are.

    Example:
        ``Fit(module, data, callbacks=[average])``, and after ``train()``: ``fit.evaluate(weights=average)``
    """

    def __init__(
        self,
        decay: float = 0.999,
        kind: str = "ema",
        *,
        every: int = 1,
        begin: int | float = 0,
        warm_up: bool = True,
        device: str | None = None,
        evaluate: bool = False,
        batch_norm_batches: int = 0,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"Average(kind=) is 'ema' or 'swa'. Received: {kind!r}")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"Average(decay=) is the share that stays, from 0 to below 1. Received: {decay!r}")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"Average(every=) counts updates, at least 1. Received: {every!r}")
        if begin < 0 or (isinstance(begin, float) and begin >= 1.0):
            raise ValueError(f"Average(begin=) is an update, or a share of the run below 1.0. Received: {begin!r}")
        if not isinstance(batch_norm_batches, int) or batch_norm_batches < 0:
            raise ValueError(f"Average(batch_norm_batches=) counts batches. Received: {batch_norm_batches!r}")
        self.decay, self.kind, self.every, self.begin, self.warm_up = decay, kind, every, begin, warm_up
        self.device, self.evaluate, self.batch_norm_batches = device, evaluate, batch_norm_batches
        self.count = 0  # averagings so far
        self._strategy: Strategy | None = None
        self._held: dict[str, Tensor] = {}  # this rank's parts
        self._stepped: Mapping[str, nn.Parameter] | None = None  # in a run, so that no update walks over the module
        self._statistics: list[tuple[Tensor, Tensor]] = []  # (buffer of the module, what it is with the average)
        self._loaded: Mapping[str, Tensor] | None = None  # of a checkpoint, until the weights are there
        self._follows_run = self._is_evaluating = False

    def on_train_begin(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Begin with the weights as they are, or with what a checkpoint held."""
        self._strategy = strategy = fit.strategy
        self._follows_run, self._statistics = True, []
        if self.batch_norm_batches and not statistics_of(fit.module):
            raise ValueError(
                f"Average(batch_norm_batches={self.batch_norm_batches}) has no effect: {type(fit.module).__name__} has "
                "no BatchNorm layer with running statistics. Leave it out."
            )
        self._stepped = strategy.stepped_parameters()
        if self._loaded:
            held, self._loaded = strategy.held_from(self._loaded), None
        else:
            held, self.count = strategy.held_weights(self._stepped), 0
        self._held = {name: self._kept(part) for name, part in held.items()}

    def on_step_end(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Average the weights after an update."""
        first = math.ceil(self.begin * state.max_steps) if isinstance(self.begin, float) else self.begin
        if state.global_step < first or (state.global_step - first) % self.every:
            return
        assert self._strategy is not None
        self.count += 1
        weight = self.weight_of_next(self.count)
        parts = self._strategy.held_weights(self._stepped)
        with torch.no_grad():
            own = list(self._held.values())
            torch._foreach_lerp_(own, [self._as(parts[name], mean) for name, mean in self._held.items()], weight)

    def parts(self) -> Iterator[Tensor]:
        """This rank's parts of the average, while a run goes on."""
        yield from self._held.values()

    def weight_of_next(self, count: int) -> float:
        """How far the average moves towards the weights at an averaging, by its number from 1."""
        if self.kind == "swa":
            return 1.0 / count
        decay = min(self.decay, count / (count + 9.0)) if self.warm_up else self.decay
        return 1.0 - decay

    def on_evaluate(self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any) -> None:
        """Evaluate the average, too, where that was asked for, and the run itself evaluates."""
        if self.evaluate and self._follows_run and not self._is_evaluating:
            self._is_evaluating = True
            try:
                fit.evaluate(metric_key_prefix="eval_average", weights=self)
            finally:
                self._is_evaluating = False

    def on_train_end(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Take the statistics of BatchNorm anew. Evaluations that come later are the user's own."""
        self._follows_run, self._stepped = False, None
        if self.batch_norm_batches:
            with self.in_place(fit.strategy):
                found = measured_statistics(fit, self.batch_norm_batches)
            self._statistics = found

    def on_exception(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Evaluations that come later are the user's own."""
        self._follows_run, self._stepped = False, None

    @contextmanager
    def in_place(self, strategy: Strategy) -> Iterator[None]:
        """In here the module has the averaged weights; afterwards its own again, to the bit.

        Raises:
            ValueError: there are none: nothing was trained with this callback.
        """
        if strategy is not self._strategy or not self._held:
            raise ValueError(
                "This Average has no weights: it averages those that a Fit trains which has it among its callbacks. "
                "Write Fit(..., callbacks=[average]), and use it after train()."
            )
        buffers = [buffer for buffer, _ in self._statistics]
        own = [buffer.clone() for buffer in buffers]
        try:
            copy_each(buffers, (average for _, average in self._statistics))
            with strategy.with_weights(self._held):
                yield
        finally:
            copy_each(buffers, own)

    def state_dict(self) -> dict[str, Any]:
        """The average by parameter name. Collective for some strategies."""
        weights = {} if self._strategy is None else self._strategy.weights_by_name(self._held)
        return {"count": self.count, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave; it is cut as the weights are when training begins."""
        self.count, self._loaded = state["count"], state["weights"]

    def _kept(self, part: Tensor) -> Tensor:
        dtype = torch.promote_types(part.dtype, torch.float32)
        return part.detach().to(device=self.device or part.device, dtype=dtype, copy=True)

    def _as(self, part: Tensor, mean: Tensor) -> Tensor:
        return part.to(device=mean.device, dtype=mean.dtype)

    def __repr__(self) -> str:
        return f"Average(decay={self.decay}, kind={self.kind!r}, count={self.count})"


class Calling(nn.Module):
    """Calls the placed model on batches of any kind; torch's ``update_bn`` knows tensors alone."""

    def __init__(self, fit: Any) -> None:
        super().__init__()
        self.fit, self.model = fit, fit.strategy.model

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        """The layers whose statistics are measured; frozen ones keep theirs."""
        frozen = parts_by_layer(self.model)
        return (layer for _, layer in self.named_modules(remove_duplicate=remove_duplicate) if layer not in frozen)

    def forward(self, batch: Any) -> None:
        """Call the model."""
        strategy = self.fit.strategy
        with strategy.forward_context():
            self.fit.objective.forward(self.model, strategy.to_device(batch))


def statistics_of(module: nn.Module) -> list[Tensor]:
    """The running statistics of a module's BatchNorm layers, but for those in frozen parts."""
    frozen, kind = parts_by_layer(module), nn.modules.batchnorm._BatchNorm
    layers = [layer for layer in module.modules() if isinstance(layer, kind) and layer not in frozen]
    return [buffer for layer in layers if layer.track_running_stats for buffer in layer.buffers(recurse=False)]


@torch.no_grad()
def measured_statistics(fit: Any, batches: int) -> list[tuple[Tensor, Tensor]]:
    """Take the statistics of BatchNorm layers over some of the training data, at the weights that the module has.
    Collective.

    Args:
        fit: its module is placed.
        batches: that each rank reads.

    Returns:
        (buffer of the module, which is what it was before; the mean over all ranks of what was measured).
    """
    strategy, buffers = fit.strategy, statistics_of(fit.module)
    before = [buffer.clone() for buffer in buffers]
    stream = fit.stream_over(fit.get_train_dataloader(), training=True)
    # Of a list, the first entry is what the model is called on.
    update_bn(([batch] for batch in itertools.islice(fit.batches(stream, 0), batches)), Calling(fit))
    found = []
    for buffer in buffers:
        measured = buffer.clone()
        if measured.is_floating_point():
            measured = strategy.sum_over_data_ranks(measured) / strategy.gradient_ranks
        found.append((buffer, measured))
    copy_each(buffers, before)
    return found


def using(weights: Any, strategy: Strategy) -> AbstractContextManager[None]:
    """Make a context in which a module computes with averaged weights; with its own, where ``weights`` is None.

    Raises:
        TypeError: ``weights`` is something else.
    """
    if weights is None:
        return nullcontext()
    if not isinstance(weights, Average):
        raise TypeError(
            "weights= takes one of the Fit's callbacks, a stratagem.Average, or None for the module's own weights. "
            f"Received: {weights!r:.200}"
        )
    return weights.in_place(strategy)
