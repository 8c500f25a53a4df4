"""What a module logs in forward and loss (``TrainModule.log``), from the call to the end of its micro-batch."""

import math
import sys
from collections.abc import Callable, Container, Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

RESERVED = frozenset((
    "loss", "nonfinite_losses", "grad_norm", "learning_rate", "loss_scale", "skipped_updates", "epoch", "step", "time",
    "num_input_tokens_seen", "tokens_per_second", "slowest_rank", "slowest_rank_ratio", "data_wait_seconds",
))  # fmt: skip
"""What a training log holds by itself."""

OF_LIGHTNING: Mapping[str, str] = {
    "prog_bar": "What is logged is shown: leave it out.",
    "logger": "What is logged goes to every logger of the Fit: leave it out.",
    "on_step": "A log has the mean over the updates since the last one; Fit(logging_steps=1) logs each: leave it out.",
    "on_epoch": "Write Fit(logging_strategy='epoch') for means over epochs, and leave it out.",
    "reduce_fx": "It is a mean always: leave it out.",
    "enable_graph": "What is logged is detached: leave it out.",
    "sync_dist": "It is the mean over all ranks always: leave it out.",
    "sync_dist_group": "It is the mean over all ranks always: leave it out.",
    "add_dataloader_idx": "Of several evaluation sets, each has its name in it already: leave it out.",
    "batch_size": "Write items=, where it isn't a mean over the items that the loss is a mean over.",
    "metric_attribute": "Metrics with a state are what TrainModule.metrics() returns.",
    "rank_zero_only": "Every rank logs, and the mean is over all: leave it out.",
}
"""Options of Lightning's ``log``, to what to do here."""


class Noted(NamedTuple):
    """A value that was logged in a micro-batch.

    Attributes:
        name: of the value.
        value: the mean over ``items``; a number, or 0-dim in float64 on the device.
        items: that it is a mean over, on this rank; a number, or 0-dim.
    """

    name: str
    value: float | Tensor
    items: float | Tensor


class Link:
    """A call of ``log``, linked to the one before it.

    A list would have torch.compile compile a block anew for each length that it finds; the last link is always a Link.

    Attributes:
        share: of the micro-batch's items, that the value is a mean over where ``items`` is None.
    """

    def __init__(self, name: str, value: Any, items: Any, before: "Link | None") -> None:
        self.name, self.value, self.items, self.before = name, value, items, before
        self.share = 1.0

    def weigh(self, share: float) -> None:
        """Have the value be a mean over a part of the items."""
        self.share = share


FIRST = Link("", 0.0, 0.0, None)


class Logged:
    """Collects what a module logs while a micro-batch is computed. torch.compile can look inside ``add``.

    Attributes:
        last: the last call of ``log`` in this micro-batch.
        is_open: whether a micro-batch's forward or loss is under way.
        is_in_backward: whether its backward is, which may compute parts of forward once more.
    """

    def __init__(self) -> None:
        self.last = FIRST
        self.is_open = self.is_in_backward = False

    def open(self) -> None:
        """A micro-batch's forward begins."""
        self.last, self.is_open, self.is_in_backward = FIRST, True, False

    def close(self) -> None:
        """All of the micro-batch is over."""
        self.last, self.is_open, self.is_in_backward = FIRST, False, False

    def add(self, name: str, value: Any, items: Any) -> None:
        """Note a value; see ``TrainModule.log``. It costs a copy of a number on the device, and no wait."""
        if not self.is_open:
            if not (self.is_in_backward or torch.compiler.is_compiling()):
                check_is_in_forward()
            return
        if not isinstance(name, str) or not name:
            raise TypeError(f"log() takes a name and a value: self.log('accuracy', accuracy). Received: {name!r}")
        if name in RESERVED:
            raise ValueError(f"log({name!r}, ...): a log has its own {name!r}. Choose another name.")
        value = number_of(value, name, "value")
        if items is not None:
            items = number_of(items, name, "items")
            if not isinstance(items, Tensor) and not 0 <= items < math.inf:
                raise ValueError(f"log({name!r}, items=): at least 0 items. Received: {items}")
        self.last = Link(name, value, items, self.last)

    def end_piece(self, since: Link, share: float) -> None:
        """Note that what was logged since a link was of a piece of the micro-batch alone.

        Args:
            since: the last link before the piece.
            share: the piece's share of the samples; 0 forgets what it logged.
        """
        if not share:
            self.last = since
        link = self.last
        while link is not since:
            link.weigh(share)
            assert link.before is not None
            link = link.before

    def take(
        self,
        count: int | Tensor,
        local: Callable[[Tensor], Tensor],
        is_mine: bool = True,
        taken: Container[str] = (),
    ) -> list[Noted]:
        """Take what was logged, when the loss is there and before its backward.

        Args:
            count: items in the micro-batch on this rank.
            local: ``Strategy.local_loss``.
            is_mine: whether the micro-batch is this rank's own, and no stand-in for one.
            taken: the names of the other entries of a mapping loss.

        Raises:
            ValueError: a name is that of an entry of a mapping loss.
        """
        link, self.last = self.last, FIRST
        self.is_open, self.is_in_backward = False, True
        found: list[Noted] = []
        while link.before is not None:
            if link.name in taken:
                raise ValueError(
                    f"{link.name!r} is logged by log(), and an entry of the mapping that the loss is. Choose one."
                )
            of_all = count if link.share == 1.0 else count * link.share
            items = (of_all if link.items is None else link.items) if is_mine else 0
            value = local(link.value) if isinstance(link.value, Tensor) else link.value
            found.append(Noted(link.name, value, items))
            link = link.before
        found.reverse()
        return found


def refuse_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options of ``log``, with what to write instead.

    Raises:
        TypeError: there are some.
    """
    if options:
        said = (f"{option}=: {OF_LIGHTNING.get(option, UNKNOWN)}" for option in options)
        raise TypeError(f"log({name!r}, ...): {' '.join(said)}")


UNKNOWN = "log() takes a name, a value and items= alone."


def number_of(value: Any, name: str, what: str) -> Any:
    """Return a number, or a copy of a 0-dim tensor in float64: what is logged may change before it is read.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if isinstance(value, Tensor):
        if value.ndim or value.is_complex():
            kind = f"a {'complex ' if value.is_complex() else ''}tensor of shape {tuple(value.shape)}"
            raise ValueError(
                f"log({name!r}): the {what} must be a number or a 0-dim tensor, as a .mean() is. It is {kind}."
            )
        return value.detach().to(torch.float64, copy=True)
    if not isinstance(value, float | int | Real):
        raise TypeError(
            f"log({name!r}): the {what} must be a number or a 0-dim tensor. Received: {type(value).__name__}"
        )
    return float(value)


def check_is_in_forward() -> None:
    """Pass where a forward or a loss calls, that the user has called without a Fit.

    Raises:
        ValueError: neither does.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("forward", "loss", "_call_impl"):
            return
        frame = frame.f_back  # type: ignore[assignment]
    raise ValueError(
        "log() is called in forward or loss, whose values are averaged over micro-batches and ranks. In a callback, "
        "call fit.log({...})."
    )
