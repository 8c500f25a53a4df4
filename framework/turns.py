"""Turn: a part of a module that is trained by a loss and an optimizer of its own, in turns with other parts."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .arguments import FitArguments
from .optim.schedulers import WITHOUT_WARMUP

NAMED = 10  # parameters that a message names


@dataclass(frozen=True)
class Turn:
    """What one of several optimizers moves, and by which loss; see ``TrainModule.turns``.

    Options that are None are the run's. Where the module's ``configure_optimizer`` or ``configure_scheduler`` makes
    optimizers or schedules itself, the options that would name them have no effect there.

    Args:
        name: of the turn: letters, digits and "_". Its numbers are logged under it ("loss_critic").
        loss: a method of the module: (batch on the device) to the mean over its items, 0-dim, or to a mapping that
            holds it as "loss". One that names ``num_items_in_batch`` is given it, as ``TrainModule.loss`` is.
        moves: patterns over the names of layers and parameters, or one: "critic", "blocks.*.adapter", "head.weight". A
            "*" stands for a part of a name between two dots. Frozen parameters stay frozen.
        every: the turn is made on each k-th batch of a round.
        optim, learning_rate, weight_decay, optim_args: of its optimizer, as FitArguments have them. With another
            ``optim`` than the run's, the run's ``optim_args`` don't count.
        lr_scheduler_type, lr_scheduler_kwargs, warmup_steps, warmup_ratio: of its schedule, which moves once a round.
        max_grad_norm: its gradients are scaled down to this 2-norm; 0 leaves them as they are.

    Raises:
        ValueError, TypeError: an argument can't work; names the turn.

    Example:
        >>> Turn("critic", loss=lambda batch: batch.mean(), moves="critic", optim="adam", learning_rate=1e-4).every
        1
    """

    name: str
    loss: Callable[..., Any]
    moves: str | Sequence[str]
    every: int = 1
    optim: str | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    optim_args: Mapping[str, Any] | None = None
    lr_scheduler_type: str | None = None
    lr_scheduler_kwargs: Mapping[str, Any] | None = None
    warmup_steps: float | None = None
    warmup_ratio: float | None = None
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9_]+", self.name):
            raise ValueError(f"A turn's name is made of letters, digits and '_'. Received: {self.name!r}")
        if not callable(self.loss):
            raise TypeError(
                f"Turn {self.name!r}: loss is a method of the module that takes a batch, without brackets: "
                f"loss=self.critic_loss. Received: {self.loss!r:.200}"
            )
        if type(self.every) is not int or self.every < 1:
            raise ValueError(
                f"Turn {self.name!r}: every={self.every!r} must be a whole number of at least 1: the turn is made on "
                "each such batch of a round."
            )
        if not self.patterns or not all(isinstance(pattern, str) and pattern for pattern in self.patterns):
            raise ValueError(
                f"Turn {self.name!r}: moves takes the name of a layer or parameter, a pattern ('blocks.*.adapter'), or "
                f"several. Received: {self.moves!r}"
            )

    @property
    def patterns(self) -> tuple[str, ...]:
        """What it moves, as a tuple of patterns."""
        return (self.moves,) if isinstance(self.moves, str) else tuple(self.moves)

    def arguments(self, args: FitArguments) -> FitArguments:
        """The arguments of the run as they are for this turn.

        Raises:
            ValueError: they can't work together; names the turn.
        """
        given = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}
        given = {name: dict(value) if isinstance(value, Mapping) else value for name, value in given.items()}
        if given.get("optim", args.optim) != args.optim:
            given.setdefault("optim_args", {})
        if given.get("lr_scheduler_type", args.lr_scheduler_type) != args.lr_scheduler_type:
            given.setdefault("lr_scheduler_kwargs", {})
            if given["lr_scheduler_type"] in WITHOUT_WARMUP:
                given = {"warmup_steps": 0, "warmup_ratio": 0.0, **given}
        for one, other in (("warmup_steps", "warmup_ratio"), ("warmup_ratio", "warmup_steps")):
            if one in given:
                given.setdefault(other, 0)
        try:
            return args.replace(**given)
        except (ValueError, TypeError) as error:
            raise (TypeError if isinstance(error, TypeError) else ValueError)(f"Turn {self.name!r}: {error}") from error


OPTIONS = tuple(field.name for field in fields(Turn) if field.name not in ("name", "loss", "moves", "every"))


class Turns:
    """The turns of a module, in the order in which they are made on a batch.

    Args:
        module: its ``turns`` listed them.
        turns: one or more.

    Attributes:
        batches: of a round: the least number after which all turns begin anew.
        made: the turns that are made in a round, each as often as it is.

    Raises:
        ValueError, TypeError: they can't be made in turns; the message has their names.
    """

    def __init__(self, module: nn.Module, turns: Sequence[Turn]) -> None:
        self.listed_by = f"{type(module).__name__}.turns()"
        if not all(isinstance(turn, Turn) for turn in turns):
            kinds = ", ".join(type(turn).__name__ for turn in turns)
            raise TypeError(f"{self.listed_by} lists stratagem.Turn objects. Received: {kinds}")
        names = [turn.name for turn in turns]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"{self.listed_by} lists more than one turn named {' and '.join(map(repr, twice))}. Logs and "
                "checkpoints tell them by their names: choose others."
            )
        if min(turn.every for turn in turns) > 1:
            counts = ", ".join(f"{turn.name!r} every={turn.every}" for turn in turns)
            raise ValueError(
                f"{self.listed_by} has no turn that is made on each batch ({counts}), so that batches would be read in "
                "vain. Write every=1 (the default) for the one that is made most often, and count the others by it."
            )
        self.turns = {turn.name: turn for turn in turns}
        self.batches = math.lcm(*(turn.every for turn in turns))
        self.made = sum(self.batches // turn.every for turn in turns)

    def __iter__(self) -> Iterator[Turn]:
        return iter(self.turns.values())

    def saved_with(self, steppings: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds of the turns: the batches of a round, and what ends each turn's updates."""
        return {"batches": self.batches, "steppings": steppings}

    def moved(self, module: nn.Module) -> dict[str, list[str]]:
        """The names of the trainable parameters that each turn moves.

        Args:
            module: with all of its layers.

        Raises:
            ValueError: a pattern matches nothing, a turn moves frozen parameters alone, or a parameter is in two turns.
        """
        named = dict(module.named_parameters(remove_duplicate=False))
        first = {id(parameter): name for name, parameter in module.named_parameters()}
        found: dict[str, list[str]] = {}
        owner: dict[str, str] = {}
        shared: list[str] = []
        for turn in self:
            names: dict[str, None] = {}
            for pattern in turn.patterns:
                matched = [name for name in named if matches(name, pattern)]
                if not matched:
                    children = ", ".join(name for name, _ in module.named_children())
                    raise ValueError(
                        f"{self.listed_by}: turn {turn.name!r} moves {pattern!r}, which matches no layer and no "
                        f"parameter with a name. At the top there are: {children or 'none'}."
                    )
                names |= dict.fromkeys(first[id(named[name])] for name in matched if named[name].requires_grad)
            if not names:
                raise ValueError(
                    f"{self.listed_by}: all that turn {turn.name!r} moves ({', '.join(turn.patterns)}) is frozen, so "
                    "that there is nothing to train."
                )
            for name in names:
                if owner.setdefault(name, turn.name) != turn.name:
                    shared.append(f"{name} ({owner[name]!r} and {turn.name!r})")
            found[turn.name] = list(names)
        if shared:
            raise ValueError(
                f"{self.listed_by}: a parameter is moved by one turn, and these are in two: {listed(shared)}. Name in "
                "moves= what each turn moves alone."
            )
        return found


def turns_of(module: nn.Module) -> Turns | None:
    """The turns that a module lists, checked; None where it lists none.

    Raises:
        ValueError, TypeError: see Turns.
    """
    found: Any = module.turns()  # type: ignore[operator]
    if isinstance(found, Turn):
        found = [found]
    if not isinstance(found, list | tuple):
        raise TypeError(f"{type(module).__name__}.turns() must return a list of Turns. It returned: {found!r:.200}")
    return Turns(module, found) if found else None


def left_out(module: nn.Module, moved: Mapping[str, Collection[str]]) -> list[str]:
    """The names of trainable parameters that no turn moves."""
    taken = {name for names in moved.values() for name in names}
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad and name not in taken]


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter has the name, or lies in a layer with the name, that a pattern stands for.

    Example:
        >>> [matches("blocks.0.adapter.weight", pattern) for pattern in ("blocks", "blocks.*.adapter", "adapter")]
        [True, True, False]
    """
    parts, wanted = name.split("."), pattern.split(".")
    return len(wanted) <= len(parts) and all(map(fnmatchcase, parts, wanted))


def listed(names: Sequence[str]) -> str:
    """Some names for a message, and how many more there are."""
    return f"{', '.join(names[:NAMED])}{f' and {len(names) - NAMED} more' if len(names) > NAMED else ''}"
