"""Curves in a terminal: braille characters of two by four dots, and lines of blocks."""

from collections.abc import Sequence

Points = Sequence[tuple[float, float]]

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character, by row and column
BLOCKS = "▁▂▃▄▅▆▇█"


def plot(
    curves: Sequence[Points], columns: int, rows: int, limits: tuple[float, float, float, float]
) -> list[list[tuple[str, int]]]:
    """Draw curves over one another.

    Args:
        curves: (x, y) of each one's points, in the order of x.
        columns, rows: characters.
        limits: the least and greatest x, the least and greatest y.

    Returns:
        Rows of (character, which curve it belongs to, the last one on top; -1 for none).
    """
    bits = [[0] * columns for _ in range(rows)]
    owner = [[-1] * columns for _ in range(rows)]
    left, right, low, high = limits
    wide, tall = columns * 2 - 1, rows * 4 - 1

    def place(x: float, y: float) -> tuple[int, int]:
        across = round((x - left) / (right - left) * wide) if right > left else 0
        up = round((y - low) / (high - low) * tall) if high > low else tall // 2
        return min(max(across, 0), wide), tall - min(max(up, 0), tall)

    def dot(across: int, down: int, number: int) -> None:
        row, column = down // 4, across // 2
        if owner[row][column] != number:
            owner[row][column], bits[row][column] = number, 0
        bits[row][column] |= DOTS[down % 4][across % 2]

    for number, points in enumerate(curves):
        before: tuple[int, int] | None = None
        for x, y in points:
            here = place(x, y)
            for across, down in between(before or here, here):
                dot(across, down, number)
            before = here
    return [
        [
            (chr(0x2800 + bits[row][column]) if bits[row][column] else " ", owner[row][column])
            for column in range(columns)
        ]
        for row in range(rows)
    ]


def between(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots of a line from one to another."""
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
    if steps == 0:
        return [end]
    return [
        (round(start[0] + (end[0] - start[0]) * step / steps), round(start[1] + (end[1] - start[1]) * step / steps))
        for step in range(steps + 1)
    ]


def sparkline(values: Sequence[float], columns: int) -> str:
    """A curve in one row: the mean of each stretch as a block.

    Example:
        >>> sparkline([0, 1, 2, 3], 4)
        '▁▃▆█'
    """
    if not values:
        return ""
    columns = min(columns, len(values))
    means = []
    for column in range(columns):
        stretch = values[column * len(values) // columns : (column + 1) * len(values) // columns]
        means.append(sum(stretch) / len(stretch))
    low, high = min(means), max(means)
    span = high - low
    return "".join(BLOCKS[round((mean - low) / span * 7) if span > 0 else 3] for mean in means)
