"""The default optimizer: AdamW, fused where the device has it, with no decay on norms and biases."""

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .arguments import FitArguments

FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")


def undecayed_names(module: nn.Module) -> set[str]:
    """Names of the parameters that weight decay leaves alone: biases, and everything in a normalization layer.

    Told by name and layer, not by shape, since a sharded parameter's shape is not its own.
    """
    names = set()
    for prefix, layer in module.named_modules():
        is_norm = "norm" in type(layer).__name__.lower()
        for name, _ in layer.named_parameters(recurse=False):
            if is_norm or name.endswith("bias"):
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for an optimizer: trainable weights with ``weight_decay``, norms and biases with none.

    Args:
        module: its parameters that require a gradient are grouped; frozen ones are left out.
        weight_decay: for the first group.

    Returns:
        One or two groups, in the order of ``module.named_parameters()``.
    """
    undecayed = undecayed_names(module)
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name not in undecayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if name in undecayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(module: nn.Module, args: "FitArguments") -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) over a module's trainable parameters.

    Raises:
        ValueError: nothing in the module is trainable.
    """
    groups = decay_groups(module, args.weight_decay)
    if not groups:
        raise ValueError(
            f"{type(module).__name__} has no parameter that requires a gradient, so there is nothing to train. "
            "Unfreeze some, or call fit.evaluate()."
        )
    fusable = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for g in groups for p in g["params"])
    return torch.optim.AdamW(
        groups,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=fusable or None,
    )
