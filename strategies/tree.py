"""The sum of a few numbers over all ranks along a tree, whose branches grow with the logarithm of the ranks' number.

What a small message costs is how often a rank is woken for it, and how many messages follow one upon another; not how
long it is. gloo's own all-reduce goes round a ring: 2 (N - 1) messages, one after another, and each number of a short
list goes round on its own. Here rank r hears from r + 1, r + 2, r + 4, ... up to its own lowest binary digit, and tells
r less that digit; then the sums go back the same way. That is 2 (N - 1) messages over all ranks, whatever they hold,
of which at most 2 log2 N follow one upon another: 2 on 2 ranks, 6 on 8, 20 on 1,000, 28 on 10,000. Half of the ranks
send one message and receive one. Neighbours in rank, which share a machine, are summed before machines are.

The ranks wait for it, since what is exchanged so decides what each of them does next: see framework/run/exchange.py.
"""

from functools import cache
from typing import Any

import torch

UP, DOWN = 0x73756D00, 0x73756D01  # tags that no program is likely to give to messages of its own


def sum_along_tree(values: list[int], group: Any) -> list[int]:
    """Sum each number over all ranks. Collective; never waits for a device.

    Args:
        values: as many on every rank; each sum has to fit into 63 bits.
        group: the ranks' process group, gloo's for tensors on the host.

    Returns:
        The sums, the same on every rank.

    Raises:
        RuntimeError: another rank is gone.
    """
    above, below = neighbours(group.rank(), group.size())
    total = torch.tensor(values)
    parts = total.new_empty(len(below), len(values))
    coming = [group.recv([part], rank, UP) for part, rank in zip(parts, below, strict=True)]
    for work in coming:
        work.wait()
    if below:
        total += parts.sum(0)
    if above is not None:
        sums = torch.empty_like(total)
        coming = [group.recv([sums], above, DOWN), group.send([total], above, UP)]
        for work in coming:
            work.wait()
        total = sums
    going = [group.send([total], rank, DOWN) for rank in reversed(below)]  # the longest way first
    for work in going:
        work.wait()
    return total.tolist()


@cache
def neighbours(rank: int, size: int) -> tuple[int | None, tuple[int, ...]]:
    """The rank that a rank tells its sum, and those that tell it theirs.

    Args:
        rank: one of ``size`` ranks.
        size: any number of ranks.

    Returns:
        (above, below): above None for rank 0; below in the order in which they are ready.

    Example:
        >>> neighbours(0, 6), neighbours(4, 6), neighbours(5, 6)
        ((None, (1, 2, 4)), (0, (5,)), (4, ()))
    """
    below: list[int] = []
    step = 1
    while step < size and not rank & step:
        if rank + step < size:
            below.append(rank + step)
        step *= 2
    return (rank - step if rank else None), tuple(below)
