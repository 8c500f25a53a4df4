"""How far two recordings of runs differ, and where the difference begins."""

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from ...precision.registry import get_precision
from .forward import first_difference
from .recording import Recording

TOLERANCE, REORDERED_TOLERANCE = 1e-6, 1e-4  # relative differences, in float32
# torch adds up squares in float32: over some million entries the norm is right to a few 1e-6, and to less where shards
# are added up one by one. A norm without the share of a rank is wrong by far more.
NORM_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Difference:
    """How far a run is from the reference: relative differences, infinite where one of the two numbers isn't finite.

    Attributes:
        loss: the largest difference of a loss over all updates.
        gradient: the largest difference of a gradient of the first update.
        norm: the difference of the gradient norm of the first update, before clipping.
        tolerance: what the differences of loss and gradient may be.
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
    """Return the relative difference that rounding can explain.

    Args:
        precision: the number format, whose compute dtype tells how coarsely it rounds.
        reorders_sums: whether the strategy adds up the sums inside layers in another order.
    """
    dtype = get_precision(precision).compute_dtype or torch.float32
    coarser = max(1.0, torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)
    return min(0.1, coarser * (REORDERED_TOLERANCE if reorders_sums else TOLERANCE))


def compare(reference: Recording, other: Recording, tolerance: float) -> Difference:
    """Compare two recordings.

    The difference of a parameter's gradient is the 2-norm of the difference, relative to the 2-norm of the gradients of
    all parameters. (Its own norm would not do: a gradient that is zero in exact arithmetic, such as that of the bias of
    attention's keys, is nothing but rounding.) The first gradient to diverge is searched from the loss backwards, since
    a wrong gradient makes those wrong that are computed from it. Where all gradients agree and the losses don't, the
    weights after the first update are searched, relative to their own norm: then the optimizer did something else.

    Where gradients of the first update differ, the error may begin in the forward: the first layer whose inputs or
    outputs differ is named before the gradients, or the loss, where layers agree and the loss doesn't.

    Args:
        reference: the recording that is right.
        other: the recording that is judged.
        tolerance: the relative difference that is allowed.
    """
    losses = [relative_difference(a, b) for a, b in zip(reference.losses, other.losses, strict=True)]
    first = reference.first
    norm = relative_difference(reference.norms[first - 1], other.norms[first - 1])
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


def relative_difference(reference: float, other: float) -> float:
    """Return the difference of two numbers, relative to the first; infinite where one of them isn't finite."""
    if not (math.isfinite(reference) and math.isfinite(other)):
        return math.inf
    return abs(other - reference) / max(abs(reference), sys.float_info.min)


def distance(reference: Tensor | None, other: Tensor | None, scale: float | None = None) -> float:
    """Return the 2-norm of the difference, relative to ``scale`` or the norm of the reference. None counts as zero."""
    present = other if reference is None else reference
    if present is None:
        return 0.0
    reference, other = (torch.zeros_like(present) if t is None else t for t in (reference, other))
    if reference.shape != other.shape:
        return math.inf
    difference = (other.double() - reference.double()).norm().item()
    scale = reference.double().norm().item() if scale is None else scale
    return difference / max(scale, sys.float_info.min) if math.isfinite(difference) else math.inf
