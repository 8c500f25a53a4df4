"""The means of what modules log (``TrainModule.log``), kept on the device between logs, under names of all ranks."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ...strategies.base import Strategy
from ..logged import Noted

Call = tuple[int, float | Tensor, float | Tensor]  # the update's place among those since the last settle, value, items


class LoggedMeans:
    """A mean for each name and update, over all items that it was logged of, over micro-batches and ranks.

    Each rank adds up values times items, and items, for the names of all ranks; a name that it hasn't logged is 0 of 0
    items there. Which names there are is told when one is new on a rank, and never again.

    Args:
        strategy: it reads numbers, and sums them over ranks.

    Attributes:
        noted: calls in the update under way.
    """

    FOLD = 1024  # calls under a name are summed up when there are so many

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.noted: list[Noted] = []
        self.updates = 0  # since the last settle
        self.calls: dict[str, list[Call]] = {}
        self.folded: dict[str, Tensor] = {}  # (2, updates): values times items, and items, of calls before those
        self.names: list[str] = []  # that all ranks know

    def note(self, noted: Iterable[Noted]) -> None:
        """Note calls of a micro-batch of the update under way."""
        self.noted.extend(noted)

    def forget_after(self, count: int) -> None:
        """Forget the calls in the update under way but for its first ones."""
        del self.noted[count:]

    def end_update(self) -> None:
        """Keep what was noted of the update under way."""
        for name, value, items in self.noted:
            calls = self.calls.setdefault(name, [])
            calls.append((self.updates, value, items))
            if len(calls) >= self.FOLD:
                self.folded[name] = self.sums(name, self.updates + 1)
                calls.clear()
        self.noted = []
        self.updates += 1

    def clear(self) -> None:
        """Forget all but the names that ranks know."""
        self.noted, self.updates, self.calls, self.folded = [], 0, {}, {}

    def new_names(self) -> list[str]:
        """The names that not all ranks know yet."""
        return sorted(self.calls.keys() - set(self.names))

    def learn(self, names: Iterable[str]) -> None:
        """Take names that all ranks know from here on."""
        self.names = sorted({*self.names, *names})

    def names_of_ranks(self) -> list[str]:
        """Exchange the names that are new on some rank. Collective, over the ranks that values are summed over."""
        strategy, device = self.strategy, self.strategy.device
        told = "\0".join(self.new_names()).encode()
        lengths = torch.zeros(strategy.world_size, dtype=torch.float64, device=device)
        lengths[strategy.rank] = len(told)
        longest = int(max(strategy.read([lengths], summed=True)))
        texts = torch.zeros(strategy.world_size, longest, dtype=torch.float64, device=device)
        texts[strategy.rank, : len(told)] = torch.tensor(list(told), dtype=torch.float64)
        numbers = strategy.read([texts], summed=True)
        rows = (bytes(map(int, numbers[at : at + longest])) for at in range(0, len(numbers), longest))
        return sorted({name for row in rows for name in row.decode().split("\0") if name})

    def sums(self, name: str, updates: int) -> Tensor:
        """Sum what this rank logged of a name in each update.

        Returns:
            (2, updates) in float64, on the device: values times items, and items.
        """
        device = self.strategy.device
        found = torch.zeros(2, updates, dtype=torch.float64, device=device)
        if name in self.folded:
            before = self.folded[name]
            found[:, : before.shape[1]] = before
        calls = self.calls.get(name)
        if calls:
            places, values, items = zip(*calls, strict=True)
            weights = as_row(items, device)
            # The mean over no items may be NaN, and its share is nothing.
            weighed = torch.where(weights == 0, 0.0, as_row(values, device) * weights)
            found.index_add_(1, torch.tensor(places, device=device), torch.stack([weighed, weights]))
        return found

    def means(self, numbers: list[float]) -> list[float]:
        """Return the means of a name, of the updates in which it was logged, from the sums over ranks."""
        pairs = zip(numbers[: self.updates], numbers[self.updates :], strict=True)
        return [value / items for value, items in pairs if items]


def as_row(numbers: tuple[float | Tensor, ...], device: torch.device) -> Tensor:
    """Put numbers and 0-dim tensors into one row, in float64 on the device, in as few steps as there are kinds."""
    tensors = [number for number in numbers if isinstance(number, Tensor)]
    if len(tensors) == len(numbers):
        return stacked(tensors, device)
    row = torch.tensor([0.0 if isinstance(n, Tensor) else n for n in numbers], dtype=torch.float64).to(device)
    if tensors:
        places = [place for place, number in enumerate(numbers) if isinstance(number, Tensor)]
        row[torch.tensor(places, device=device)] = stacked(tensors, device)
    return row


def stacked(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Stack 0-dim tensors in float64."""
    return torch.stack([tensor.to(device=device, dtype=torch.float64) for tensor in tensors])
