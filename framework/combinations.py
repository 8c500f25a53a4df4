"""What can't work together, and every place where it is refused.

There are five places. Each one comes as early as what it looks at is known, and names what to write instead:

1. **The constructors** of FitArguments (``arguments.py``), of a strategy's ``Options`` and of a precision: values that
   contradict one another within one object.
2. **Strategy.check_precision**: a precision under a strategy. It asks the table ``strategies/matrix.py``, the precision
   (``Precision.refused_parameters``), and in a strategy's own file what that strategy's options need. ``Fit`` calls it
   before ranks are started, and ``Strategy.set_up`` again.
3. **check_combination**: arguments with the strategy (``Strategy.refused_arguments``), the precision
   (``Precision.refused_arguments``), the module and the data. For a Fit, and for each trial of a search.
4. **check_optimizer_by_name**: the optimizer that ``optim`` names, with the strategy as it is set up, before the module
   is placed.
5. **check_optimizer**, and ``check_turn_optimizer``: the optimizer that was made, by a module of the user's perhaps,
   with the table UNSUITED and the strategy (``Strategy.optimizer_problem``).

A new combination that can't work becomes an entry in one of the tables named here, or a line in one of these functions.
Something else are a device that can't compute a precision (``Precision.set_up``), layers that a strategy can't place
(``Strategy.check_module`` and ``place``), and a package's own configuration (``Strategy.expect``): one thing each, and
no combination of two choices.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..precision.base import Precision
from ..strategies.base import Strategy
from .arguments import FitArguments
from .fields.compilation import NEEDED_FOR_UPDATE, UPDATE
from .module import TrainModule
from .optim.closure import check_closure, needs_closure
from .optim.lomo import check_update_in_backward
from .optim.optimizer_makers import PackageMaker
from .optim.optimizers import LOW_RANK, OPTIMIZERS, PAGED, SCHEDULE_FREE, UPDATING_IN_BACKWARD
from .optim.traced_step import check_traceable
from .turns import Turns, turns_of

FROM_PACKAGES = {name: make for name, make in OPTIMIZERS.items() if isinstance(make, PackageMaker)}
BITSANDBYTES = {make.class_name for make in FROM_PACKAGES.values() if make.distribution == "bitsandbytes"}
LOW_RANK_CLASSES = [FROM_PACKAGES[name].class_name for name in LOW_RANK]

# Optimizer class and Strategy.parameter_form to why not, and what to write instead.
UNSUITED: Mapping[tuple[str, str], str] = {
    ("Adafactor", "dtensor"): "torch's Adafactor can't step on DTensor shards; use optim='adamw', or strategy='ddp'",
    ("Adafactor", "flat"): "Adafactor sums over the rows and columns of whole weights, which flat shards don't have; "
    "use optim='adamw', or strategy='ddp'",
    ("Muon", "flat"): "Muon orthogonalizes whole matrices, and flat shards hold pieces of them; use strategy='fsdp2', "
    "or optim='adamw'",
    **dict.fromkeys(
        [(name, "dtensor") for name in BITSANDBYTES],
        "bitsandbytes can't step on DTensor shards; use optim='adamw', or strategy='ddp'",
    ),
    **dict.fromkeys(
        [(name, "flat") for name in BITSANDBYTES],
        "its moments, and the scales of 8-bit ones, belong to whole weights, and flat shards hold pieces of them; use "
        "optim='adamw', or strategy='ddp'",
    ),
    ("StableAdamW", "flat"): "StableAdamW bounds each update by its root mean square over whole weights, which flat "
    "shards don't have; use strategy='fsdp2', or optim='adamw'",
    **dict.fromkeys(
        [("GrokAdamW", form) for form in ("flat", "dtensor")],
        "GrokAdamW decays by a parameter's place in its group, and strategies that shard cut the groups; use "
        "optim='adamw', or strategy='ddp'",
    ),
    **dict.fromkeys(
        [(name, form) for name in LOW_RANK_CLASSES for form in ("flat", "dtensor")],
        "it projects whole gradients, and shards hold pieces of them; use optim='adamw', or strategy='ddp'",
    ),
    ("Rprop", "dtensor"): "torch's Rprop can't step on DTensor shards; use another optimizer, or strategy='ddp'",
    ("Adafactor", "lazy"): "torch's Adafactor reads numbers from the device while it steps; use optim='adamw'",
    **dict.fromkeys([(name, "lazy") for name in BITSANDBYTES], "bitsandbytes has no XLA kernels; use optim='adamw'"),
    **dict.fromkeys(
        [(name, "lazy") for name in (*LOW_RANK_CLASSES, "GrokAdamW", "StableAdamW")],
        "it reads numbers from the device while it steps; use optim='adamw'",
    ),
    **dict.fromkeys(
        [(f"fused {optimizer}", "lazy") for optimizer in ("Adagrad", "Adam", "AdamW", "SGD")],
        "torch has no fused kernels for XLA, which fuses by itself; leave fused=True out",
    ),
    ("fused SGD", "dtensor"): "torch's SGD can't step fused on DTensor shards; leave fused=True out",
    ("fused Adagrad", "dtensor"): "torch's Adagrad can't step fused on DTensor shards; leave fused=True out",
}
MOVING_OUTSIDE_STEP = (*UPDATING_IN_BACKWARD, *SCHEDULE_FREE)
CLASSES = {  # of optim, see UNSUITED
    **{name: make.class_name for name, make in FROM_PACKAGES.items()},
    "adam": "Adam",
    "adamw": "AdamW",
    "adafactor": "Adafactor",
    "adagrad": "Adagrad",
    "muon": "Muon",
    "sgd": "SGD",
}


def nothing_to_compare(strategy: Strategy) -> str:
    """Why ``debug="ranks_agree"`` can't compare ranks under a strategy; "" where it can."""
    if strategy.needs_ranks and strategy.replicas_agree:
        return ""
    why = "lets them differ for some updates" if strategy.needs_ranks else "has one process"
    return f"compares ranks, and strategy={strategy.name!r} {why}. Leave it out"


def check_combination(
    args: FitArguments,
    strategy: Strategy,
    module: TrainModule,
    eval_data: Any,
    compute_loss_func: Callable[..., Any] | None,
    precision: Precision | None = None,
) -> None:
    """Refuse arguments that can't work with what else Fit was given, all of them in one error.

    Args:
        args, strategy, module, eval_data, compute_loss_func: as Fit was given them; the strategy may not be set up yet.
        precision: None leaves out what a precision refuses.

    Raises:
        ValueError: a line for each, with what to write instead.
    """
    found: list[str] = []

    def refuse(name: str, applies: bool, why: str, where: str = "") -> None:
        if applies:
            found.append(f"{name}={getattr(args, name)!r}{where}: {why}")

    nothing = "needs something to evaluate on, but eval_data is None. Pass eval_data=, or leave the argument out"
    has_none = eval_data is None and args.overfit_batches is None
    refuse("eval_strategy", args.eval_strategy != "no" and has_none, nothing)
    refuse("eval_on_start", args.eval_on_start and has_none, nothing)
    refuse(
        "debug",
        args.debug == "underflow_overflow" and strategy.runs_copies,
        f"watches the layers of one module, and strategy={strategy.name!r} runs copies of it. Use strategy='ddp', or "
        "'single'",
    )
    alone = nothing_to_compare(strategy)
    refuse("debug", args.debug == "ranks_agree" and bool(alone), alone)
    refuse(
        "label_smoothing_factor",
        args.label_smoothing_factor > 0 and compute_loss_func is not None,
        "has no effect with compute_loss_func, which is the whole loss. Smooth in there, or leave one of them out",
    )
    refuse(
        "label_smoothing_factor",
        args.label_smoothing_factor > 0 and strategy.splits_classes,
        "sums over all classes, and loss_parallel=True keeps the logits cut by class. Leave one of them out",
    )
    uncut = no_pieces(strategy)
    refuse("contrastive_chunks", args.contrastive_chunks is not None and bool(uncut), uncut)
    in_one = args.torch_compile == UPDATE
    refuse(
        "torch_compile",
        in_one and torch.__version__ < NEEDED_FOR_UPDATE,
        f"needs torch {NEEDED_FOR_UPDATE}, and this is torch {torch.__version__}. Write torch_compile=True",
    )
    refuse(
        "torch_compile",
        in_one and not strategy.takes_program,
        f"makes an update one program on one device, and strategy={strategy.name!r} does more in it than that. Use "
        "strategy='single', or torch_compile=True",
    )
    refuse(
        "torch_compile",
        in_one and precision is not None and not precision.takes_program,
        f"makes an update one program, and precision={getattr(precision, 'name', '')!r} takes part in backward or "
        "step. Use precision='bf16-mixed' or '32-true', or torch_compile=True",
    )
    for argument, reason in strategy.refused_arguments.items():
        refuse(argument, bool(getattr(args, argument)), reason)
    if precision is not None:
        refuse(
            "nonfinite_updates",
            args.nonfinite_updates == "raise" and precision.scales_loss,
            f"would end the run at the overflows by which precision={precision.name!r} finds its loss scale. Leave it "
            "out: max_skipped_updates, and a scale below 1, end the run; or use precision='bf16-mixed'",
        )
        for argument, reason in precision.refused_arguments.items():
            refuse(argument, bool(getattr(args, argument)), reason, f" in precision={precision.name!r}")
    taken = inspect.signature(module.forward).parameters
    refuse(
        "past_index",
        args.past_index >= 0 and "mems" not in taken and all(p.kind is not p.VAR_KEYWORD for p in taken.values()),
        f"hands an output on as 'mems', which {type(module).__name__}.forward doesn't take. Write forward(..., "
        "mems=None)",
    )
    turns = turns_of(module)
    if turns is not None:
        found += turn_problems(turns, args, strategy, module, compute_loss_func, precision)
    for each in (turn.arguments(args) for turn in turns) if turns is not None else (args,):
        if type(module).configure_optimizer is TrainModule.configure_optimizer:
            why = unsuited(CLASSES.get(each.optim, ""), bool(each.optim_args.get("fused")), strategy)
            if why is not None:
                found.append(f"optim={each.optim!r}: doesn't work under strategy={strategy.name!r}: {why}")
    if found:
        raise ValueError("These arguments can't work together:\n  " + "\n  ".join(found))


def no_pieces(strategy: Strategy) -> str:
    """Say why a strategy's options leave no micro-batch in pieces, and what to write instead; "" where they do."""
    if strategy.splits_classes:
        return (
            "joins forward's outputs along the samples, and loss_parallel=True keeps them cut by class. Leave one of "
            "them out"
        )
    if strategy.learns_first_graph:
        return (
            "has a loss's own parameters take part in the last piece's backward alone, and static_graph=True needs all "
            "backwards to be alike. Leave one of them out"
        )
    return ""


def turn_problems(
    turns: Turns,
    args: FitArguments,
    strategy: Strategy,
    module: TrainModule,
    compute_loss_func: Callable[..., Any] | None,
    precision: Precision | None,
) -> list[str]:
    """What can't be with a module that is trained in turns: a line for each, with what to write instead."""
    name, kind = turns.listed_by, type(module)
    evaluates = args.eval_strategy != "no" or args.eval_on_start
    has_forward = kind.forward is not nn.Module.forward
    rules = (
        (bool(strategy.refused_turns), f"strategy={strategy.name!r}", strategy.refused_turns),
        (
            precision is not None and bool(precision.refused_turns),
            f"precision={getattr(precision, 'name', '')!r}",
            getattr(precision, "refused_turns", ""),
        ),
        (
            args.torch_compile == UPDATE,
            f"torch_compile={UPDATE!r}",
            "makes an update one program of one loss and one optimizer. Write torch_compile=True, or leave it out",
        ),
        (
            compute_loss_func is not None,
            "compute_loss_func",
            "is one loss of forward's outputs, and each turn has a loss of its own. Write it as that turn's method",
        ),
        (
            args.label_smoothing_factor > 0,
            f"label_smoothing_factor={args.label_smoothing_factor!r}",
            "replaces the module's one loss. Smooth in the loss of the turn",
        ),
        (
            args.past_index >= 0,
            f"past_index={args.past_index!r}",
            "hands an output of forward on to the next batch, and a turn's loss calls the layers itself. Leave it out",
        ),
        (
            args.contrastive_chunks is not None,
            f"contrastive_chunks={args.contrastive_chunks!r}",
            "cuts what forward is given, and a turn's loss calls the layers itself. Leave it out",
        ),
        (
            evaluates and not has_forward,
            f"eval_strategy={args.eval_strategy!r}",
            f"evaluates by forward and loss, and {kind.__name__} defines no forward. Write both, or leave it out",
        ),
    )
    found = [f"{words} with {name}: {why}" for applies, words, why in rules if applies]
    for turn in turns:
        optim = turn.arguments(args).optim
        if optim in UPDATING_IN_BACKWARD:
            found.append(
                f"optim={optim!r} in turn {turn.name!r}: it updates parameters in backward, whichever turn's backward "
                "that is. Use optim='adamw'"
            )
    return found


def check_turn_optimizer(turn: str, optimizer: Optimizer, strategy: Strategy, args: FitArguments) -> None:
    """Refuse an optimizer that can't be a turn's; see ``check_optimizer``.

    Args:
        turn: the turn's name.
        args: as the turn has them.

    Raises:
        ValueError: says why, and what works.
    """
    check_optimizer(optimizer, strategy, args)
    name = type(optimizer).__name__
    if getattr(optimizer, "updates_in_backward", False):
        why = "updates parameters in backward, whichever turn's backward that is"
    elif needs_closure(optimizer):
        why = "evaluates the loss several times in a step, and a turn's step is made once its loss is gone"
    else:
        return
    raise ValueError(f"Turn {turn!r}: {name} {why}. Use AdamW, or another that steps once by given gradients.")


def check_optimizer_by_name(args: FitArguments, strategy: Strategy, turns: Turns | None = None) -> None:
    """Refuse what ``check_optimizer`` would, before anything is placed.

    Args:
        args: of the run, whose ``optim`` is the optimizer.
        strategy: set up, with the precision it runs in.
        turns: of the module, each with an ``optim``; None where it has none.
    """
    if turns is not None:
        for turn in turns:
            check_optimizer_by_name(turn.arguments(args), strategy)
        return
    if args.optim in PAGED and strategy.device.type != "cuda":
        raise ValueError(
            f"optim={args.optim!r} moves its state between a GPU's memory and the host's, and this run is on "
            f"{strategy.device.type!r}. Write optim={PAGED[args.optim]!r}."
        )
    if args.optim in MOVING_OUTSIDE_STEP:
        check_moves_in_step_alone(f"optim={args.optim!r}", strategy)
    if args.optim in UPDATING_IN_BACKWARD:
        check_update_in_backward(f"optim={args.optim!r}", strategy, args)


def check_optimizer(optimizer: Optimizer, strategy: Strategy, args: FitArguments) -> Optimizer:
    """Refuse an optimizer that can't work on the parameters as a strategy cuts them, or on gradients as the run makes
    them; a module may bring its own.

    Raises:
        ValueError: says why, and what works.
    """
    problem = strategy.optimizer_problem(optimizer)
    if problem is not None:
        raise ValueError(f"{type(optimizer).__name__} doesn't work under strategy={strategy.name!r}: {problem}.")
    for part in getattr(optimizer, "parts", [optimizer]):
        name = type(part).__name__
        why = unsuited(name, any(group.get("fused") for group in part.param_groups), strategy)
        if why is not None:
            raise ValueError(f"{name} doesn't work under strategy={strategy.name!r}: {why}.")
        if getattr(part, "updates_in_backward", False):
            check_update_in_backward(name, strategy, args)
        if hasattr(part, "train"):
            check_moves_in_step_alone(name, strategy)
        check_closure(part, strategy, args)
    if args.torch_compile == UPDATE:
        check_traceable(optimizer)
    return optimizer


def check_moves_in_step_alone(optimizer: str, strategy: Strategy) -> None:
    """Refuse an optimizer that moves parameters outside of ``step()`` where that moves their float32 masters instead.

    Raises:
        ValueError: says why, and what works.
    """
    if strategy.precision.master_weights:
        raise ValueError(
            f"{optimizer} moves parameters outside of step(), and precision={strategy.precision.name!r} steps on "
            "float32 master weights, which would not follow. Use optim='adamw', or precision='bf16-mixed'."
        )


def unsuited(optimizer: str, fused: bool, strategy: Strategy) -> str | None:
    """Why an optimizer of that class can't work under a strategy, and what works; None where it can."""
    form = strategy.parameter_form
    return UNSUITED.get((optimizer, form)) or (UNSUITED.get((f"fused {optimizer}", form)) if fused else None)
