"""Optimizers by name, over parameter groups that spare norms and biases from weight decay."""

from collections.abc import Collection, Mapping

from torch import nn
from torch.optim import Optimizer

from ...precision.names import did_you_mean
from ..fields.argument_fields import ArgumentFields
from ..fields.argument_types import load
from . import low_rank
from .adapted_optimizers import grok_adamw, stable_adamw
from .lomo import AdaLomo, Lomo, argument_problems
from .optimizer_makers import (
    Groups,
    LowRankMaker,
    Maker,
    PackageMaker,
    adam_betas,
    adam_maker,
    adam_options,
    ademamix_options,
    bitsandbytes_maker,
    in_backward_maker,
    make_from_path,
    make_muon,
    schedule_free_maker,
    torch_maker,
)


def undecayed_names(module: nn.Module) -> set[str]:
    """Return the names of the parameters that weight decay spares: biases, and everything in a normalization layer.

    They are told by name and layer, not by shape, since a sharded parameter shows another shape than the whole one.
    """
    names = set()
    for prefix, layer in module.named_modules():
        is_norm = "norm" in type(layer).__name__.lower()
        for name, _ in layer.named_parameters(recurse=False):
            if is_norm or name.endswith("bias"):
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


def decay_groups(module: nn.Module, weight_decay: float, names: Collection[str] | None = None) -> Groups:
    """Make parameter groups for an optimizer: trainable weights with ``weight_decay``, norms and biases with none.

    Args:
        module: its parameters that require a gradient are grouped; frozen ones are left out.
        weight_decay: of the first group.
        names: of the parameters that may be grouped; None takes all.

    Returns:
        One or two groups, in the order of ``module.named_parameters()``.

    Raises:
        ValueError: nothing in the module is trainable.
    """
    undecayed = undecayed_names(module)
    trainable = [
        (name, p) for name, p in module.named_parameters() if p.requires_grad and (names is None or name in names)
    ]
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


def make_optimizer(module: nn.Module, args: ArgumentFields, names: Collection[str] | None = None) -> Optimizer:
    """Make the optimizer that ``args.optim`` names, over the trainable parameters of a module.

    Args:
        module: placed, so that its parameters are final.
        args: gives the name, learning rate, weight decay and ``optim_args``, the optimizer's own options.
        names: of the parameters that it steps; None takes all.

    Raises:
        ValueError: nothing is trainable, or the optimizer lives in a package that isn't installed.
        TypeError: the optimizer has no such option.
    """
    groups = decay_groups(module, args.weight_decay, names)
    make = OPTIMIZERS.get(args.optim) or make_from_path
    return make(module, groups, args)


def problems(args: ArgumentFields) -> list[tuple[str, str]]:
    """Return (field, why it can't work and what to write instead) for every field of the optimizer that can't work."""
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
    projects = args.optim in LOW_RANK
    if projects and not args.optim_target_modules:
        found.append(
            ("optim_target_modules", f"optim={args.optim!r} needs linear layers to project; 'all-linear' are all")
        )
    if not projects and args.optim_target_modules is not None:
        found.append(
            ("optim_target_modules", f"has no effect with optim={args.optim!r}; {', '.join(LOW_RANK)} have one")
        )
    if args.optim in UPDATING_IN_BACKWARD:
        found += argument_problems(args)
        if args.auto_find_batch_size:
            why = (
                f"accumulates what a smaller batch leaves out, and optim={args.optim!r} can't accumulate; find "
                "per_device_train_batch_size by hand"
            )
            found.append(("auto_find_batch_size", why))
    return found


def errors_of(path: str) -> list[ValueError]:
    """Return the error of importing a path, if there is one."""
    try:
        load(path)
    except ValueError as error:
        return [error]
    return []


UPDATING_IN_BACKWARD = ("lomo", "adalomo")

OPTIMIZERS: Mapping[str, Maker] = {
    "adamw": adam_maker("AdamW"),
    "adamw_torch": adam_maker("AdamW", fused=False),
    "adamw_torch_fused": adam_maker("AdamW", fused=True),
    "adam": adam_maker("Adam"),
    "sgd": torch_maker("SGD"),
    "adafactor": torch_maker("Adafactor"),
    "rmsprop": torch_maker("RMSprop"),
    "adagrad": torch_maker("Adagrad"),
    "muon": make_muon,
    "lion": PackageMaker("lion_pytorch", "lion-pytorch", "Lion", lambda args: {"betas": (args.adam_beta1, 0.99)}),
    "stable_adamw": PackageMaker("optimi", "torch-optimi", "StableAdamW", adam_options, stable_adamw),
    "grokadamw": PackageMaker("grokadamw", "grokadamw", "GrokAdamW", adam_options, grok_adamw),
    "schedule_free_adamw": schedule_free_maker("AdamWScheduleFree"),
    "schedule_free_radam": schedule_free_maker("RAdamScheduleFree"),
    "schedule_free_sgd": schedule_free_maker("SGDScheduleFree", lambda args: {}),
    "adamw_8bit": bitsandbytes_maker("AdamW8bit"),
    "adamw_bnb_8bit": bitsandbytes_maker("AdamW8bit"),
    "paged_adamw_32bit": bitsandbytes_maker("PagedAdamW32bit"),
    "paged_adamw_8bit": bitsandbytes_maker("PagedAdamW8bit"),
    "ademamix": bitsandbytes_maker("AdEMAMix", ademamix_options),
    "ademamix_8bit": bitsandbytes_maker("AdEMAMix8bit", ademamix_options),
    "paged_ademamix_32bit": bitsandbytes_maker("PagedAdEMAMix", ademamix_options),
    "paged_ademamix_8bit": bitsandbytes_maker("PagedAdEMAMix8bit", ademamix_options),
    "lion_32bit": bitsandbytes_maker("Lion32bit", adam_betas),
    "lion_8bit": bitsandbytes_maker("Lion8bit", adam_betas),
    "paged_lion_32bit": bitsandbytes_maker("PagedLion32bit", adam_betas),
    "paged_lion_8bit": bitsandbytes_maker("PagedLion8bit", adam_betas),
    "rmsprop_bnb": bitsandbytes_maker("RMSprop32bit", lambda args: {}),
    "rmsprop_bnb_32bit": bitsandbytes_maker("RMSprop32bit", lambda args: {}),
    "rmsprop_bnb_8bit": bitsandbytes_maker("RMSprop8bit", lambda args: {}),
    "galore_adamw": LowRankMaker(
        "galore_torch",
        "GaLoreAdamW",
        low_rank.GALORE,
        lambda args: {**adam_options(args), "no_deprecation_warning": True},
    ),
    "apollo_adamw": LowRankMaker("apollo_torch", "APOLLOAdamW", low_rank.APOLLO, adam_options),
    "lomo": in_backward_maker(Lomo),
    "adalomo": in_backward_maker(AdaLomo),
}
"""The name of an optimizer to what makes it."""

LOW_RANK = tuple(name for name, make in OPTIMIZERS.items() if isinstance(make, LowRankMaker))
PAGED: Mapping[str, str] = {
    "paged_adamw_32bit": "adamw",
    "paged_adamw_8bit": "adamw_8bit",
    "paged_ademamix_32bit": "ademamix",
    "paged_ademamix_8bit": "ademamix_8bit",
    "paged_lion_32bit": "lion_32bit",
    "paged_lion_8bit": "lion_8bit",
}
"""Optimizers whose state moves between a GPU and the host, to the same optimizer whose state stays on the device."""

SCHEDULE_FREE = tuple(name for name in OPTIMIZERS if name.startswith("schedule_free_"))

# Why a name is refused.
LAYERWISE = "updates layer by layer in backward; write optim='lomo' or 'adalomo', which do, or leave '_layerwise' out"
SUBCLASSES = "keeps its moments in tensor classes of torchao's, which no checkpoint of plain tensors holds; write "
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
"""Names of transformers' optimizers that can't work here, to why and what to write instead."""
