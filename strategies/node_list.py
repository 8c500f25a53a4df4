"""Lists as SLURM writes them, in brackets and with counts: names of nodes, and tasks on each node."""

import re
from collections.abc import Iterator

PIECE = re.compile(r"([^\[\],\s]+)|\[([^\[\]]*)\]")  # text as it is, or the ranges of one pair of brackets
RANGE = re.compile(r"(\d+)(?:-(\d+))?")
TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def expand_nodes(nodes: str) -> Iterator[str]:
    """Name each node of a list, in SLURM's order.

    Args:
        nodes: names with commas between them; brackets in a name hold numbers and ranges of them, which keep their
            leading zeros. A name with several brackets stands for each combination, the last one changing fastest.

    Raises:
        ValueError: it is no such list.

    Example:
        >>> list(expand_nodes("n[01-03,7],m4"))
        ['n01', 'n02', 'n03', 'n7', 'm4']
    """
    position = 0
    while position < len(nodes):
        start, pieces = position, []
        while found := PIECE.match(nodes, position):
            pieces.append(found)
            position = found.end()
        if not pieces or (position < len(nodes) and nodes[position] != ","):
            raise ValueError(f"no list of nodes, from its character {position + 1} on: {nodes!r}")
        yield from _combine([[found[1]] if found[1] else _numbers(found[2], nodes) for found in pieces])
        position += 1  # the comma
        if position == len(nodes) > start:
            raise ValueError(f"no list of nodes: it ends with a comma: {nodes!r}")


def _combine(pieces: list[list[str]]) -> Iterator[str]:
    """Join one alternative of each piece, in every combination."""
    if not pieces:
        yield ""
        return
    for first in pieces[0]:
        for rest in _combine(pieces[1:]):
            yield first + rest


def _numbers(ranges: str, nodes: str) -> list[str]:
    """Write out the numbers between two brackets of a list."""
    written = []
    for part in ranges.split(","):
        found = RANGE.fullmatch(part)
        low, high = (found[1], found[2] or found[1]) if found else ("1", "0")
        if int(low) > int(high):
            raise ValueError(f"no list of nodes: {part!r} in brackets is no number, and no range of them: {nodes!r}")
        written += [f"{number:0{len(low)}}" for number in range(int(low), int(high) + 1)]
    return written


def expand_tasks(tasks: str) -> tuple[int, ...]:
    """Count the tasks on each node, from counts with commas between them, where "(x3)" repeats one.

    Raises:
        ValueError: it is no such list.

    Example:
        >>> expand_tasks("2(x3),1")
        (2, 2, 2, 1)
    """
    counts: list[int] = []
    for part in tasks.split(","):
        found = TASKS.fullmatch(part)
        if found is None:
            raise ValueError(f"no list of tasks on each node: {tasks!r}")
        counts += [int(found[1])] * int(found[2] or 1)
    return tuple(counts)
