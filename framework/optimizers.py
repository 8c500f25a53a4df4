"""Optimizers by name, over groups that spare norms and biases from weight decay."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..precision.names import did_you_mean
from . import low_rank
from .adapted_optimizers import grok_adamw, stable_adamw
from .argument_types import load
from .lomo import AdaLomo, Lomo, argument_problems

if TYPE_CHECKING:
    from .arguments import FitArguments

Groups = list[dict[str, Any]]

OptionsOf = Callable[["FitArguments"], dict[str, Any]]

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
    make = OPTIMIZERS.get(args.optim) or from_path
    return make(module, groups, args)


def problems(args: "FitArguments") -> list[tuple[str, str]]:
    """(field, why it can't work and what to write instead), for every field of the optimizer that can't."""
    found: list[tuple[str, str]] = []
    is_path = "." in args.optim
    if args.optim in REFUSED:
        found.append(("optim", REFUSED[args.optim]))
    elif is_path:
        found += [("optim", str(error)) for error in errors_of(args.optim)]
    elif args.optim not in OPTIMIZERS:
        found.append(
            ("optim", f"{did_you_mean(args.optim, OPTIMIZERS)} A class is named by its path, 'package.Class'.")
        )
    for name, usual in (("adam_beta1", 0.9), ("adam_beta2", 0.999), ("adam_epsilon", 1e-8)):
        if is_path and getattr(args, name) != usual:
            found.append((name, f"doesn't reach optim={args.optim!r}; write it in optim_args, as the class calls it"))
    low_rank = args.optim in LOW_RANK
    if low_rank and not args.optim_target_modules:
        found.append(
            ("optim_target_modules", f"optim={args.optim!r} needs linear layers to project; 'all-linear' are all")
        )
    if not low_rank and args.optim_target_modules is not None:
        found.append(
            ("optim_target_modules", f"has no effect with optim={args.optim!r}; {', '.join(LOW_RANK)} have one")
        )
    if args.optim in UPDATING_IN_BACKWARD:
        found += argument_problems(args.max_grad_norm or 0.0, args.gradient_accumulation_steps)
        if args.auto_find_batch_size:
            why = (
                f"accumulates what a smaller batch leaves out, and optim={args.optim!r} can't accumulate; find "
                "per_device_train_batch_size by hand"
            )
            found.append(("auto_find_batch_size", why))
    return found


def errors_of(path: str) -> list[ValueError]:
    """The error of importing a path, if there is one."""
    try:
        load(path)
    except ValueError as error:
        return [error]
    return []


def from_path(module: nn.Module, groups: Groups, args: "FitArguments") -> Optimizer:
    """An optimizer of a class, or a function that makes one, by its path.

    Raises:
        ValueError: it doesn't decay weights, and ``weight_decay`` asks for it.
        TypeError: what it makes is no optimizer.
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


def adam(class_name: str, fused: bool | None = None) -> Any:
    """A maker of Adam (Kingma and Ba, 2015) or AdamW (Loshchilov and Hutter, 2019).

    Args:
        class_name: in torch.optim.
        fused: one kernel for all parameters; None where the device can.
    """

    def make(module: nn.Module, groups: Groups, args: "FitArguments") -> Optimizer:
        parameters = [p for group in groups for p in group["params"]]
        fusable = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters)
        chosen = (fusable or None) if fused is None else fused
        options = {"fused": chosen, **adam_options(args), **args.optim_args}
        return getattr(torch.optim, class_name)(groups, lr=args.learning_rate, **options)

    return make


def adam_options(args: "FitArguments") -> dict[str, Any]:
    """Adam's constants under torch's names."""
    return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def betas(args: "FitArguments") -> dict[str, Any]:
    """Adam's decays alone, for optimizers without its epsilon."""
    return {"betas": (args.adam_beta1, args.adam_beta2)}


def ademamix_options(args: "FitArguments") -> dict[str, Any]:
    """AdEMAMix's constants (Pagliardini et al., 2024): Adam's, and the slow average's decay; ``optim_args`` may give
    other ``betas``.
    """
    return {"betas": (args.adam_beta1, args.adam_beta2, 0.9999), "eps": args.adam_epsilon}


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


def from_torch(class_name: str, options: OptionsOf = lambda args: {}) -> Any:
    """A maker of one of torch.optim's optimizers."""

    def make(module: nn.Module, groups: Groups, args: "FitArguments") -> Optimizer:
        made_by = getattr(torch.optim, class_name)
        return made_by(groups, lr=args.learning_rate, **{**options(args), **args.optim_args})

    return make


class FromPackage:
    """A maker of an optimizer from a package that need not be installed.

    Args:
        package: to import.
        distribution: to install.
        class_name: in the package.
        options: what it is given beside groups and learning rate.
        find_class: returns the class, where the package's own has to be made fit first.
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

    def __call__(self, module: nn.Module, groups: Groups, args: "FitArguments") -> Optimizer:
        """Make it.

        Raises:
            ValueError: the package isn't installed.
        """
        try:
            made_by = self.find_class()
        except ImportError as error:
            raise ValueError(
                f"optim={args.optim!r} comes from the package {self.distribution}, which isn't installed ({error}). "
                f"Run: pip install {self.distribution} (or 'stratagem[optimizers]', which holds all of them)"
            ) from error
        return made_by(groups, lr=args.learning_rate, **{**self.options(args), **args.optim_args})


def bitsandbytes(class_name: str, options: OptionsOf = adam_options) -> FromPackage:
    """A maker of one of bitsandbytes' optimizers."""
    return FromPackage("bitsandbytes.optim", "bitsandbytes", class_name, options)


def schedule_free(class_name: str, options: OptionsOf = adam_options) -> FromPackage:
    """A maker of one of the schedule-free optimizers (Defazio et al., 2024)."""
    return FromPackage("schedulefree", "schedulefree", class_name, options)


class LowRank(FromPackage):
    """A maker of an optimizer that projects the gradients of ``optim_target_modules``.

    Args:
        package: to import, and to install with "-" for "_".
        class_name: in the package.
        projected: options of the groups that are projected, with their defaults; ``optim_args`` override them.
        options: what it is given beside groups and learning rate.
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

    def __call__(self, module: nn.Module, groups: Groups, args: "FitArguments") -> Optimizer:
        """Make it."""
        assert args.optim_target_modules is not None, "FitArguments refuses it"
        of_groups = {name: args.optim_args.get(name, value) for name, value in self.projected.items()}
        others = {name: value for name, value in args.optim_args.items() if name not in self.projected}
        groups = low_rank.projected_groups(module, groups, args.optim_target_modules, of_groups)
        return super().__call__(module, groups, args.replace(optim_args=others))


def updating_in_backward(made_by: Callable[..., Optimizer]) -> Any:
    """A maker of LOMO or AdaLOMO."""

    def make(module: nn.Module, groups: Groups, args: "FitArguments") -> Optimizer:
        return made_by(groups, lr=args.learning_rate, **args.optim_args)

    return make


UPDATING_IN_BACKWARD = ("lomo", "adalomo")

OPTIMIZERS: Mapping[str, Callable[[nn.Module, Groups, "FitArguments"], Optimizer]] = {
    "adamw": adam("AdamW"),
    "adamw_torch": adam("AdamW", fused=False),
    "adamw_torch_fused": adam("AdamW", fused=True),
    "adam": adam("Adam"),
    "sgd": from_torch("SGD"),
    "adafactor": from_torch("Adafactor"),
    "rmsprop": from_torch("RMSprop"),
    "adagrad": from_torch("Adagrad"),
    "muon": muon,
    "lion": FromPackage("lion_pytorch", "lion-pytorch", "Lion", lambda args: {"betas": (args.adam_beta1, 0.99)}),
    "stable_adamw": FromPackage("optimi", "torch-optimi", "StableAdamW", adam_options, stable_adamw),
    "grokadamw": FromPackage("grokadamw", "grokadamw", "GrokAdamW", adam_options, grok_adamw),
    "schedule_free_adamw": schedule_free("AdamWScheduleFree"),
    "schedule_free_radam": schedule_free("RAdamScheduleFree"),
    "schedule_free_sgd": schedule_free("SGDScheduleFree", lambda args: {}),
    "adamw_8bit": bitsandbytes("AdamW8bit"),
    "adamw_bnb_8bit": bitsandbytes("AdamW8bit"),
    "paged_adamw_32bit": bitsandbytes("PagedAdamW32bit"),
    "paged_adamw_8bit": bitsandbytes("PagedAdamW8bit"),
    "ademamix": bitsandbytes("AdEMAMix", ademamix_options),
    "ademamix_8bit": bitsandbytes("AdEMAMix8bit", ademamix_options),
    "paged_ademamix_32bit": bitsandbytes("PagedAdEMAMix", ademamix_options),
    "paged_ademamix_8bit": bitsandbytes("PagedAdEMAMix8bit", ademamix_options),
    "lion_32bit": bitsandbytes("Lion32bit", betas),
    "lion_8bit": bitsandbytes("Lion8bit", betas),
    "paged_lion_32bit": bitsandbytes("PagedLion32bit", betas),
    "paged_lion_8bit": bitsandbytes("PagedLion8bit", betas),
    "rmsprop_bnb": bitsandbytes("RMSprop32bit", lambda args: {}),
    "rmsprop_bnb_32bit": bitsandbytes("RMSprop32bit", lambda args: {}),
    "rmsprop_bnb_8bit": bitsandbytes("RMSprop8bit", lambda args: {}),
    "galore_adamw": LowRank(
        "galore_torch",
        "GaLoreAdamW",
        low_rank.GALORE,
        lambda args: {**adam_options(args), "no_deprecation_warning": True},
    ),
    "apollo_adamw": LowRank("apollo_torch", "APOLLOAdamW", low_rank.APOLLO, adam_options),
    "lomo": updating_in_backward(Lomo),
    "adalomo": updating_in_backward(AdaLomo),
}
"""Name to maker."""

LOW_RANK = tuple(name for name, make in OPTIMIZERS.items() if isinstance(make, LowRank))
PAGED: Mapping[str, str] = {
    "paged_adamw_32bit": "adamw",
    "paged_adamw_8bit": "adamw_8bit",
    "paged_ademamix_32bit": "ademamix",
    "paged_ademamix_8bit": "ademamix_8bit",
    "paged_lion_32bit": "lion_32bit",
    "paged_lion_8bit": "lion_8bit",
}
"""Optimizers whose state moves between a GPU and the host, to the same one without that."""

SCHEDULE_FREE = tuple(name for name in OPTIMIZERS if name.startswith("schedule_free_"))

LAYERWISE = "updates layer by layer in backward; write optim='lomo' or 'adalomo', which do, or leave '_layerwise' out"
SUBCLASSES = "keeps its moments in tensor classes of torchao's, which no checkpoint of plain tensors holds; write "
"""Names of transformers' that can't work here, to why and what to write instead."""
REFUSED: Mapping[str, str] = {
    "adamw_torch_xla": "is fused by the compiler: write optim='adamw' with strategy='xla'",
    "adamw_torch_npu_fused": "needs Ascend's torch_npu; write optim='adamw'",
    "adamw_anyprecision": "comes from torchdistx, which has no release for this torch; write optim='adamw'",
    "adamw_torch_4bit": SUBCLASSES + "optim='adamw_8bit'",
    "adamw_torch_8bit": SUBCLASSES + "optim='adamw_8bit'",
    "galore_adamw_8bit": "swaps each parameter's data for its projection while it steps, and its 8-bit kernels need a "
    "GPU; write optim='galore_adamw'",
    "galore_adafactor": "keeps its projectors in objects that no checkpoint holds; write optim='galore_adamw'",
    "galore_adamw_layerwise": LAYERWISE,
    "galore_adamw_8bit_layerwise": LAYERWISE,
    "galore_adafactor_layerwise": LAYERWISE,
    "apollo_adamw_layerwise": LAYERWISE,
}
