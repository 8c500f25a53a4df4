"""Notes of the inputs and outputs of layers, in the order of the calls, to find the layer where a wrong forward begins.

Ranks hold different samples, and parts of features or of sequences where layers are cut. For each entry in the first
dimension of a tensor, a rank notes the sum, the sum of squares, and the count of its numbers. These can be added up
over parts, and concatenated over samples, so that runs under different strategies can be compared by a few numbers a
layer.
"""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ...precision.complex_numbers import as_real
from ...strategies.base import Strategy
from ...strategies.batches import tensors_of

WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")
"""What strategies add to the names of layers."""

MOST_ROWS = 4096  # more entries than this are noted together, to bound what ranks send each other


class FailedInLayer(Exception):
    """An error from within the forward of a layer.

    Args:
        layer: the name of the layer.
        error: the error that was raised there.
    """

    def __init__(self, layer: str, error: BaseException) -> None:
        lines = str(error).strip().splitlines() or [""]
        super().__init__(f"in the forward of {layer}: {type(error).__name__}: {lines[0]}")


class LayerWatch:
    """Notes what the layers of a module are given and return, while ``is_noting``, and which layers are computing.

    Attributes:
        is_noting: whether tensors are noted.
        notes: (event, moments): the event is "input of blocks.1" or "blocks.1"; see ``moments``.
        inside: the layers whose forward has begun and hasn't ended, the innermost last.
    """

    def __init__(self) -> None:
        self.is_noting = True
        self.notes: list[tuple[str, Tensor]] = []
        self.inside: list[str] = []

    def watch(self, module: nn.Module) -> None:
        """Register hooks on every layer. They are outermost, so that they see what the caller of a layer sees."""
        layers = {plain_name(name): layer for name, layer in module.named_modules()}
        for name, layer in layers.items():
            shown = name or "forward"
            layer.register_forward_pre_hook(self.before(shown), prepend=True, with_kwargs=True)
            layer.register_forward_hook(self.after(shown))

    def before(self, name: str) -> Callable[..., None]:
        """Make the hook that is called when a layer begins."""

        def hook(layer: nn.Module, inputs: tuple[Any, ...], named_inputs: Mapping[str, Any]) -> None:
            self.inside.append(name)
            self.note(f"input of {name}", (inputs, dict(named_inputs)))

        return hook

    def after(self, name: str) -> Callable[..., None]:
        """Make the hook that is called when a layer has ended."""

        def hook(layer: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
            while self.inside and self.inside.pop() != name:
                pass  # these layers raised an error that their caller has caught
            self.note(name, outputs)

        return hook

    def note(self, event: str, values: Any) -> None:
        """Note the first tensor of a layer's inputs or outputs."""
        if self.is_noting:
            self.notes.append((event, moments(next(tensors_of(values), None))))

    def begin(self, is_noting: bool) -> None:
        """Begin an update: forget the notes of the last one, and note tensors where ``is_noting`` is true."""
        self.is_noting = is_noting
        self.notes.clear()
        self.inside.clear()

    def gathered(self, strategy: Strategy) -> dict[str, Tensor]:
        """Gather the notes of all ranks. Collective.

        Returns:
            "<place>:<event>" to a tensor of shape (ranks that share samples, entries over all samples, 3). Empty where
            ranks have called other layers, or another number of times.
        """
        reports = strategy.gather(self.notes)
        sharing = max(1, len(reports) // strategy.data_size)
        events = [[event for event, _ in report] for report in reports]
        if any(other != events[0] for other in events):
            return {}
        notes: dict[str, Tensor] = {}
        for place, event in enumerate(events[0]):
            parts = [report[place][1] for report in reports]
            shares = [
                parts[start::sharing] for start in range(sharing)
            ]  # each has one part of the features, over all samples
            columns = [torch.cat(share) for share in shares]
            if len({len(column) for column in columns}) > 1:
                columns = [column.sum(dim=0, keepdim=True) for column in columns]
            notes[f"{place}:{event}"] = torch.stack(columns)
        return notes


def plain_name(name: str) -> str:
    """Return the name that a layer has in the user's module."""
    for wrapper in WRAPPERS:
        name = f"{name}.".replace(wrapper, "").removesuffix(".")
    return name


def moments(tensor: Tensor | None) -> Tensor:
    """Compute the sum, the sum of squares and the count of the numbers in each entry of the first dimension.

    Returns:
        A float64 tensor of shape (entries, 3) on the host. It has no entries where there is no tensor, or where ranks
        have yet to add up its values.
    """
    if tensor is None:
        return torch.zeros(0, 3, dtype=torch.float64)
    local = getattr(tensor, "to_local", None)
    if local is not None:
        if any(placement.is_partial() for placement in tensor.placements):  # type: ignore[attr-defined]
            return torch.zeros(0, 3, dtype=torch.float64)
        tensor = local()
    with torch.no_grad():
        values = tensor.detach()
        if values.is_nested:
            values = values.values()
        values = as_real(values)
        rows = values.shape[0] if values.ndim and 0 < values.shape[0] <= MOST_ROWS else 1
        values = values.double().reshape(rows, -1)
        count = torch.full((rows,), float(values.shape[1]), dtype=torch.float64, device=values.device)
        return torch.stack([values.sum(dim=1), values.square().sum(dim=1), count], dim=1).cpu()


# The comparison.


def first_difference(reference: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float) -> str:
    """Say where the forward passes of two runs begin to differ; empty where they don't, or can't be compared.

    Args:
        reference, other: what ``gathered`` returned in each run.
        tolerance: the relative difference that is allowed.
    """
    if not reference or not other:
        return ""
    differences: dict[str, float] = {}
    for (event, expected), (event_there, found) in zip(reference.items(), other.items(), strict=False):
        if event != event_there:
            names = [name.partition(":")[2] for name in (event_there, event)]
            differences[f"{names[0]}, called where the reference has {names[1]}"] = math.inf
            break
        differences[event] = difference(expected, found)
    wrong = [event for event, value in differences.items() if value > tolerance]
    if not wrong:
        return ""
    layers = [event.partition(":")[2] for event in differences if ":input of " not in event]
    wrong_layers = [event for event in wrong if ":input of " not in event]
    name = wrong[0].partition(":")[2] or wrong[0]
    return f"{name} (forward, by {differences[wrong[0]]:.0e}; {len(wrong_layers)} of {len(layers)} layers)"


def difference(expected: Tensor, found: Tensor) -> float:
    """Return how far the moments of one tensor differ in two runs, relative to its size; 0 where they can't be
    compared.

    Args:
        expected, found: moments of shape (ranks that share samples, entries, 3). Each rank has the whole tensor, or all
            have parts of it.
    """
    if not expected.shape[1] or not found.shape[1]:
        return 0.0
    if expected.shape[1] != found.shape[1]:
        expected, found = (notes.sum(dim=1, keepdim=True) for notes in (expected, found))
    whole = expected[0] if is_repeated(expected) else expected.sum(dim=0)
    counts = whole[:, 2]
    if torch.equal(found[0, :, 2], counts):
        candidates = list(found)
    elif torch.equal(found[:, :, 2].sum(dim=0), counts):
        candidates = [found.sum(dim=0)]
    else:
        return 0.0
    size = max(whole[:, 1].mean().sqrt().item(), sys.float_info.min)
    return max(distance_of_moments(whole, candidate, size) for candidate in candidates)


def is_repeated(notes: Tensor) -> bool:
    """Return whether ranks that share samples have each noted the whole tensor."""
    return bool(torch.allclose(notes, notes[:1].expand_as(notes), rtol=1e-9, atol=0.0))


def distance_of_moments(whole: Tensor, found: Tensor, size: float) -> float:
    """Return the largest difference of an entry, in norm or in sum / sqrt(count), relative to ``size``."""
    norms = (found[:, 1].sqrt() - whole[:, 1].sqrt()).abs()
    sums = (found[:, 0] - whole[:, 0]).abs() / whole[:, 2].clamp(min=1).sqrt()
    largest = torch.maximum(norms, sums).max().item()
    return largest / size if math.isfinite(largest) else math.inf


# Dropout.

DROPOUTS: tuple[Any, ...] = (
    functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d, functional.alpha_dropout,
    functional.feature_alpha_dropout, torch.dropout, torch.alpha_dropout, torch.feature_dropout,
    torch.feature_alpha_dropout,
)  # fmt: skip


class WithoutDropout(TorchFunctionMode):
    """Entered where torch's dropout functions must drop nothing, and attention no weights, whoever calls them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, but without dropout. torch calls this in the place of each of its functions."""
        kwargs = kwargs or {}
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is functional.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)
