"""What users hand to loggers besides numbers, turned at once into plain arrays: the caller may change its own later."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy
import torch

Array: TypeAlias = "numpy.ndarray[Any, Any]"
BINS = 64


class Histogram(NamedTuple):
    """How many values lie between two edges each: as ``numpy.histogram`` returns it.

    Attributes:
        counts: one fewer than the edges.
        edges: from the least value to the greatest.
    """

    counts: Array
    edges: Array


def as_array(values: Any) -> Array:
    """Copy a tensor, or anything that numpy takes, to the host."""
    if isinstance(values, torch.Tensor):
        values = values.detach()
        values = (values.float() if values.is_floating_point() else values).cpu().numpy()
    return numpy.array(values)


def as_image(name: str, image: Any) -> Array:
    """Turn an image into uint8 of the shape (height, width, 3).

    Args:
        name: for the message.
        image: a tensor or array of the shape (height, width), (height, width, channels) or, as torch has it,
            (channels, height, width), with 1, 3 or 4 channels; bytes, or floating point from 0 to 1.

    Raises:
        ValueError: it has another shape.
    """
    array = as_array(image)
    shape = array.shape
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.ndim == 3 and shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        raise ValueError(
            f"The image {name!r} has the shape {shape}. Pass (height, width), (height, width, channels) or "
            "(channels, height, width), with 1, 3 or 4 channels."
        )
    if array.dtype.kind == "f":
        array = numpy.nan_to_num(array).clip(0, 1) * 255 + 0.5
    elif array.dtype == bool:
        array = array * 255
    array = array.astype(numpy.uint8)
    return numpy.ascontiguousarray(array.repeat(3, axis=2) if array.shape[2] == 1 else array[:, :, :3])


def as_histogram(name: str, values: Any) -> Histogram:
    """Count values, or take counts and edges as they are.

    Args:
        name: for the message.
        values: a tensor or array of any shape, or (counts, edges). Values that aren't finite are left out.

    Raises:
        ValueError: the counts don't fit the edges.
    """
    if isinstance(values, tuple):
        counts, edges = (as_array(part).ravel() for part in values)
        if len(edges) != len(counts) + 1:
            raise ValueError(
                f"The histogram {name!r} has {len(counts)} counts and {len(edges)} edges. Pass one edge more than "
                "counts, as numpy.histogram returns them, or the values themselves."
            )
        return Histogram(counts, edges)
    array = as_array(values).ravel()
    return Histogram(*numpy.histogram(array[numpy.isfinite(array)], bins=BINS))


def as_markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Write a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in line)} |" for line in lines)
