"""What makes an optimizer: a class of torch's, of a package that need not be installed, or at a path of the user's."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..fields.argument_fields import ArgumentFields
from ..fields.argument_types import load
from . import low_rank

Groups = list[dict[str, Any]]


OptionsOf = Callable[[ArgumentFields], dict[str, Any]]
"""The arguments to what an optimizer is given beside its groups and the learning rate."""

Maker = Callable[[nn.Module, Groups, ArgumentFields], Optimizer]
"""(module, parameter groups, arguments) to an optimizer."""

FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")


def make_from_path(module: nn.Module, groups: Groups, args: ArgumentFields) -> Optimizer:
    """Make an optimizer of the class or function at the path that ``optim`` gives.

    Raises:
        ValueError: the optimizer doesn't decay weights, and ``weight_decay`` asks for it.
        TypeError: what the class or function makes is no optimizer.
    """
    optimizer = load(args.optim)(groups, lr=args.learning_rate, **args.optim_args)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optim={args.optim!r} must make a torch.optim.Optimizer. It made: {optimizer!r:.200}")
    if args.weight_decay and "weight_decay" not in optimizer.defaults:
        raise ValueError(
            f"weight_decay={args.weight_decay}: {type(optimizer).__name__} has no such option, so that nothing would "
            "decay. Leave it out."
        )
    return optimizer


def adam_maker(class_name: str, fused: bool | None = None) -> Any:
    """Return a maker of Adam (Kingma and Ba, 2015) or AdamW (Loshchilov and Hutter, 2019).

    Args:
        class_name: the name of the class in torch.optim.
        fused: whether one kernel updates all parameters; None means where the device can.
    """

    def make(module: nn.Module, groups: Groups, args: ArgumentFields) -> Optimizer:
        parameters = [p for group in groups for p in group["params"]]
        fusable = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters)
        chosen = (fusable or None) if fused is None else fused
        options = {"fused": chosen, **adam_options(args), **args.optim_args}
        return getattr(torch.optim, class_name)(groups, lr=args.learning_rate, **options)

    return make


def adam_options(args: ArgumentFields) -> dict[str, Any]:
    """Return Adam's constants under torch's names."""
    return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def adam_betas(args: ArgumentFields) -> dict[str, Any]:
    """Return Adam's two decay rates alone, for optimizers without its epsilon."""
    return {"betas": (args.adam_beta1, args.adam_beta2)}


def ademamix_options(args: ArgumentFields) -> dict[str, Any]:
    """Return AdEMAMix's constants (Pagliardini et al., 2024): Adam's, and the decay of the slow average; ``optim_args``
    may give other ``betas``.
    """
    return {"betas": (args.adam_beta1, args.adam_beta2, 0.9999), "eps": args.adam_epsilon}


def make_muon(module: nn.Module, groups: Groups, args: ArgumentFields) -> Optimizer:
    """Make Muon (Jordan et al., 2024) for the matrices of hidden layers, and AdamW for embeddings, vectors, the head.

    ``learning_rate`` is AdamW's. Matrices take steps of the same size, as Moonlight scales them (Liu et al., 2025).
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
    """Several optimizers over different parameters that act as one: their groups are in a row, their state in one
    mapping.
    """

    def __init__(self, parts: list[Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        # The groups and the state are the parts' own, so that schedules and checkpoints reach them.
        self.param_groups = [group for part in parts for group in part.param_groups]
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step each of the optimizers."""
        assert closure is None, "a closure can't be shared among optimizers"
        for part in self.parts:
            part.step()


def torch_maker(class_name: str, options: OptionsOf = lambda args: {}) -> Any:
    """Return a maker of one of torch.optim's optimizers."""

    def make(module: nn.Module, groups: Groups, args: ArgumentFields) -> Optimizer:
        made_by = getattr(torch.optim, class_name)
        return made_by(groups, lr=args.learning_rate, **{**options(args), **args.optim_args})

    return make


class PackageMaker:
    """Makes an optimizer from a package that need not be installed.

    Args:
        package: what is imported.
        distribution: what is installed.
        class_name: the name of the optimizer's class in the package.
        options: what the optimizer is given beside groups and learning rate.
        find_class: returns the class, where the package's own needs a change first.
    """

    def __init__(
        self,
        package: str,
        distribution: str,
        class_name: str,
        options: OptionsOf = lambda args: {},
        find_class: Callable[[], Callable[..., Any]] | None = None,
    ) -> None:
        self.distribution, self.class_name, self.options = distribution, class_name, options
        self.find_class = find_class or (lambda: getattr(import_module(package), class_name))

    def __call__(self, module: nn.Module, groups: Groups, args: ArgumentFields) -> Optimizer:
        """Make the optimizer.

        Raises:
            ValueError: the package isn't installed.
        """
        return self.make(groups, args, args.optim_args)

    def make(self, groups: Groups, args: ArgumentFields, optim_args: Mapping[str, Any]) -> Optimizer:
        """Make the optimizer with these of its own options, see ``__call__``."""
        try:
            made_by = self.find_class()
        except ImportError as error:
            raise ValueError(
                f"optim={args.optim!r} comes from the package {self.distribution}, which isn't installed ({error}). "
                f"Run: pip install {self.distribution} (or 'stratagem[optimizers]', which holds all of them)"
            ) from error
        return made_by(groups, lr=args.learning_rate, **{**self.options(args), **optim_args})


def bitsandbytes_maker(class_name: str, options: OptionsOf = adam_options) -> PackageMaker:
    """Return a maker of one of bitsandbytes' optimizers."""
    return PackageMaker("bitsandbytes.optim", "bitsandbytes", class_name, options)


def schedule_free_maker(class_name: str, options: OptionsOf = adam_options) -> PackageMaker:
    """Return a maker of one of the schedule-free optimizers (Defazio et al., 2024)."""
    return PackageMaker("schedulefree", "schedulefree", class_name, options)


class LowRankMaker(PackageMaker):
    """Makes an optimizer that projects the gradients of ``optim_target_modules``.

    Args:
        package: what is imported; its distribution is named the same, with "-" for "_".
        class_name: the name of the optimizer's class in the package.
        projected: options of the groups that are projected, with their defaults; ``optim_args`` override them.
        options: what the optimizer is given beside groups and learning rate.
    """

    def __init__(self, package: str, class_name: str, projected: Mapping[str, Any], options: OptionsOf) -> None:
        own = f"Plain{class_name}"
        super().__init__(
            package,
            package.replace("_", "-"),
            own,
            options,
            lambda: low_rank.with_plain_state(package, class_name, own),
        )
        self.projected = projected

    def __call__(self, module: nn.Module, groups: Groups, args: ArgumentFields) -> Optimizer:
        """Make the optimizer; see ``PackageMaker``."""
        assert args.optim_target_modules is not None, "FitArguments refuses a run without them"
        of_groups = {name: args.optim_args.get(name, value) for name, value in self.projected.items()}
        others = {name: value for name, value in args.optim_args.items() if name not in self.projected}
        groups = low_rank.split_projected(module, groups, args.optim_target_modules, of_groups)
        return self.make(groups, args, others)


def in_backward_maker(made_by: Callable[..., Optimizer]) -> Any:
    """Return a maker of LOMO or AdaLOMO."""

    def make(module: nn.Module, groups: Groups, args: ArgumentFields) -> Optimizer:
        return made_by(groups, lr=args.learning_rate, **args.optim_args)

    return make
