"""Running values of the loss and what it returns beside, kept on the device between logs and read once at each log."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...strategies.base import Strategy
from ..logged import Noted
from .exact_sums import ExactSum
from .logged_means import LoggedMeans


class Averages:
    """A value for each update, by name ("loss" and what a mapping loss adds): the sum of this rank's weighted shares;
    and the means of what the module logs.

    Adding a value keeps a reference to a 0-dim tensor, without a kernel or a wait. ``settle`` stacks the values, sums
    them over ranks in one collective, and reads them in one transfer.

    Args:
        strategy: it reads the values, and sums them over ranks.
    """

    # So many references are stacked into one tensor, to bound memory in runs that log rarely.
    FOLD = 1024

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.shares: dict[str, Tensor] = {}  # values of the update under way, over its micro-batches so far
        self.pending: dict[str, list[Tensor]] = {}
        self.settled: dict[str, ExactSum] = {}
        self.items: int | Tensor = 0  # items on this rank since the last settle
        self.tokens = 0
        self.counts_settled = [0, 0]
        self.expected: int | Tensor | None = None  # items of the update under way, over all ranks, where that is known
        self.counted: int | Tensor | None = None  # else, the items of its micro-batches on this rank
        self.updates_pending = 0  # updates since the last settle
        self.uncertain: dict[str, list[tuple[int, Tensor]]] = {}  # (place of a pending value, its items)
        self.logged = LoggedMeans(strategy)
        self.in_round: dict[str, list[tuple[Tensor, int | Tensor | None]]] = {}  # turn to its losses, with their items

    def add(self, name: str, value: Tensor, items: Tensor | None = None) -> None:
        """Note a value of an update.

        Args:
            name: the name of the value.
            value: this rank's share, a 0-dim tensor.
            items: the items, over all ranks, that the value is a mean over, where the host doesn't know whether there
                are any.
        """
        values = self.pending.get(name)
        if values is None:
            values = self.pending[name] = []
        if items is not None:
            place = sum(value.numel() for value in values[:1]) + max(0, len(values) - 1)
            self.uncertain.setdefault(name, []).append((place, items))
        values.append(value)
        if len(values) >= self.FOLD:
            self.pending[name] = [torch.cat([value.reshape(-1) for value in values])]

    def add_share(self, name: str, share: Tensor) -> None:
        """Add a micro-batch's share to a value of the update under way."""
        so_far = self.shares.get(name)
        self.shares[name] = share if so_far is None else so_far + share

    def note(self, noted: list[Noted]) -> None:
        """Note what the module logged in a micro-batch of the update under way."""
        self.logged.note(noted)

    def expect(self, items: int | Tensor) -> None:
        """Note, before an update, how many items over all ranks it has. A tensor stays on the device."""
        self.expected = items

    def end_update(self, loss: Tensor) -> None:
        """Note the loss of the update under way, and the values of ``add_share`` and ``note``. An update without items
        has no loss.
        """
        self.logged.end_update()
        alone = self.strategy.world_size == 1
        items = self.counted if self.expected is None and alone else self.expected
        shares, self.shares = self.shares, {}
        self.expected = self.counted = None
        self.updates_pending += 1
        if isinstance(items, int) and items == 0:
            return
        uncertain = items if isinstance(items, Tensor) else None
        self.add("loss", loss, uncertain)
        for name, value in shares.items():
            self.add(name, value, uncertain)

    # An update in turns reads several batches, and makes several losses of one.

    def begin_batch(self) -> int | Tensor | None:
        """Forget the items of the last batch of a round, before the next one is read.

        Returns:
            Those items, for ``expect`` where there is no next one.
        """
        items = self.counted if self.expected is None else self.expected
        self.expected = self.counted = None
        return items

    def end_turn(self, turn: str, loss: Tensor) -> None:
        """Note the loss of a turn that was made on a batch, and the values of ``add_share``."""
        items = self.counted if self.expected is None else self.expected
        shares, self.shares = self.shares, {}
        self.in_round.setdefault(turn, []).append((loss, items))
        if isinstance(items, int) and items == 0:
            return
        uncertain = items if isinstance(items, Tensor) else None
        self.add(f"loss_{turn}", loss, uncertain)
        for name, value in shares.items():
            self.add(name, value, uncertain)

    def end_round(self) -> None:
        """Note the loss of the round under way: the sum of its turns', each the mean over the batches it was made on.
        A turn whose batches had no items has none.
        """
        self.logged.end_update()
        losses, self.in_round = self.in_round, {}
        self.expected = self.counted = None
        self.updates_pending += 1
        means, counts = [], []
        for made in losses.values():
            values = [loss for loss, items in made if not (isinstance(items, int) and items == 0)]
            if values:
                means.append(values[0] if len(values) == 1 else torch.stack(values).mean())
                counts += [items for _, items in made if isinstance(items, Tensor)]
        if means:
            total = means[0] if len(means) == 1 else torch.stack(means).sum()
            self.add("loss", total, torch.stack(counts).sum() if counts else None)

    def count(self, items: int | Tensor, tokens: int) -> None:
        """Count the items and input tokens of a micro-batch. A tensor stays on the device."""
        self.items = self.items + items
        if self.expected is None:
            self.counted = items if self.counted is None else self.counted + items
        self.tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Entered around micro-batches that are computed once more: what is noted of them inside is forgotten."""
        before = self.shares, self.items, self.tokens
        noted = len(self.logged.noted)
        self.shares = {}
        try:
            yield
        finally:
            self.shares, self.items, self.tokens = before
            self.logged.forget_after(noted)

    def settle(self) -> None:
        """Sum pending values over ranks and read them to the host. Nothing else in here waits for the device."""
        if not self.updates_pending:
            return
        self.settled.setdefault("loss", ExactSum())  # stays empty where no update had items
        logged, alone = self.logged, self.strategy.world_size == 1
        if alone:
            logged.learn(logged.calls)
        of_ranks = [] if alone else [len(logged.new_names())]
        names = list(self.pending)
        rows = [value for name in names for value in self.pending[name]]
        uncertain = [count.reshape(-1) for name in names for _, count in self.uncertain.get(name, ())]
        counts = [torch.as_tensor(count, device=self.strategy.device) for count in (*of_ranks, self.items, self.tokens)]
        sums_logged = [logged.sums(name, logged.updates) for name in logged.names]
        values = self.strategy.read([*sums_logged, *rows, *uncertain, *counts], summed=True)
        self._take_logged(logged.names, values)
        of_items = values[sum(value.numel() for value in rows) :]
        for name in names:
            length = sum(value.numel() for value in self.pending[name])
            places = [place for place, _ in self.uncertain.get(name, ())]
            empty = {place for place, count in zip(places, of_items, strict=False) if count == 0}
            del of_items[: len(places)]
            sums = self.settled.setdefault(name, ExactSum())
            sums.extend(v for place, v in enumerate(values[:length]) if place not in empty)
            del values[:length]
        if not alone and of_items.pop(0):
            new = logged.names_of_ranks()
            self._take_logged(new, self.strategy.read([logged.sums(name, logged.updates) for name in new], summed=True))
            logged.learn(new)
        self.counts_settled = [before + int(more) for before, more in zip(self.counts_settled, of_items, strict=True)]
        self.items = self.tokens = self.updates_pending = 0
        self.pending.clear()
        self.uncertain.clear()
        logged.clear()

    def _take_logged(self, names: list[str], numbers: list[float]) -> None:
        """Take the means of what modules logged from the beginning of what was read."""
        for name in names:
            self.settled.setdefault(name, ExactSum()).extend(self.logged.means(numbers[: 2 * self.logged.updates]))
            del numbers[: 2 * self.logged.updates]

    def take(self) -> tuple[dict[str, ExactSum], int, int]:
        """Return the sums over the updates since the last ``take``, and the items and tokens since then, over all
        ranks. The next ``take`` begins here.
        """
        self.settle()
        taken = self.settled, *self.counts_settled
        self.settled, self.counts_settled = {}, [0, 0]
        return taken  # type: ignore[return-value]

    def state_dict(self) -> dict[str, Any]:
        """Return the values that aren't taken yet, over all ranks, so that they are valid for any number of ranks
        later.
        """
        self.settle()
        sums = {name: values.state_dict() for name, values in self.settled.items()}
        return {"sums": sums, "counts_settled": self.counts_settled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.pending.clear()
        self.uncertain.clear()
        self.logged.clear()
        self.items = self.tokens = self.updates_pending = 0
        if "settled" in state:  # formats 1 and 2 held the values
            self.settled = {name: ExactSum(values) for name, values in state["settled"].items()}
        else:
            self.settled = {name: ExactSum.from_state(sums) for name, sums in state["sums"].items()}
        self.counts_settled = list(state["counts_settled"])
