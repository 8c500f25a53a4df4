"""Cached representations: a loss over more samples than fit into memory with their activations (GradCache, Gao et al.,
"Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021).

A micro-batch goes through forward in pieces. Only their outputs are kept, and what the random generators were before
each. The loss is computed of all outputs together, and gives a gradient for each of them. Then each piece goes through
forward once more, with the same random numbers, and backward from the gradients of its outputs. In memory are the
activations of one piece at a time; the gradients are those of the whole micro-batch.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ...strategies.base import Strategy
from ..arguments import FitArguments
from ..calling import Call
from ..in_run import logged_of
from ..module import TrainModule
from ..objective import Objective, leaves
from ..random_state import Moment
from ..rows import make_rows
from .pieces import Joined, Piece, cut, named_tensors
from .statistics import running_statistics


@dataclass(frozen=True)
class ForwardInPieces:
    """One call of the model, to be made again.

    Attributes:
        model: what was called.
        pieces: what it was called with.
        moments: the random state before each.
        outputs: the tensors that it returned, joined; they are what the loss was computed of.
    """

    model: Callable[..., Any]
    pieces: list[Piece]
    moments: list[Moment]
    outputs: list[Tensor]


class GivenGradients(torch.autograd.Function):
    """A zero whose backward gives tensors the gradients that are known for them, whatever the zero is multiplied by:
    a loss scale is in them already.
    """

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        """Keep the gradients."""
        ctx.gradients = gradients
        return torch.zeros((), device=tensors[0].device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Give them."""
        return None, *ctx.gradients


class CachedRepresentations:
    """Computes the outputs of micro-batches in pieces, and their gradients.

    The first forward of a piece records a graph, too, which is dropped at once: what is recorded decides which kernels
    run, and so which numbers a dropout draws. Running statistics of normalization layers are those of the first
    forward: they follow the statistics of each piece, once.

    Args:
        module: the user's.
        strategy: set up.
        number: of pieces.
    """

    def __init__(self, module: TrainModule, strategy: Strategy, number: int) -> None:
        self.module, self.strategy, self.number = module, strategy, number
        self._calls: list[ForwardInPieces] = []
        self._is_open, self._is_last, self._was_checked = False, False, False

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Entered around the forward and backward of a micro-batch, in the place of ``Strategy.accumulate``, which is
        entered for each piece.

        Args:
            last: whether it is the last one of an update, whose gradients are reduced.
        """
        self._is_open, self._is_last = True, last
        try:
            yield
            if self._calls:
                raise ValueError(
                    f"contrastive_chunks={self.number}: the micro-batch's training_step goes backward by itself, which "
                    "ends at the cached representations. Call super().training_step, or leave contrastive_chunks out."
                )
        finally:
            self._calls, self._is_open = [], False

    def forward(self, call: Call, model: nn.Module, batch: Any) -> Any:
        """Compute the outputs of a batch: in pieces where a backward follows, else at once.

        Args:
            call: calls a model on a batch, see ``forward_call``.
            model: placed.
            batch: on the device.
        """
        if not (self._is_open and torch.is_grad_enabled()):
            return call(model, batch)
        in_pieces: Any = partial(self._in_pieces, model)
        return call(in_pieces, batch)

    def _in_pieces(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        strategy = self.strategy
        forward: Any = strategy.module.forward
        # Ranks wait for one another in a forward (for sharded parameters, for joint statistics): all make as many.
        pieces = cut(forward, args, kwargs, self.number, fill=strategy.world_size > 1)
        samples, logged = max(piece.end for piece in pieces), logged_of(self.module)
        joined = Joined(samples, self.number)
        before = {} if self._was_checked else self._buffers()
        moments = []
        for piece in pieces:
            moments.append(Moment(strategy.device))
            before_piece = logged.last
            with strategy.accumulate(False):
                outputs = model(*piece.args, **piece.kwargs)
            logged.end_piece(before_piece, (piece.end - piece.begin) / samples if piece.counts else 0.0)
            if piece.counts:
                joined.fill(piece, outputs)
            del outputs  # and with it the graph, before the next piece's
        if not self._was_checked:
            self._check_buffers(before)
        for tensor in joined.tensors:
            tensor.requires_grad_(tensor.is_floating_point() or tensor.is_complex())
        self._calls.append(ForwardInPieces(model, pieces, moments, joined.tensors))
        return joined.outputs()

    def backward(
        self,
        loss: Tensor,
        backward: Callable[[Tensor], None],
        name: str,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Add the gradients of a micro-batch's loss to those of the update.

        Args:
            loss: of what ``forward`` returned.
            backward: ``Strategy.backward``.
            name: of what computed the loss, for messages.
            around: makes the context in which it did, but for the strategy's own.
        """
        calls, self._calls = self._calls, []
        if not calls:
            raise ValueError(
                f"contrastive_chunks={self.number} has no effect: {name} calls the model itself, and so computes it "
                "whole. Have it call super().compute_loss(...), or leave contrastive_chunks out."
            )
        wanted = [tensor for call in calls for tensor in call.outputs if tensor.requires_grad]
        cached = set(map(id, wanted))
        # Those that the loss itself uses (a temperature). They take part in the last backward, which is the one that
        # reduces, and in no other: so they get their gradients once, as all parameters do.
        parameters = [p for p in leaves([loss]).values() if id(p) not in cached]
        found = self.strategy.gradients(loss, [*wanted, *parameters])
        gradients = {id(tensor): gradient for tensor, gradient in zip(wanted, found, strict=False)}
        in_loss = [
            (p, gradient)
            for p, gradient in zip(parameters, found[len(wanted) :], strict=True)
            if gradient is not None
        ]  # fmt: skip
        after_loss = Moment(self.strategy.device)
        statistics = running_statistics(self.strategy.module, 1)
        again = [(call, index) for call in calls for index in range(len(call.pieces))]
        has_gradients = False
        for place, (call, index) in enumerate(again, start=1):
            is_last = place == len(again)
            with self.strategy.accumulate(self._is_last and is_last):
                with around(), self.strategy.forward_context():
                    call.moments[index].restore()
                    outputs = call.model(*call.pieces[index].args, **call.pieces[index].kwargs)
                    pairs = with_gradients(outputs, call, index, gradients) + (in_loss if is_last else [])
                    del outputs
                    share = GivenGradients.apply([g for _, g in pairs], *(t for t, _ in pairs)) if pairs else None
                    del pairs
                if share is not None:
                    has_gradients = True
                    backward(share)
        if not has_gradients:
            raise ValueError(
                "No gradient leads from the loss to a parameter: forward's outputs carry none, or the loss doesn't use "
                "them, or every parameter is frozen."
            )
        if statistics is not None:
            statistics.give_back(0)
        after_loss.restore()

    # A piece is computed twice, and must be the same both times.

    def _buffers(self) -> dict[str, tuple[Tensor, int]]:
        """The buffers of layers that don't normalize, and how often each was changed."""
        with self.strategy.unwrapped():
            layers = dict(self.strategy.module.named_modules())
        return {
            f"{name}.{key}".lstrip("."): (buffer, 0 if buffer.is_inference() else buffer._version)
            for name, layer in layers.items()
            if not isinstance(layer, _NormBase)
            for key, buffer in layer._buffers.items()
            if buffer is not None
        }

    def _check_buffers(self, before: dict[str, tuple[Tensor, int]]) -> None:
        """Refuse a forward that changes buffers, after the first time.

        Raises:
            ValueError: names them.
        """
        self._was_checked = True
        now = self._buffers()
        changed = [
            name
            for name, (buffer, version) in now.items()
            if name not in before or before[name][0] is not buffer or before[name][1] != version
        ]
        if changed:
            raise ValueError(
                f"contrastive_chunks={self.number} computes each piece twice, and forward changes "
                f"{', '.join(sorted(changed)[:10])}: the second time would begin with other values, and change them "
                "once more. Change them in loss, or leave contrastive_chunks out."
            )


def make_objective(
    module: TrainModule, args: FitArguments, strategy: Strategy, compute_loss_func: Callable[..., Any] | None
) -> tuple[Objective, CachedRepresentations | None]:
    """Make what finds losses, and what computes representations in pieces for it, where the arguments ask for them."""
    number = args.contrastive_chunks
    cached = None if number is None else CachedRepresentations(module, strategy, number)
    replaced = compute_loss_func, args.label_smoothing_factor, args.past_index
    forward = None if cached is None else cached.forward
    return Objective(module, *replaced, make_rows(module, strategy), forward), cached


def with_gradients(
    outputs: Any, call: ForwardInPieces, index: int, gradients: dict[int, Tensor | None]
) -> list[tuple[Tensor, Tensor]]:
    """Pair the outputs of a piece with their gradients, as far as there are both.

    Args:
        outputs: of the piece's second forward.
        call, index: the piece.
        gradients: of the joined outputs, by identity.
    """
    piece, found = call.pieces[index], []
    for (_, tensor), whole in zip(named_tensors(outputs), call.outputs, strict=True):
        gradient = gradients.get(id(whole))
        if gradient is not None and tensor.requires_grad:
            own = gradient[piece.begin : piece.end]
            found.append((tensor, own if piece.counts else torch.zeros_like(own)))
    return found
