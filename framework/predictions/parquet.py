"""Parquet files of predictions: rows of tensors as columns, and the files of several ranks joined in order."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .columns import Columns
from .options import PredictionWriter
from .order import in_order

READ_AHEAD = 1 << 20  # bytes of each column that are read at once


def check_package() -> None:
    """Refuse to write Parquet without the package that does.

    Raises:
        ImportError: names the extra.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "output='....parquet' needs pyarrow: pip install 'stratagem[parquet]'. A directory needs nothing more."
        ) from error


def open_file(path: Path, schema: Any) -> Any:
    """Open a Parquet file for writing."""
    import pyarrow.parquet as pq

    return pq.ParquetWriter(path, schema)


def table_of(batches: Sequence[Columns]) -> Any:
    """Return batches as one Arrow table. A row of a tensor with more dimensions is a list (of lists), as long as it is:
    nothing is filled up.
    """
    import pyarrow as pa

    tables = [pa.table({name: array_of(name, column) for name, column in batch.items()}) for batch in batches]
    return pa.concat_tables(tables)


def array_of(name: str, column: Any) -> Any:
    """Return a column as an Arrow array.

    Raises:
        ValueError: Parquet has no such numbers.
    """
    import pyarrow as pa

    if not isinstance(column, Tensor):
        return pa.array(column)
    if column.is_complex():
        raise ValueError(
            f"Predictions can't be written: {name} is complex, which Parquet doesn't know. Write torch.view_as_real of "
            "it, or a directory, which takes any tensor."
        )
    if column.is_floating_point() and column.dtype not in (torch.float64, torch.float32, torch.float16):
        column = column.float()  # bfloat16 and smaller ones fit into float32 exactly
    array = pa.array(column.reshape(-1).numpy())
    for dimension in range(column.ndim - 1, 0, -1):
        count, length = column.shape[:dimension].numel(), column.shape[dimension]
        offsets = pa.array((torch.arange(count + 1) * length).numpy(), pa.int64())
        array = pa.LargeListArray.from_arrays(offsets, array)
    return array


def rows_of(path: Path, at_most: int) -> Iterator[Any]:
    """Yield the rows of a Parquet file, at most so many at a time, as Arrow tables."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_AHEAD) as file:
        for batch in file.iter_batches(batch_size=at_most):
            yield pa.Table.from_batches([batch])


class Stream:
    """The rows of a part, a number of them at a time."""

    def __init__(self, path: Path, at_most: int) -> None:
        self.tables = rows_of(path, at_most)
        self.rest: Any = None

    def take(self, rows: int) -> list[Any]:
        """Return the next rows, as tables."""
        taken = []
        while rows:
            if self.rest is None or not self.rest.num_rows:
                self.rest = next(self.tables)
            piece, self.rest = self.rest.slice(0, rows), self.rest.slice(rows)
            rows -= piece.num_rows
            taken.append(piece)
        return taken


def join(parts: Sequence[Path], batches: Sequence[Sequence[int]], path: Path, writer: PredictionWriter) -> int:
    """Join the files of several ranks to one, in the order of the data.

    Args:
        parts: the files of ranks that have rows, in the order of ranks.
        batches: the rows of each one's batches.
        path: of the file to write.
        writer: says how many rows are held.

    Returns:
        The most rows that were held: those of a row group, and a batch of each part.
    """
    import pyarrow as pa

    largest = [max(sizes) for sizes in batches]
    streams = [Stream(part, most) for part, most in zip(parts, largest, strict=True)]
    file: Any = None
    waiting: list[Any] = []
    held = taken = peak = 0
    try:
        for part, rows in in_order(batches):
            for piece in streams[part].take(rows):
                waiting.append(piece)
                held += piece.num_rows
                taken += piece.nbytes
            peak = max(peak, held)
            if held >= writer.rows or taken >= writer.max_bytes:
                file = write_group(file, path, pa.concat_tables(waiting))
                waiting, held, taken = [], 0, 0
        if held:
            file = write_group(file, path, pa.concat_tables(waiting))
    finally:
        if file is not None:
            file.close()
    return peak + sum(largest)


def write_group(file: Any, path: Path, table: Any) -> Any:
    """Write a table as one row group, into a file that is opened where it isn't open yet; return the file."""
    file = open_file(path, table.schema) if file is None else file
    file.write_table(table, row_group_size=table.num_rows)
    return file
