"""Passes over the data in updates, of which later passes may have other numbers."""

from ..arguments import FitArguments
from ..fields.accumulation import micro_batches_at


class Passes:
    """Counts updates in passes, and passes in updates.

    Args:
        args: how many micro-batches an update takes, in each pass.
        micro_batches: in a whole pass.
        batches: of an update, each of so many micro-batches as ``args`` says; see ``Turns``.

    Example:
        >>> passes = Passes(FitArguments(gradient_accumulation_steps=4, gradient_accumulation_schedule={2: 1}), 10)
        >>> [passes.updates(number) for number in range(4)], passes.updates_between(1, 4), passes.passes_of(7)
        ([3, 3, 10, 10], 23, 3)
    """

    def __init__(self, args: FitArguments, micro_batches: int, batches: int = 1) -> None:
        self.args, self.micro_batches, self.batches = args, micro_batches, batches

    def updates(self, number: int) -> int:
        """The updates in a pass, by its number from 0."""
        return max(1, -(-self.micro_batches // (self.batches * micro_batches_at(vars(self.args), number))))

    def updates_between(self, first: int, end: int) -> int:
        """The updates in some passes, from the first to before the end."""
        changes = [epoch for epoch in self.args.gradient_accumulation_schedule if first < epoch < end]
        begins, ends = [first, *changes], [*changes, end]
        return sum(
            (after - before) * self.updates(before)
            for before, after in zip(begins, ends, strict=True)
            if after > before
        )

    def passes_of(self, updates: int, first: int = 0) -> int:
        """The passes that some updates make, the last one perhaps in part, from a first pass on."""
        here = first
        for change in self.args.gradient_accumulation_schedule:
            if change > here:
                between = self.updates_between(here, change)
                if updates <= between:
                    break
                here, updates = change, updates - between
        return here - first - (-updates // self.updates(here))
