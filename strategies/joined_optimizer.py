"""The optimizers of a module that is trained in turns, as the one optimizer that the rest of a run knows."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

State = MutableMapping[Tensor, dict[str, Any]]


class JoinedOptimizer(Optimizer):
    """Several optimizers by the names of their turns. Its groups are theirs in a row, the same dictionaries, and its
    state is theirs, so that schedules and checkpoints reach each of them as they reach one.

    A turn steps its own optimizer (``of``); ``step`` steps all of them.

    Args:
        optimizers: turn to optimizer, over different parameters.

    Attributes:
        optimizers: as they were given.
        parts: those that step: an optimizer made of several has them in its place.

    Raises:
        ValueError: there is none, or two of them hold the same parameter.

    Example:
        >>> critic, generator = torch.nn.Linear(2, 1), torch.nn.Linear(1, 2)
        >>> joined = JoinedOptimizer({
        ...     "critic": torch.optim.Adam(critic.parameters(), lr=1e-4),
        ...     "generator": torch.optim.SGD(generator.parameters(), lr=1e-2),
        ... })
        >>> [group["lr"] for group in joined.param_groups], type(joined.of("critic")).__name__
        ([0.0001, 0.01], 'Adam')
    """

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        if not optimizers:
            raise ValueError("JoinedOptimizer joins the optimizers of turns, by name. Received: none")
        self.optimizers = dict(optimizers)
        seen: dict[Tensor, str] = {}
        for turn, optimizer in self.optimizers.items():
            for parameter in parameters_of(optimizer):
                if seen.setdefault(parameter, turn) != turn:
                    raise ValueError(
                        f"The optimizers of the turns {seen[parameter]!r} and {turn!r} hold the same parameter, of "
                        f"shape {tuple(parameter.shape)}. Each parameter belongs to one optimizer."
                    )
        self.parts = [
            part for optimizer in self.optimizers.values() for part in getattr(optimizer, "parts", [optimizer])
        ]
        groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]
        super().__init__(groups, {})
        self.param_groups = groups
        self.state = JoinedState(self.optimizers)  # type: ignore[assignment]

    def of(self, turn: str) -> Optimizer:
        """The optimizer of a turn."""
        return self.optimizers[turn]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step each of the optimizers, in the order in which they were given."""
        assert closure is None, "a closure can't be shared among optimizers"
        for optimizer in self.optimizers.values():
            optimizer.step()

    def train(self) -> None:
        """Put those that tell training and evaluation apart (schedule-free ones) into training."""
        for optimizer in self.optimizers.values():
            if hasattr(optimizer, "train"):
                optimizer.train()

    def eval(self) -> None:
        """Put those that tell training and evaluation apart (schedule-free ones) into evaluation."""
        for optimizer in self.optimizers.values():
            if hasattr(optimizer, "eval"):
                optimizer.eval()


class JoinedState(State):
    """The state of several optimizers as one mapping; what is written goes to the optimizer that holds the parameter.

    Args:
        optimizers: by any name. Each is asked for its state anew, since some put another one in its place.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        self.optimizers = optimizers
        self.owners: dict[Tensor, Optimizer] = {}

    def owner_of(self, parameter: Tensor) -> Optimizer:
        """The optimizer with a parameter in its groups.

        Raises:
            KeyError: none has it.
        """
        if parameter not in self.owners:
            self.owners = {
                held: optimizer for optimizer in self.optimizers.values() for held in parameters_of(optimizer)
            }
        return self.owners[parameter]

    def __getitem__(self, parameter: Tensor) -> dict[str, Any]:
        for optimizer in self.optimizers.values():
            if parameter in optimizer.state:
                entries: dict[str, Any] = optimizer.state[parameter]
                return entries
        raise KeyError(parameter)

    def __setitem__(self, parameter: Tensor, entries: dict[str, Any]) -> None:
        self.owner_of(parameter).state[parameter] = entries

    def __delitem__(self, parameter: Tensor) -> None:
        for optimizer in self.optimizers.values():
            if parameter in optimizer.state:
                del optimizer.state[parameter]
                return
        raise KeyError(parameter)

    def __iter__(self) -> Iterator[Tensor]:
        for optimizer in self.optimizers.values():
            yield from optimizer.state

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self.optimizers.values())

    def clear(self) -> None:
        """Forget the state of all of them."""
        for optimizer in self.optimizers.values():
            optimizer.state.clear()


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """The parameters in an optimizer's groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
