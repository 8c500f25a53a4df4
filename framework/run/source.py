"""Where a Fit's module comes from: the user gave it, or a ``module_init`` that makes fresh ones."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import random_state
from ..module import TrainModule

ModuleInit = Callable[[Any], TrainModule]


class Source:
    """Hands out the module of the next run: the same one again, as it was given, or a fresh one.

    Args:
        module: the user's; None where ``module_init`` makes it.
        module_init: a function of an Optuna trial, or of None, to a fresh module.
        seed: of the initial values of the first module that ``module_init`` makes.

    Raises:
        TypeError: neither or both are given, or what is given is no TrainModule.
    """

    def __init__(self, module: Any, module_init: ModuleInit | None, seed: int) -> None:
        self.module_init = module_init
        self._module: TrainModule | None = given_module(module, module_init, seed)
        self._copy: ModuleCopy | None = None

    @property
    def module(self) -> TrainModule:
        """The module that is trained, placed or not."""
        assert self._module is not None, "the last run's module is gone, and the next one wasn't made yet"
        return self._module

    @property
    def can_begin_again(self) -> bool:
        """Whether a module that was placed can be had once more as it was before."""
        return self.module_init is not None or self._copy is not None

    def keep_copy(self) -> None:
        """Copy the module, which isn't placed yet, unless it was copied already.

        Raises:
            TypeError: the module can't be copied.
        """
        if self._copy is None:
            self._copy = ModuleCopy(self.module)

    def drop_copy(self) -> None:
        """Let go of the copy: the module is trained on from here."""
        self._copy = None

    def give_back(self) -> None:
        """Make the module what it was before it was placed, where there is a copy of it. Without one, a module of
        ``module_init`` is let go of: its sharded layers hold on to the process group.
        """
        if self._copy is not None:
            self._copy.give_back(self.module)
        elif self.module_init is not None:
            self._module = None

    def take(self, module: TrainModule) -> None:
        """Have another module, which isn't placed yet, be the one that is trained."""
        self._module, self._copy = module, None

    def make(self, trial: Any, seed: int) -> TrainModule:
        """Make a fresh module by ``module_init``; the module of the next run is another matter, see ``take``."""
        assert self.module_init is not None
        return make_module(self.module_init, trial, seed)


class ModuleCopy:
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
