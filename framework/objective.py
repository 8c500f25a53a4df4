"""The loss contract: the gradient of an update is that of ONE mean over all items of the global batch.

``loss`` returns a mean over its micro-batch. With n items in a micro-batch and N in the whole update (over all
micro-batches and ranks), the micro-batch's loss is weighed n / N, so padded labels, a short last group and ranks with
unequal counts change nothing. Strategies average gradients over their ranks, so a rank multiplies by their number.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..strategies.base import Strategy
from ..strategies.batches import is_by_position, labels_in
from .calling import Call, forward_call
from .data.stand_in import StandIn
from .in_run import logged_of
from .module import TrainModule
from .rows import Rows

Count = int | Tensor  # a Tensor where the batch was on an accelerator from the start


NO_EXTRAS: Mapping[str, Tensor] = {}


class Objective:
    """Calls a model on a batch and finds the loss in what comes back.

    Args:
        module: the user's module.
        compute_loss_func: takes (outputs, labels[, num_items_in_batch]) and replaces the module's own loss.
        label_smoothing: above 0, replaces the loss by smoothed cross entropy of the logits.
        past_index: this entry of the outputs goes to the next batch as ``mems``; -1 hands on nothing.
        rows: gathers all ranks' rows within the loss; None where nobody can.
        forward: calls the model in the place of ``forward_call``'s function, which it is given first.

    Attributes:
        logged: collects what the module logs, from the first forward of a micro-batch.
        past: what the next batch is given as ``mems``.
        noted: what ``note`` returns; None before the first loss.
        takes_num_items: whether the loss function itself divides by the global count of items.
        own_loss: (outputs, batch[, num_items_in_batch]) to loss, in place of the module's; None leaves the module's.
    """

    own_loss: Callable[..., Tensor | Mapping[str, Tensor]] | None = None

    def __init__(
        self,
        module: TrainModule,
        compute_loss_func: Callable[..., Tensor] | None = None,
        label_smoothing: float = 0.0,
        past_index: int = -1,
        rows: Rows | None = None,
        forward: Callable[[Call, nn.Module, Any], Any] | None = None,
    ) -> None:
        self.module = module
        self.rows = rows
        self.logged = logged_of(module)
        self.label_smoothing = label_smoothing
        self.past_index = past_index
        self.past: Any = None
        self.noted: tuple[Mapping[str, Tensor], bool] | None = None
        self._was_checked = False
        self.call: Call = forward_call(module)
        if forward is not None:
            self.call = partial(forward, self.call)
        # (model, batch on the device) to outputs. A method around it would make the user's traceback longer.
        self.forward = self.call if past_index < 0 else self.forward_with_past
        self.compute_loss_func = compute_loss_func
        self.name = "compute_loss_func" if compute_loss_func else f"{type(module).__name__}.loss"
        loss = compute_loss_func or module.loss
        # Only an explicit parameter counts: **kwargs may be handed to something that ignores the count.
        replaced = label_smoothing > 0 and compute_loss_func is None
        self.takes_num_items = not replaced and "num_items_in_batch" in inspect.signature(loss).parameters

    def count(self, batch: Any) -> Count:
        """Count the items in a batch as the data gave it."""
        is_mine = not isinstance(batch, StandIn)
        count = self.module.count_items(batch) if is_mine else 0
        if self.rows is not None:
            self.rows.begin_batch(is_mine, has_items=isinstance(count, Tensor) or count > 0)
        return count

    def forward_with_past(self, model: nn.Module, batch: Any) -> Any:
        """Compute the model's outputs for a batch that is given an output of the batch before."""
        if self.past is not None:
            if not isinstance(batch, Mapping):
                raise ValueError(
                    f"past_index={self.past_index} adds 'mems' to a mapping batch, and the batch is a "
                    f"{type(batch).__name__}. Have the dataset return mappings."
                )
            batch = {**batch, "mems": self.past}
        outputs = self.call(model, batch)
        entries = tuple(outputs.values()) if isinstance(outputs, Mapping) else outputs
        if not isinstance(entries, tuple | list) or self.past_index >= len(entries):
            found = f"{len(entries)} entries" if isinstance(entries, tuple | list) else f"a {type(outputs).__name__}"
            raise ValueError(f"past_index={self.past_index} names an entry of the outputs, but forward gave {found}.")
        # It is detached, since the backward of the next update must not reach into the graph of this one.
        self.past = tree_map(
            lambda value: value.detach() if isinstance(value, Tensor) else value, entries[self.past_index]
        )
        return outputs

    def loss(self, outputs: Any, batch: Any, num_items: Count | None = None) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Compute the loss of the outputs of forward.

        Args:
            outputs: what forward returned.
            batch: on the device.
            num_items: items in the whole update; None stands for the items of this batch.

        Returns:
            (loss, extras): the 0-dim loss, and the other entries of a mapping loss, detached.
        """
        options = {}
        if self.takes_num_items:
            options["num_items_in_batch"] = self.count(batch) if num_items is None else num_items
        is_share = self.takes_num_items and num_items is not None
        self.noted = NO_EXTRAS, is_share
        loss: Tensor | Mapping[str, Tensor]
        # What is compiled would otherwise check, and change, what no compiled loss needs.
        rows = None if torch.compiler.is_compiling() else self.rows
        if self.label_smoothing and self.compute_loss_func is None:
            labels = labels_in(batch)
            if labels is None:
                found = f"the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else "no keys"
                raise ValueError(
                    f"label_smoothing_factor smooths the batch's 'labels', and the batch has {found}. Name them so, or "
                    "leave the argument out."
                )
            loss = smoothed_loss(outputs, labels, self.label_smoothing, self.module.causal)
            return loss, NO_EXTRAS
        if rows is not None:
            rows.open()
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels_of(batch), **options)
        elif self.own_loss is not None:
            loss = self.own_loss(outputs, batch, **options)
        else:
            loss = self.module.loss(outputs, batch, **options)
        if rows is not None:
            rows.close()
        if not isinstance(loss, Mapping):
            return loss, NO_EXTRAS
        if "loss" not in loss:
            raise ValueError(
                f"{self.name} returned a mapping without 'loss'. Its keys are {', '.join(map(repr, loss))}."
            )
        extras = {name: value.detach() for name, value in loss.items() if name != "loss"}
        self.noted = extras, is_share
        return loss["loss"], extras

    def note(self) -> tuple[Mapping[str, Tensor], bool]:
        """Return (extras, is_share) of the last ``loss``: its extras, and whether it is divided by the items of the
        whole update. Whoever calls compute_loss calls this next, since compute_loss, whose signature is that of
        transformers, can return the loss and the outputs alone.
        """
        noted = self.noted
        assert noted is not None
        return noted

    @property
    def gathered(self) -> list[Tensor]:
        """What the loss of a batch without items has gathered of all ranks: every rank goes through its backward."""
        return [] if self.rows is None else self.rows.gathered

    def forget_past(self) -> None:
        """Hand the next batch nothing: it isn't the next of the same sequence."""
        self.past = None

    def forget_note(self) -> None:
        """Forget the last note, before a compute_loss that may find its loss without this object."""
        self.noted = None

    def share(self, loss: Tensor, count: Count, num_items: Count, is_share: bool, strategy: Strategy) -> Tensor:
        """Weigh a micro-batch's loss, so that the gradients of an update are those of ONE mean over all its items.

        Args:
            loss: of this rank's part of the micro-batch, see ``Strategy.local_loss``. The first one is checked.
            count: items in the micro-batch, on this rank.
            num_items: items in the whole update, over all ranks.
            is_share: whether the loss is divided by ``num_items`` already.
            strategy: averages gradients over its ranks.

        Returns:
            The loss to go backward from: the micro-batch's share of the update's loss, times the ranks that gradients
            are averaged over.

        Raises:
            TypeError, ValueError: the loss can't be trained on.
        """
        if not self._was_checked:
            self.check(loss)
            self._was_checked = True
        ranks = strategy.gradient_ranks
        if not is_share:
            return weigh(loss, count, num_items, ranks, strategy.factor)
        return loss * ranks if ranks > 1 else loss

    @contextmanager
    def without_past(self) -> Iterator[None]:
        """Entered around an evaluation: its first batch is given no ``mems``, and the next batch of training those of
        the last one of training.
        """
        past, self.past = self.past, None
        try:
            yield
        finally:
            self.past = past

    def check(self, loss: Any) -> None:
        """Refuse a loss that can't be trained on.

        Raises:
            TypeError: the loss isn't a tensor.
            ValueError: the loss isn't a scalar, or no gradient leads from it to the parameters.
        """
        if not isinstance(loss, Tensor):
            raise TypeError(f"{self.name} must return a 0-dim tensor. Received: {type(loss).__name__}")
        if loss.ndim:
            raise ValueError(
                f"{self.name} must return the mean over the batch's items, a 0-dim tensor. "
                f"Received a tensor of shape {tuple(loss.shape)}; take its .mean()."
            )
        if not loss.requires_grad:
            raise ValueError(
                f"{self.name} returned a tensor that carries no gradient: it was detached, made of numbers, or made "
                "under torch.no_grad(), or every parameter is frozen. Compute it from forward's outputs."
            )


def smoothed_loss(outputs: Any, labels: Tensor, smoothing: float, causal: bool) -> Tensor:
    """Compute the mean over labels other than -100 of (1 - smoothing)·(-log p[label]) + smoothing·(mean of -log p over
    classes).

    Args:
        outputs: logits of shape (..., classes), a mapping that holds them as "logits", or a tuple whose first entry
            they are.
        labels: targets of shape (...).
        smoothing: the weight that is spread over all classes (Szegedy et al., 2016).
        causal: whether position i predicts label i + 1.
    """
    if isinstance(outputs, Mapping):
        if "logits" not in outputs:
            raise ValueError(
                f"label_smoothing_factor needs the logits, and forward's outputs have the keys {', '.join(outputs)}."
            )
        logits = outputs["logits"]
    else:
        logits = outputs[0] if isinstance(outputs, tuple | list) else outputs
    if causal:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    flat = logits.reshape(-1, logits.shape[-1])
    return nn.functional.cross_entropy(flat, labels.reshape(-1), label_smoothing=smoothing)


def labels_of(batch: Any) -> Any:
    """Return the targets of a batch: its "labels" (an entry or an attribute), else the last entry of a tuple, else
    None.
    """
    labels = labels_in(batch)
    if labels is None and is_by_position(batch) and len(batch) > 1:
        return batch[-1]
    return labels


def without_loss(loss: Tensor, outputs: Any) -> Tensor:
    """Make a scalar whose backward reaches every parameter but not the loss, for a batch without items: the gradient of
    a mean over nothing is 0/0, which a weight of 0 doesn't make finite.

    Args:
        loss: the loss over no items, which is returned where no output carries a gradient.
        outputs: what forward returned.
    """
    parts = list(differentiable(outputs))
    is_scalar = isinstance(loss, Tensor) and loss.ndim == 0  # else ``check`` refuses the loss
    if not (parts and is_scalar):
        return loss
    reached = leaves(parts)
    in_loss_alone = [parameter for node, parameter in leaves([loss]).items() if node not in reached]
    return torch.stack([part.float().sum() for part in (*parts, *in_loss_alone)]).sum()


def leaves(tensors: Iterable[Tensor]) -> dict[Any, Tensor]:
    """Return the parameters that some tensors are computed of, by autograd's nodes for them."""
    nodes: list[Any] = [tensor.grad_fn for tensor in tensors]
    found, seen = {}, set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[node] = node.variable
        nodes += [following for following, _ in node.next_functions]
    return found


def differentiable(outputs: Any) -> Iterator[Tensor]:
    """Yield the tensors in the outputs of forward that carry a gradient, but not scalars, which are losses."""
    if isinstance(outputs, Tensor):
        if outputs.ndim and outputs.requires_grad and outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, Mapping | tuple | list):
        for part in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from differentiable(part)


def weigh(
    loss: Tensor,
    count: Count,
    num_items: Count,
    ranks: int,
    factor: Callable[[float], float | Tensor] = float,
) -> Tensor:
    """Compute a micro-batch's share of the loss of the update, times the number of ranks that gradients are averaged
    over.

    Args:
        loss: the mean over ``count`` items.
        count: items in this micro-batch on this rank.
        num_items: items in the update over all ranks; a tensor where ranks were summed.
        ranks: the number of ranks that gradients are averaged over.
        factor: ``Strategy.factor``.
    """
    if isinstance(count, int):
        if count == 0:  # the mean over no items is NaN, and its share is nothing
            return torch.nan_to_num(loss) * 0.0
        if isinstance(num_items, int):
            return loss if count == num_items and ranks == 1 else loss * factor(count * ranks / num_items)
        return loss * (count * ranks / num_items)
    share = count * ranks / num_items
    return torch.where(count == 0, torch.nan_to_num(loss) * 0.0, loss * share)
