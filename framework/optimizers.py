"""Optimizers by name, over groups that spare norms and biases from weight decay."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from .lomo import AdaLomo, Lomo

if TYPE_CHECKING:
    from .arguments import FitArguments

Groups = list[dict[str, Any]]

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


def decay_groups(module: nn.Module, weight_decay: float) -> Groups:
    """Parameter groups for an optimizer: trainable weights with ``weight_decay``, norms and biases with none.

    Args:
        module: its parameters that require a gradient are grouped; frozen ones are left out.
        weight_decay: for the first group.

    Returns:
        One or two groups, in the order of ``module.named_parameters()``.

    Raises:
        ValueError: nothing in the module is trainable.
    """
    undecayed = undecayed_names(module)
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name not in undecayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if name in undecayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(
            f"{type(module).__name__} has no parameter that requires a gradient, so there is nothing to train. "
            "Unfreeze some, or call fit.evaluate()."
        )
    return groups


def make_optimizer(module: nn.Module, args: "FitArguments") -> Optimizer:
    """The optimizer that ``args.optim`` names, over a module's trainable parameters.

    Args:
        module: placed, so that its parameters are final.
        args: gives the name, learning rate, weight decay and ``optim_args``, the optimizer's own options.

    Raises:
        ValueError: nothing is trainable, or the optimizer lives in a package that isn't installed.
        TypeError: the optimizer has no such option.
    """
    groups = decay_groups(module, args.weight_decay)
    return OPTIMIZERS[args.optim](module, groups, args)


def fused_adam(class_name: str) -> Any:
    """A maker of Adam (Kingma and Ba, 2015) or AdamW (Loshchilov and Hutter, 2019), fused where the device can."""

    def make(module: nn.Module, groups: Groups, args: "FitArguments") -> Optimizer:
        parameters = [p for group in groups for p in group["params"]]
        fusable = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters)
        options = {"fused": fusable or None, **adam_options(args), **args.optim_args}
        return getattr(torch.optim, class_name)(groups, lr=args.learning_rate, **options)

    return make


def adam_options(args: "FitArguments") -> dict[str, Any]:
    """Adam's constants under torch's names."""
    return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def muon(module: nn.Module, groups: Groups, args: "FitArguments") -> Optimizer:
    """Muon (Jordan et al., 2024) for the matrices of hidden layers; AdamW for embeddings, vectors and the head.

    ``learning_rate`` is AdamW's; matrices take steps of the same size, as Moonlight scales them (Liu et al., 2025).
    """
    embeddings = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    # The last linear layer is the head: it maps features to classes, and is no hidden matrix.
    linear = [layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)]
    apart = embeddings | {id(weight) for weight in linear[-1:]}
    matrices, others = [], []
    for group in groups:
        hidden = [p for p in group["params"] if p.ndim == 2 and id(p) not in apart]
        matrices.append({**group, "params": hidden})
        others.append({**group, "params": [p for p in group["params"] if p.ndim != 2 or id(p) in apart]})
    parts: list[Optimizer] = []
    if any(group["params"] for group in matrices):
        options = {"adjust_lr_fn": "match_rms_adamw", **args.optim_args}
        held = [group for group in matrices if group["params"]]
        parts.append(torch.optim.Muon(held, lr=args.learning_rate, **options))
    if any(group["params"] for group in others):
        held = [group for group in others if group["params"]]
        parts.append(torch.optim.AdamW(held, lr=args.learning_rate, **adam_options(args)))
    return Together(parts)


class Together(Optimizer):
    """Several optimizers over different parameters, as one: their groups in a row, their state in one mapping."""

    def __init__(self, parts: list[Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        # The groups and the state are the parts' own, so that schedules and checkpoints reach them.
        self.param_groups = [group for part in parts for group in part.param_groups]
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step each part."""
        assert closure is None, "a closure can't be shared among optimizers"
        for part in self.parts:
            part.step()


def from_torch(class_name: str, options: Callable[["FitArguments"], dict[str, Any]] = lambda args: {}) -> Any:
    """A maker of one of torch.optim's optimizers."""

    def make(module: nn.Module, groups: Groups, args: "FitArguments") -> Optimizer:
        made_by = getattr(torch.optim, class_name)
        return made_by(groups, lr=args.learning_rate, **{**options(args), **args.optim_args})

    return make


def from_package(
    package: str, distribution: str, class_name: str, options: Callable[["FitArguments"], dict[str, Any]]
) -> Any:
    """A maker of an optimizer from a package that need not be installed.

    Args:
        package: to import.
        distribution: to install.
        class_name: in the package.
        options: what it is given beside groups and learning rate.
    """

    def make(module: nn.Module, groups: Groups, args: "FitArguments") -> Optimizer:
        try:
            made_by = getattr(import_module(package), class_name)
        except ImportError as error:
            raise ValueError(
                f"optim={args.optim!r} comes from the package {distribution}, which isn't installed ({error}). "
                f"Run: pip install {distribution} (or 'stratagem[optimizers]', which holds all of them)"
            ) from error
        return made_by(groups, lr=args.learning_rate, **{**options(args), **args.optim_args})

    return make


def updating_in_backward(made_by: Callable[..., Optimizer]) -> Any:
    """A maker of LOMO or AdaLOMO."""

    def make(module: nn.Module, groups: Groups, args: "FitArguments") -> Optimizer:
        return made_by(groups, lr=args.learning_rate, **args.optim_args)

    return make


UPDATING_IN_BACKWARD = ("lomo", "adalomo")

OPTIMIZERS: Mapping[str, Callable[[nn.Module, Groups, "FitArguments"], Optimizer]] = {
    "adamw": fused_adam("AdamW"),
    "adam": fused_adam("Adam"),
    "sgd": from_torch("SGD"),
    "adafactor": from_torch("Adafactor"),
    "rmsprop": from_torch("RMSprop"),
    "adagrad": from_torch("Adagrad"),
    "muon": muon,
    "lion": from_package("lion_pytorch", "lion-pytorch", "Lion", lambda args: {"betas": (args.adam_beta1, 0.99)}),
    "adamw_8bit": from_package("bitsandbytes.optim", "bitsandbytes", "AdamW8bit", adam_options),
    "schedule_free_adamw": from_package("schedulefree", "schedulefree", "AdamWScheduleFree", adam_options),
    "lomo": updating_in_backward(Lomo),
    "adalomo": updating_in_backward(AdaLomo),
}
"""Name to maker."""
