"""Placement: the module where it runs, its optimizer, and how both were when they were made."""

import sys
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ...strategies.base import Strategy
from ...strategies.joined_optimizer import JoinedOptimizer
from .. import random_state
from ..arguments import FitArguments
from ..combinations import check_optimizer, check_turn_optimizer
from ..measures.parameters import Layer, ParameterCounts, counts_of, layers_of
from ..module import TrainModule
from ..optim.closure import Closure, needs_closure
from ..optim.mode import OptimizerMode
from ..printing import say
from ..switches.preparation import prepare_module
from ..turns import Turns, left_out, listed
from .configured import configured_optimizer, configured_optimizers
from .description import describe_run

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


class Placement:
    """A module that was given to a strategy, which prepares it and makes its optimizer on the way.

    A placement is made whole and dropped whole: a module that is placed once more has another one.

    Args:
        strategy: set up; it holds the placed model and the optimizer.
        module: not placed yet.
        args: of the run, whose length is settled.
        trains: whether there is something to train on; without, no optimizer is made.
        turns: of the module; None where it has one optimizer.

    Attributes:
        layers: of the whole module, with the numbers of their parameters, before any of it was cut or wrapped.
        mode: tells the optimizer whether training or evaluation comes.
        closure: hands an optimizer that evaluates the loss several times in a step what it needs; None for others.
    """

    def __init__(
        self, strategy: Strategy, module: TrainModule, args: FitArguments, trains: bool, turns: Turns | None = None
    ) -> None:
        self.strategy, self.module, self.trains, self.turns = strategy, module, trains, turns
        self.moved: dict[str, list[str]] = {}  # turn to the names of the parameters that it moves
        self.layers: tuple[Layer, ...] = ()
        self._first_state: dict[Any, dict[str, Any]] = {}  # of an optimizer that has one from the start, as Adagrad
        self._fingerprints: dict[str, Any] = {}

        def prepare(whole: nn.Module) -> None:  # called when all layers are there
            self.layers = layers_of(whole)
            if turns is not None:
                self.moved = turns.moved(whole)
                freeze_left_out(whole, self.moved, warns=trains and strategy.is_main)
            prepare_module(module, args, strategy)

        def configure_optimizer(whole: nn.Module) -> Optimizer:  # called when the parameters are final
            optimizer = self._make_optimizer(args)
            self._first_state = copied(optimizer.state)
            return optimizer

        if trains:
            strategy.expect(describe_run(module, args))
        random_state.seed_everything(args.seed)  # late layers draw the same initial values on every rank
        strategy.place(module, configure_optimizer if trains else None, prepare)
        if trains and turns is not None:
            strategy.place_turns(self.moved)
        if module.weights_note and strategy.is_main:
            say(module.weights_note, sys.stderr)
        self.mode = OptimizerMode(strategy.optimizer, strategy.weights_have_changed)
        self.closure: Closure | None = None
        if trains:
            if needs_closure(self.optimizer):
                self.closure = Closure(self.optimizer)
            self._first_options = options_by_parameter(self.optimizer, strategy)
            self._first_scaling = strategy.precision.state_dict()

    def _make_optimizer(self, args: FitArguments) -> Optimizer:
        """Have the module make its optimizer, or those of its turns, and check it."""
        module, strategy = self.module, self.strategy
        if self.turns is None:
            return check_optimizer(configured_optimizer(module, args), strategy, args)
        made = configured_optimizers(module, args, self.turns, self.moved)
        for turn in self.turns:
            check_turn_optimizer(turn.name, made[turn.name], strategy, turn.arguments(args))
        return JoinedOptimizer(made)

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """The optimizer of each turn; that of a module without turns by the name ""."""
        optimizer = self.optimizer
        return optimizer.optimizers if isinstance(optimizer, JoinedOptimizer) else {"": optimizer}

    @property
    def optimizer(self) -> Optimizer:
        """The strategy's optimizer."""
        assert self.strategy.optimizer is not None, "the optimizer is made when training begins"
        return self.strategy.optimizer

    @property
    def parameters(self) -> ParameterCounts:
        """The numbers of the module's parameters, whatever part of them this rank holds."""
        return counts_of(self.layers)

    def reset_optimizer(self) -> None:
        """Make the optimizer what it was when it was made: no moments, no gradients, its first learning rates and loss
        scale. A second ``train`` begins here too.
        """
        self.mode.eval()
        optimizer = self.optimizer
        optimizer.state.clear()
        optimizer.state.update(copied(self._first_state))
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            if group["params"]:
                group.update(self._first_options[id(group["params"][0])])
            group.pop("initial_lr", None)  # the last run's schedule left it
        self.reset_scaling()

    def reset_scaling(self) -> None:
        """Make the loss scale what it was when the optimizer was made."""
        if self.trains:
            self.strategy.precision.load_state_dict(self._first_scaling)

    def take_options(self, args: FitArguments) -> None:
        """Have the next reset set the options that an optimizer of these arguments would have."""
        made: Any = self.module.configure_optimizer(args) if self.turns is None else self._make_optimizer(args)
        self._first_options = options_by_parameter(made, self.strategy)

    def fingerprints(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The fingerprints of frozen tensors, by name: read once, as what is frozen doesn't change. Collective."""
        if self._fingerprints.keys() != tensors.keys():
            from ..checkpoint.frozen import fingerprints

            self._fingerprints = fingerprints(self.strategy, tensors)
        return self._fingerprints


def freeze_left_out(module: nn.Module, moved: Mapping[str, list[str]], warns: bool) -> None:
    """Freeze what no turn moves: it gets no gradient, no reduction and no memory for either.

    Args:
        module: with all of its layers.
        moved: turn to the names of the parameters that it moves.
        warns: say so, with the names.
    """
    names = left_out(module, moved)
    if names and warns:
        warnings.warn(
            f"{type(module).__name__}.turns(): no turn moves {listed(names)}, so they aren't trained. Name them in a "
            "turn's moves=, or freeze them (requires_grad_(False)) and this is silent.",
            stacklevel=2,
        )
    for name in names:
        module.get_parameter(name).requires_grad_(False)


def copied(state: Mapping[Any, Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
    """An optimizer's state with tensors of its own."""
    return {
        parameter: {key: value.clone() if isinstance(value, Tensor) else value for key, value in entries.items()}
        for parameter, entries in state.items()
    }


def options_by_parameter(optimizer: Optimizer, strategy: Strategy) -> dict[int, dict[str, Any]]:
    """The options of each parameter's group, by the id of what the strategy's optimizer steps for that parameter: a
    precision may have put a copy in its place, and a strategy may have cut the groups further.

    Args:
        optimizer: the strategy's, or another over the same module.
        strategy: where the module was placed.
    """
    parameters = strategy.named_parameters()
    stepped = {id(parameters[name]): id(copy) for name, copy in strategy.stepped_parameters().items()}
    return {
        stepped.get(id(parameter), id(parameter)): {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
