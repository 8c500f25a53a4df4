"""The outputs of an evaluation or prediction on the host: kept batch by batch, then joined over batches and ranks."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .rows import Rows, in_one_piece

Path = tuple[Any, ...]


class KeptOutputs:
    """Outputs and labels of batches, which move to the host some batches at a time.

    Args:
        ignored: entries of a mapping output that are left out.
        batches: how many batches stay on the device together.
        preprocess: (outputs, labels) to what is kept of the outputs; None keeps them as they are.
    """

    are_written = False
    """Whether they are handed on, and not kept."""

    def __init__(
        self, ignored: Collection[str], batches: int, preprocess: Callable[[Any, Any], Any] | None = None
    ) -> None:
        self.ignored, self.batches, self.preprocess = ignored, batches, preprocess
        self.moved: list[Any] = []
        self.on_device: list[Any] = []
        self.expected = 0
        self.rows: dict[Path, Rows] = {}

    def expect(self, rows: int) -> None:
        """Note how many rows there will be at most; 0 where that isn't known. Called before the first batch."""
        self.expected = rows

    def add(self, outputs: Any, labels: Any) -> None:
        """Keep the outputs and labels of a batch."""
        if self.preprocess is not None:
            outputs = self.preprocess(unwrap_single(leave_out(outputs, self.ignored)), labels)
        self.on_device.append((outputs, labels))
        if self.batches == 1 or len(self.on_device) >= self.batches:
            self.move()

    def pass_by(self) -> None:
        """Note that other ranks have a batch here, and this one has none."""

    def move(self) -> None:
        """Move what is on the device to the host."""
        waiting, self.on_device = self.on_device, []
        for outputs, labels in waiting:
            self.moved.append((self.keep(outputs, OUTPUTS), None if labels is None else self.keep(labels, LABELS)))

    def keep(self, value: Any, path: Path) -> Any:
        """Return outputs on the host, tensors beside those of the batches before where they have a place there."""
        if type(value) is Tensor and self.expected:
            rows = self.rows.get(path)
            if rows is None and value.ndim and value.layout is torch.strided:
                rows = self.rows[path] = Rows(self.expected, value)
            kept = None if rows is None else rows.put(value)
            return to_host(value) if kept is None else kept
        if isinstance(value, dict):
            kept_of = leave_out(value, self.ignored) if path[0] == OUTPUTS[0] else value
            return {name: self.keep(entry, (*path, name)) for name, entry in kept_of.items()}
        if isinstance(value, tuple | list) and any(isinstance(entry, Tensor | dict | tuple | list) for entry in value):
            return tuple(self.keep(entry, (*path, place)) for place, entry in enumerate(value))
        return to_host(value)

    def on_host(self) -> Any:
        """Return (outputs, labels) of every batch, on the host."""
        self.move()
        return self.moved


OUTPUTS: Path = ("outputs",)
LABELS: Path = ("labels",)


def leave_out(outputs: Any, ignored: Collection[str]) -> Any:
    """Return a mapping output without its loss and the entries that aren't wanted; any other output as it is."""
    if not isinstance(outputs, dict):
        return outputs
    return {name: value for name, value in outputs.items() if name not in ignored and name != "loss"}


def unwrap_single(outputs: Any) -> Any:
    """Return the only entry of a mapping or tuple that has one; anything else as it is."""
    if isinstance(outputs, dict | tuple) and len(outputs) == 1:
        return next(iter(outputs.values())) if isinstance(outputs, dict) else outputs[0]
    return outputs


def to_host(outputs: Any, ignored: Collection[str] = ()) -> Any:
    """Return outputs with their tensors on the host, without the entries that aren't wanted."""
    if isinstance(outputs, Tensor):
        tensor = outputs.detach().cpu()
        # A view on the host would keep all that it was cut from: the whole sequence for the sake of its first token.
        return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
    if isinstance(outputs, dict):
        return {name: to_host(value, ignored) for name, value in leave_out(outputs, ignored).items()}
    if isinstance(outputs, list) and not any(isinstance(value, Tensor | dict | tuple | list) for value in outputs):
        return list(outputs)  # one entry a sample: texts, for instance
    if isinstance(outputs, tuple | list):
        return tuple(to_host(value, ignored) for value in outputs)
    return outputs


def in_order_of_data(ranks: Sequence[Sequence[Any]]) -> list[Any]:
    """Return every rank's batches in the order of the data: a global micro-batch is cut in the order of ranks, and only
    in the last one may a rank have no samples.
    """
    return [batches[i] for i in range(max(map(len, ranks))) for batches in ranks if i < len(batches)]


def concatenate(parts: list[Any], pad_index: int) -> Any:
    """Join the outputs of batches along their first dimension; what is no tensor becomes a list.

    Args:
        parts: one for each batch.
        pad_index: fills up the other dimensions, at their ends, where batches differ in them.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        if (whole := in_one_piece(parts)) is not None:
            return whole
        rows = [part.reshape(-1) if part.ndim == 0 else part for part in parts]
        differ = any(row.shape[1:] != rows[0].shape[1:] for row in rows)
        return torch.cat(pad_to_longest(rows, pad_index) if differ else rows)
    if isinstance(first, dict):
        return {key: concatenate([part[key] for part in parts], pad_index) for key in first}
    if isinstance(first, tuple):
        return tuple(concatenate([part[i] for part in parts], pad_index) for i in range(len(first)))
    if isinstance(first, list):
        return [entry for part in parts for entry in part]
    return parts


def pad_to_longest(rows: list[Tensor], pad_index: int) -> list[Tensor]:
    """Fill up tensors so that all have one shape but for their first dimension.

    Raises:
        ValueError: they differ in their number of dimensions.
    """
    if len({row.ndim for row in rows}) > 1:
        shapes = ", ".join(sorted({str(tuple(row.shape)) for row in rows}))
        raise ValueError(
            f"The outputs of batches can't be joined: their shapes are {shapes}. Have forward return as many "
            "dimensions for every batch, or leave the entry out by ignore_keys."
        )
    longest = [max(sizes) for sizes in zip(*(row.shape[1:] for row in rows), strict=True)]
    filled = []
    for row in rows:
        whole = row.new_full((len(row), *longest), False if row.dtype is torch.bool else pad_index)
        whole[(slice(None), *(slice(size) for size in row.shape[1:]))] = row
        filled.append(whole)
    return filled
