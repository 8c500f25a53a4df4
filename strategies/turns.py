"""Turns: parts of a module that are trained one after another, each by a loss and an optimizer of its own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from .joined_optimizer import JoinedOptimizer
from .placed import PlacedModule


class TurnTaking(PlacedModule):
    """The part of a strategy that trains a module in turns: a critic and a generator, an actor and a critic.

    A turn moves some of the parameters, and the others stand still: no gradient is computed, reduced or held for them,
    though gradients flow through the layers that they belong to.

    Attributes:
        moved: turn to the parameters that it moves; empty where a module isn't trained in turns.
        placed_parameters: all there are, trained or frozen.
        turn_now: the name of the turn that is made; None outside of all turns.
    """

    name: ClassVar[str]
    refused_turns: ClassVar[str] = ""
    """Why a module can't be trained in turns here, and what to use instead; "" where it can."""
    moved: Mapping[str, Sequence[nn.Parameter]] = {}
    placed_parameters: Sequence[nn.Parameter] = ()
    turn_now: str | None = None

    def place_turns(self, moved: Mapping[str, Sequence[str]]) -> None:
        """Take note of the turns. Called once, after ``place``, where the optimizer is a JoinedOptimizer.

        Args:
            moved: turn to the names of the parameters that it moves. Frozen ones among them stay frozen.

        Raises:
            ValueError: modules can't be trained in turns here; says why, and what to use.
        """
        for what, why in (
            (f"strategy={self.name!r}", self.refused_turns),
            (f"precision={self.precision.name!r}", self.precision.refused_turns),
        ):
            if why:
                raise ValueError(f"{what} can't train a module in turns: {why}.")
        named = self.named_parameters(remove_duplicate=False)
        self.placed_parameters = list(dict.fromkeys(named.values()))
        self.moved = {turn: list(dict.fromkeys(named[name] for name in names)) for turn, names in moved.items()}
        for turn in (*moved, None):  # what a format keeps of each turn is there from the start, and saved
            self.precision.begin_turn(turn)

    def parameters_in_turn(self, turn: str) -> list[nn.Parameter]:
        """The parameters that a turn moves, but for frozen ones: for clipping, and for dropping their gradients."""
        return [parameter for parameter in self.moved[turn] if parameter.requires_grad]

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """In here one turn is made, from its first forward to its step: its parameters alone require gradients,
        ``model`` is what its loss goes through, and gradients are unscaled, judged and stepped by its own optimizer and
        loss scale.
        """
        assert self.turn_now is None, f"the turn {name!r} begins within the turn {self.turn_now!r}"
        moving = set(self.moved[name])
        still = [p for p in self.placed_parameters if p.requires_grad and p not in moving]
        self.turn_now = name
        self.precision.begin_turn(name)
        self.set_moving(still, False)
        try:
            yield
        finally:
            self.set_moving(still, True)
            self.precision.begin_turn(None)
            self.turn_now = None

    def set_moving(self, parameters: Sequence[nn.Parameter], moving: bool) -> None:
        """Have parameters require gradients, or stand still."""
        for parameter in parameters:
            parameter.requires_grad = moving

    @property
    def optimizer_in_turn(self) -> Optimizer:
        """The optimizer that the next step is made by: that of the turn, and outside of turns all there is."""
        optimizer = self.optimizer
        assert optimizer is not None
        if self.turn_now is None:
            return optimizer
        assert isinstance(optimizer, JoinedOptimizer)
        return optimizer.of(self.turn_now)

    def forget_module(self) -> None:
        """Let go of the module, and of its turns."""
        super().forget_module()
        self.moved, self.placed_parameters = {}, ()
