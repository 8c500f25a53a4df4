"""A batch of predictions as columns, each with one entry for a row."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Columns = dict[str, Any]
"""Name to a tensor, whose first dimension are the rows, or to a list of one object a row."""

PREDICTIONS = "predictions"
LABELS = "label_ids"


def columns_of(outputs: Any, labels: Any) -> Columns:
    """Return the columns of a batch: ``predictions``, or the entries of a mapping by their names; and ``label_ids``.

    Args:
        outputs: on the host. Entries of a mapping in a mapping are called "outer.inner", those of a tuple
            "predictions_0" and so on.
        labels: the same; None has no column.

    Raises:
        ValueError: the columns have different numbers of rows, or one has none.
    """
    columns: Columns = {}
    gather(columns, "" if isinstance(outputs, Mapping) else PREDICTIONS, outputs)
    if labels is not None:
        gather(columns, LABELS, labels)
    rows = {name: len(column) for name, column in columns.items()}
    if len(set(rows.values())) > 1 or not rows:
        raise ValueError(
            "Predictions can't be written row by row: a batch has "
            f"{', '.join(f'{count} of {name}' for name, count in rows.items()) or 'no outputs'}. Leave out, by "
            "ignore_keys or preprocess_logits_for_metrics, what isn't of one row each."
        )
    return columns


def gather(columns: Columns, name: str, value: Any) -> None:
    """Put a value, or what it is made of, among the columns."""
    if isinstance(value, Tensor):
        put(columns, name, value.reshape(-1) if value.ndim == 0 else value)
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            gather(columns, f"{name}.{key}" if name else str(key), entry)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        if any(isinstance(entry, Tensor | Mapping) for entry in value):
            for index, entry in enumerate(value):
                gather(columns, f"{name}_{index}", entry)
        else:
            put(columns, name, list(value))
    elif value is not None:
        raise ValueError(
            f"Predictions can't be written row by row: {name} is {type(value).__name__}, which has no rows. Leave it "
            "out by ignore_keys or preprocess_logits_for_metrics."
        )


def put(columns: Columns, name: str, column: Any) -> None:
    """Put a column among the others.

    Raises:
        ValueError: there is one of that name.
    """
    if name in columns:
        raise ValueError(f"Predictions can't be written: there are two columns named {name!r}. Rename an output.")
    columns[name] = column


def bytes_in(columns: Columns) -> int:
    """Return about how many bytes a batch takes."""
    return sum(c.nbytes if isinstance(c, Tensor) else 64 * len(c) for c in columns.values())


def rows_in(columns: Columns) -> int:
    """Return the number of rows of a batch."""
    return len(next(iter(columns.values())))


def form_of(columns: Columns) -> dict[str, str]:
    """Return what must be alike in all batches: each column's dtype and number of dimensions."""
    return {
        name: f"{column.dtype}, {column.ndim} dimensions" if isinstance(column, torch.Tensor) else "objects"
        for name, column in columns.items()
    }
