"""The orders of an epoch: functions from positions to indices into the data.

Up to a million samples a permutation is drawn, which costs up to 4 MB and 20 ms an epoch. A permutation of a billion
would cost each rank 4 GB and a minute before each epoch and each resume; so from ``COMPUTED_FROM`` samples on the index
at a position is computed where it is asked for, and nothing is made or kept. A checkpoint says which of the two it is.

The computed order is a Feistel network over numbers of two digits (``high * width + low``), with modular additions in
place of bits, so that any two widths will do. They are chosen such that their product is the number of samples, or
hardly more; an index beyond the samples goes through the network again until it is one of them, which keeps the order a
permutation ("cycle walking"). The keys of its rounds follow from seed and epoch.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy
import torch

COMPUTED_FROM = 2**20
"""Samples from which on a new run computes its order."""

COMPUTED, DRAWN = "computed", "drawn"
"""What a checkpoint calls the two orders."""

Positions = numpy.ndarray[Any, numpy.dtype[numpy.int64]]
Order = Callable[[Positions], Positions]
"""Positions in an epoch to indices into the data."""

ROUNDS = (
    8  # with three, the statistics of tests/framework/test_orders.py tell the order from chance; the rest is margin
)
WIDTHS = 64  # that are tried
AT_ONCE = 4096  # positions that are looked up together, since a call of numpy costs as much for one as for a hundred
MULTIPLIERS = numpy.uint64(0x9E3779B97F4A7C15), numpy.uint64(0xD6E8FEB86659FD93)
HALF = numpy.uint64(32)


def drawn_order(samples: int, seed: int) -> Order:
    """Return an order that is drawn here and now, in 4 bytes a sample (8 from 2^31 samples on)."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.int32 if samples < 2**31 else torch.int64  # the values are the same
    return torch.randperm(samples, generator=generator, dtype=kind).numpy().take


class ComputedOrder:
    """A permutation that is computed position by position, in no time and no memory of its own.

    Args:
        samples: how many are permuted, less than 2^62.
        seed, epoch: what it follows from.

    Example:
        >>> order = ComputedOrder(10**9, seed=42, epoch=0)
        >>> order(numpy.arange(2)).tolist()  # the first two of the epoch
        [81731293, 686805788]
    """

    def __init__(self, samples: int, seed: int, epoch: int) -> None:
        self.samples = samples
        least = math.isqrt(samples - 1) + 1
        # Of some widths near the root the one is taken that leaves the fewest numbers beyond the samples.
        widths = range(least, least + min(least // 16 + 1, WIDTHS))
        self.width = min(widths, key=lambda width: -samples % width)
        self.height = -(-samples // self.width)
        # The spawn key tells these numbers from the seeds of batches, which follow from seed and epoch, too.
        sequence = numpy.random.SeedSequence((seed, epoch), spawn_key=(0,))
        self.keys = sequence.generate_state(ROUNDS, numpy.uint64)

    def __call__(self, positions: Positions) -> Positions:
        """Return the indices at some positions, a one-dimensional array, each from 0 to ``samples`` - 1."""
        found = self._permuted(positions.astype(numpy.uint64))
        if self.width * self.height > self.samples:
            while len(beyond := numpy.flatnonzero(found >= self.samples)):
                found[beyond] = self._permuted(found[beyond])
        return found.astype(numpy.int64)

    def _permuted(self, numbers: "numpy.ndarray[Any, Any]") -> "numpy.ndarray[Any, Any]":
        """Permute the numbers below width * height, by arithmetic modulo 2^64 alone."""
        own, other = numpy.uint64(self.height), numpy.uint64(self.width)
        first, second = MULTIPLIERS
        high = numbers // other
        low = numbers - high * other
        for key in self.keys:
            mixed = low ^ key
            mixed *= first
            mixed ^= mixed >> HALF
            mixed *= second
            mixed >>= HALF
            mixed *= own  # the upper half of a product of 32 bits and a width is a number below the width
            mixed >>= HALF
            mixed += high
            # Below 2 * own; where it is below own already, subtracting goes around to a number that is larger.
            high, low = low, numpy.minimum(mixed, mixed - own)
            own, other = other, own
        return high * numpy.uint64(self.width) + low


def look_up(order: Order, ranges: Iterable[range], length: int) -> Iterator[Positions]:
    """Yield the indices at each of some ranges of positions.

    Args:
        order: of the epoch.
        ranges: read a little ahead.
        length: of a usual range.
    """
    ranges, several = iter(ranges), max(1, AT_ONCE // length)
    while block := list(itertools.islice(ranges, several)):
        positions = numpy.concatenate([numpy.arange(each.start, each.stop) for each in block])
        indices = order(positions)
        begin = 0
        for each in block:
            yield indices[begin : begin + len(each)]
            begin += len(each)
