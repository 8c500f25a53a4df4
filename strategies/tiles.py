"""Recorded operations done on this rank's part of a parameter: tile by tile, the same values wherever it is cut.

A parameter is covered by tiles whose size follows from its shape alone. Each draws from a generator whose state is a
hash of the run's seed, the parameter's name, the number of the draw and the tile's number, so a rank draws the tiles
that overlap its part and no others. All operations are done on one tile after the other, whole, and so to the same bit
whatever part is taken of it; and no more memory than a tile's is needed beside the part.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product

import torch
from torch import Tensor

from .held_parts import HeldPart, Slices, local_shape
from .recording import Operation

ENTRIES = 2**15  # in a tile: a tenth of a millisecond to draw, and a hundredth to seed
WIDTH = 512  # of a tile, where there are rows enough: tensor parallelism cuts columns, too

# Where a CPU generator's state has the words of its Mersenne twister.
WORDS = slice(24, 24 + 624 * 8)


def tile_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The size of a parameter's tiles in each dimension."""
    if not shape:
        return ()
    *rows, columns = shape
    sizes = [max(1, min(columns, max(WIDTH, ENTRIES // max(1, math.prod(rows)))))]
    for size in reversed(rows):
        sizes.insert(0, max(1, min(size, ENTRIES // math.prod(sizes))))
    return tuple(sizes)


def overlapping(box: Slices, sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The places of the tiles that a box overlaps, counted in tiles along each dimension."""
    return product(*(range(b.start // s, -(-b.stop // s)) for b, s in zip(box, sizes, strict=True)))


def common(first: Slices, second: Slices) -> Slices | None:
    """The box that lies in both; None where nothing does."""
    both = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(first, second, strict=True))
    return None if any(b.start >= b.stop for b in both) else both


def within(box: Slices, outer: Slices) -> Slices:
    """Where a box lies, counted from the beginning of one around it."""
    return tuple(slice(b.start - o.start, b.stop - o.start) for b, o in zip(box, outer, strict=True))


@torch.no_grad()
def do(
    operations: Sequence[Operation],
    parts: Sequence[HeldPart],
    parameter: Tensor,
    name: str,
    device: torch.device,
) -> Tensor:
    """Do what was recorded on the parts of a parameter that this rank holds.

    Args:
        operations: on the whole parameter, in order.
        parts: of the parameter, on this rank.
        parameter: for its shape and dtype.
        name: of the parameter, which its random numbers follow from.
        device: of the result. Values are drawn on the host, and so are the same on every device.

    Returns:
        The shard: a plain tensor.
    """
    shape = tuple(parameter.shape)
    local = torch.empty(local_shape(parts), dtype=parameter.dtype)
    sizes = tile_shape(shape)
    seed = f"{torch.initial_seed()} {name}".encode()

    def fill(work: tuple[HeldPart, tuple[int, ...]]) -> None:
        part, place = work
        box = tuple(slice(i * s, min((i + 1) * s, n)) for i, s, n in zip(place, sizes, shape, strict=True))
        tile = done_on(operations, box, parameter.dtype, seed)
        both = common(box, part.whole)
        if both is not None:
            there = within(both, part.whole)
            local[part.local][there] = tile[within(both, box)]

    tiles = ((part, place) for part in parts for place in overlapping(part.whole, sizes))
    threads = torch.get_num_threads()
    if threads > 1 and local.numel() > ENTRIES:  # a draw is done by one thread, which doesn't hold Python's lock
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(fill, tiles):
                pass
    else:
        for work in tiles:
            fill(work)
    return local.to(device)


def done_on(operations: Sequence[Operation], box: Slices, dtype: torch.dtype, seed: bytes) -> Tensor:
    """Make one tile of a parameter, and do on it what was recorded.

    Args:
        box: of the tile.
        seed: of the parameter.
    """
    tile = torch.empty([b.stop - b.start for b in box], dtype=dtype)
    for operation in operations:
        both = common(box, operation.box)
        if both is None and box:
            continue
        where = within(both or (), box)
        if operation.draws is None:
            operation.function(tile[where], *operation.arguments, **operation.keywords)
        else:
            generator = generator_for(b"%b %d %b" % (seed, operation.draws, repr(box).encode()))
            drawn = tile if both == box else torch.empty_like(tile)
            operation.function(drawn, *operation.arguments, **operation.keywords, generator=generator)
            if drawn is not tile:
                tile[where] = drawn[where]
    return tile


def generator_for(words: bytes) -> torch.Generator:
    """A generator on the host whose state is a hash of some words. A seed has 32 bits there, which are too few to tell
    the tiles of a large model apart.
    """
    state = bytearray(fresh_state())
    state[WORDS] = hashlib.shake_128(words).digest(WORDS.stop - WORDS.start)
    generator = torch.Generator()
    generator.set_state(torch.frombuffer(state, dtype=torch.uint8))
    return generator


@cache
def fresh_state() -> bytes:
    """The state of a CPU generator that was seeded and not used."""
    return bytes(torch.Generator().manual_seed(0).get_state().numpy().tobytes())
