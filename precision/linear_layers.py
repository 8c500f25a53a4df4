"""Linear layers that a low-precision format takes over: which ones qualify, and putting others in their place."""

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .base import ShapesOnRank
from .quantized import is_quantized
from .second_gradients import check_first_gradient

HEADS = ("*lm_head", "*head")
"""Names of output heads: their few features for many classes gain little, and their rounding costs the loss most."""

REPLACED = "_replaced"


def qualifying(
    module: nn.Module, precision: str, skip: Sequence[str], multiple: int, shapes: ShapesOnRank
) -> dict[str, nn.Linear]:
    """Find the nn.Linear layers to compute in another format, by name.

    Args:
        module: of the user.
        precision: its name, for the message.
        skip: patterns of layer names to leave out.
        multiple: what both sizes of a weight must be a multiple of.
        shapes: of the weights that are cut over ranks, by layer name.

    Raises:
        ValueError: none qualifies; the message says how many there are and why each kind was left out.
    """
    found: dict[str, nn.Linear] = {}
    left_out: dict[str, list[str]] = {}
    for name, layer in module.named_modules():
        # A subclass's forward is its own, as is one that somebody put there: neither would be called any more.
        if type(layer) is not nn.Linear or "forward" in vars(layer) or is_quantized(layer.weight):
            continue
        shape = shapes.get(name, tuple(layer.weight.shape))
        if any(fnmatchcase(name, pattern) for pattern in skip):
            left_out.setdefault(f"a name that skip={tuple(skip)} matches", []).append(name)
        elif any(size % multiple for size in shape):
            left_out.setdefault(f"a size that isn't a multiple of {multiple} on its rank", []).append(f"{name} {shape}")
        else:
            found[name] = layer
    if not found:
        reasons = "; ".join(f"{why}: {', '.join(names[:4])}" for why, names in left_out.items())
        raise ValueError(
            f"precision={precision!r} would change nothing: {type(module).__name__} has no nn.Linear that it takes "
            f"({reasons or 'none at all'}). Make the sizes multiples of {multiple}, name fewer layers in skip=, or use "
            "precision='bf16-mixed'."
        )
    return found


def put_in_place(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a layer wherever another one stands, with what the user may have left there: hooks around forward and
    backward, marks, and whether it trains.
    """
    for name, value in vars(old).items():
        if name not in vars(new) or name == "training" or name.startswith(("_forward", "_backward")):
            setattr(new, name, value)
    vars(new)[REPLACED] = old  # nn.Module.__setattr__ would make the old layer a part of the new one
    if refuse_second_gradient not in new._forward_hooks.values():  # the old layer has the same hooks
        new.register_forward_hook(refuse_second_gradient)
    exchange(module, old, new)


def refuse_second_gradient(layer: nn.Module, inputs: Any, output: Any) -> None:
    """A hook on layers in the place of others: their products' gradients have none."""
    differs = REPLACED in vars(layer) and isinstance(output, Tensor) and output.requires_grad
    if differs and not torch.compiler.is_compiling():
        output.register_hook(check_gradient)


def check_gradient(gradient: Tensor) -> None:
    """Refuse a backward that will be differentiated, on the way to such a layer."""
    check_first_gradient(
        "products in float8 have",
        "Use precision='bf16-mixed', or leave the layers that the gradient passes out of this format by its skip=.",
    )


def put_back(module: nn.Module) -> None:
    """The user's own layers, with the parameters as they are now, where ``put_in_place`` put others: a module that was
    trained in one format and is given to a run in another.
    """
    for layer in list(module.modules()):
        old = vars(layer).get(REPLACED)
        if old is not None:
            for name, parameter in old._parameters.items():
                old._parameters[name] = None if parameter is None else layer._parameters[name]
            old.train(layer.training)
            exchange(module, layer, old)


def exchange(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a layer wherever another one stands."""
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def tied_weights(module: nn.Module) -> set[int]:
    """The ids of parameters that several layers own."""
    owners = Counter(id(p) for layer in module.modules() for p in layer._parameters.values() if p is not None)
    return {parameter for parameter, count in owners.items() if count > 1}
