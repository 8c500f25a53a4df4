"""A Fit begun afresh: taken apart after a run, its module new or as it was, what follows from arguments made anew."""

import contextlib
import copy
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import beginning, random_state
from .agreement import UpdateExchange
from .arguments import FitArguments
from .callbacks import Callbacks
from .combinations import check_combination, check_optimizer_by_name
from .in_step import InStep
from .module import TrainModule
from .objective import Objective
from .preparation import callbacks_of
from .progress import Progress
from .ranks_agree import RanksAgree
from .state import Control
from .tokens import TokenCounter

if TYPE_CHECKING:
    from .fit import Fit

ModuleInit = Callable[[Any], TrainModule]

MADE_IN_PLACING = (
    "optim",
    "optim_target_modules",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "torch_compile",
    "torch_compile_mode",
    "torch_compile_backend",
)
"""Arguments that a placed module, or its optimizer, is made with: a later run can't change them."""


class Unplaced:
    """A module as it was before it was placed, on the host: strategies change its parameters, hooks and classes.

    Args:
        module: not placed yet.

    Raises:
        TypeError: it can't be copied.
    """

    def __init__(self, module: nn.Module) -> None:
        if any(not (p.is_meta or p.device.type == "cpu") for p in (*module.parameters(), *module.buffers())):
            module._apply(lambda tensor: tensor if tensor.is_meta else tensor.cpu())
        try:
            self.copy = copy.deepcopy(module)
        except (TypeError, RuntimeError) as error:
            raise TypeError(
                "auto_find_batch_size, like a search without module_init, keeps a copy of the module to begin again "
                f"from, and {type(module).__name__} can't be copied: {error}. Keep what can't (tensors with a "
                "gradient, locks, files) out of its attributes, or leave auto_find_batch_size out, or give the search "
                "Fit(module_init=...)."
            ) from error
        self.layers = list(module.modules())

    def give_back(self, module: nn.Module) -> None:
        """Make the module, and each layer that it had, what it was."""
        assert self.layers[0] is module
        copies = list(self.copy.modules())
        # Whatever refers to a layer of the copy is to refer to the user's.
        seen: dict[int, Any] = {id(copied): layer for copied, layer in zip(copies, self.layers, strict=True)}
        for copied, layer in zip(copies, self.layers, strict=True):
            layer.__class__ = copied.__class__
            layer.__dict__ = copy.deepcopy(copied.__dict__, seen)


def take_apart(fit: "Fit") -> None:
    """Undo what a run made, and what placing did: no memory, connection or thread of it is left on this rank. The
    module is what it was where the Fit keeps it ``unplaced``; one of ``module_init`` is gone, and another must come.
    """
    if "module" not in fit.__dict__:  # it was taken apart already
        return
    if fit.writer is not None:
        with contextlib.suppress(Exception):  # of a run that failed; the others may have left it half done
            fit.writer.finish()
        fit.writer.abandon()
        fit.writer = None
    # A worker process that loads data would keep this rank's connections open, as it has inherited them.
    for name in ("scheduler", "stream", "optimizer_mode"):
        fit.__dict__.pop(name, None)
    fit.grad_norm = None
    if "objective" in fit.__dict__:
        fit.objective.past = None
    fit.strategy.release(fit.module)
    if fit.unplaced is not None:  # else there was no memory even for the copy, and nothing was placed
        fit.unplaced.give_back(fit.module)
    fit.placed = False
    if fit.module_init is not None:  # sharded layers hold on to the process group
        for name in ("module", "objective", "count_tokens"):
            fit.__dict__.pop(name, None)
    if fit.args.torch_compile:
        torch.compiler.reset()
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()


def equip(fit: "Fit") -> None:
    """Make what follows from the module and the arguments: how a loss is found, and what is counted.

    Raises:
        ValueError: the strategy can't place such a module.
    """
    args = fit.args
    if not fit.placed and type(fit.module).build is TrainModule.build:  # else its layers are still to come
        fit.strategy.check_module(fit.module)
    fit.objective = Objective(fit.module, fit.compute_loss_func, args.label_smoothing_factor, args.past_index)
    fit.count_tokens = TokenCounter(fit.module, args, warns=fit.strategy.is_main)


def listen(fit: "Fit") -> None:
    """Gather the callbacks: those that arguments stand for, those given, what shows progress, what compares ranks."""
    shown = [Progress()] if fit.args.progress and fit.strategy.is_main else []
    compared = [RanksAgree(fit.args.debug == "ranks_agree")] if fit.strategy.world_size > 1 else []
    fit.callbacks = Callbacks([*callbacks_of(fit.args), *fit.given_callbacks], last=[*shown, *compared])


def check(fit: "Fit", args: FitArguments, module: TrainModule) -> None:
    """Refuse arguments that can't work with the module, the data or the strategy.

    Raises:
        ValueError: says why, and what to write instead.
    """
    check_combination(args, fit.strategy, module, fit.eval_data, fit.compute_loss_func)
    check_optimizer_by_name(args, fit.strategy)
    if args.auto_find_batch_size and not fit.requested.auto_find_batch_size:
        raise ValueError("auto_find_batch_size can't be switched on by a trial. Write Fit(auto_find_batch_size=True).")


def begin_afresh(fit: "Fit", args: FitArguments, module: TrainModule | None = None) -> None:
    """Give a Fit that was taken apart other arguments, and a fresh module where it has a ``module_init``.

    Raises:
        ValueError: the arguments can't work with the module, the data or the strategy.
    """
    if module is not None:
        fit.module = module
    fit.frozen = {}
    fit._loss_was_checked = False
    fit.control = Control()
    fit.exchange = UpdateExchange(fit.strategy, fit.control, InStep(fit.strategy, "train_data"))
    change_arguments(fit, args)


def change_arguments(fit: "Fit", args: FitArguments) -> None:
    """Let the next run have other arguments than the last.

    Raises:
        ValueError: they can't work with the module, the data or the strategy, or come too late.
    """
    check(fit, args, fit.module)
    late = [name for name in MADE_IN_PLACING if getattr(args, name) != getattr(fit.running, name)]
    if fit.placed and late:
        raise ValueError(
            f"{', '.join(late)}: the module was placed, and its optimizer made, by an earlier run of this Fit with "
            "another choice. Write Fit(module_init=...), which makes a fresh module for each trial, or another Fit."
        )
    fit.running = fit.args = args
    equip(fit)
    listen(fit)
    fit.stream = fit.train_stream()
    if fit.placed:
        fit.initial_options = beginning.options_by_parameter(fit.module.configure_optimizer(args), fit.strategy)


def make_module(module_init: ModuleInit, trial: Any, seed: int) -> TrainModule:
    """A fresh module, whose initial values follow from the seed, the same on every rank.

    Raises:
        TypeError: the factory returned something else.
    """
    random_state.seed_everything(seed)
    module = module_init(trial)
    if not isinstance(module, TrainModule):
        raise TypeError(
            f"module_init must return a stratagem.TrainModule. It returned: {module!r:.200}. Write "
            "module_init=lambda trial: MyModule(), or TrainModule.wrap(model) around a model."
        )
    check_initialized(module)
    return module


def given_module(module: Any, module_init: ModuleInit | None, seed: int) -> TrainModule:
    """The module that a Fit begins with: the one given, or the factory's for no trial.

    Raises:
        TypeError: neither or both are given, or what is given is no TrainModule.
    """
    if module_init is not None:
        if module is not None:
            raise TypeError("Fit was given a module and module_init, which makes one. Pass one of them.")
        if not callable(module_init):
            raise TypeError(
                f"module_init takes a function of a trial that returns a TrainModule. Received: {module_init!r:.200}"
            )
        return make_module(module_init, None, seed)
    if not isinstance(module, TrainModule):
        hint = "Write TrainModule.wrap(model)." if isinstance(module, nn.Module) else "Pass an instance, not a class."
        raise TypeError(f"Fit takes a stratagem.TrainModule. Received: {module!r:.200}. {hint}")
    check_initialized(module)
    return module


def check_initialized(module: nn.Module) -> None:
    """Refuse layers that wait for their first batch to know their shapes.

    Raises:
        ValueError: names their parameters and buffers, and what to do.
    """
    tensors = (*module.named_parameters(), *module.named_buffers())
    lazy = [name for name, tensor in tensors if torch.nn.parameter.is_lazy(tensor)]
    if lazy:
        raise ValueError(
            f"{type(module).__name__} has lazy layers, whose shapes aren't known yet: {', '.join(lazy)}. Call the "
            "module once on a batch, under torch.no_grad(), before Fit is given it."
        )
