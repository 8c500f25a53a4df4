"""How what a device holds grows with the micro-batch: a straight line for each moment of an update."""

from collections.abc import Iterable, Sequence

Line = tuple[float, float]  # bytes without samples, and bytes that each one adds


def lines_of(smaller: Sequence[int], larger: Sequence[int], samples: int) -> list[Line]:
    """The lines of the moments at which a device may hold most, whatever the size of the micro-batch.

    The moment with most at one size needn't be the one at another: what a layer keeps for backward grows faster than
    what the optimizer's step takes.

    Args:
        smaller: bytes that are held at each moment of an update.
        larger: the same with twice as many samples.
        samples: of the smaller micro-batch.
    """
    pairs = zip(smaller, larger, strict=True)
    return highest((few, 0.0) if many <= few else (2 * few - many, (many - few) / samples) for few, many in pairs)


def highest(lines: Iterable[Line]) -> list[Line]:
    """The lines that are above all others for some number of samples, by how fast they rise."""
    found: list[Line] = []
    for base, rise in sorted(set(lines), key=lambda line: (line[1], line[0])):
        while found and (found[-1][0] <= base or (len(found) > 1 and is_below(found[-2], found[-1], (base, rise)))):
            found.pop()
        found.append((base, rise))
    return found


def is_below(slower: Line, middle: Line, faster: Line) -> bool:
    """Whether the middle one of three lines is nowhere above both others."""
    (a, p), (b, q), (c, r) = slower, middle, faster
    return (a - c) * (q - p) <= (a - b) * (r - p)


def most_samples(lines: Sequence[Line], room: int) -> int | None:
    """The most samples with which all lines stay within so many bytes; None where no line rises."""
    if not any(rise for _, rise in lines):
        return None
    if any(base > room for base, rise in lines if not rise):
        return 0
    return max(0, min(int((room - base) // rise) for base, rise in lines if rise))
