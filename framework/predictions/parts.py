"""A part: the rows of one rank, written a number of them at a time."""

from pathlib import Path
from typing import Any

from torch import Tensor

from ..measures.outputs import concatenate
from .columns import Columns, bytes_in, form_of, rows_in
from .options import PredictionWriter


class Part:
    """Takes the batches of one rank and writes them, so that no more than a writer's ``rows`` and a batch are held.

    Args:
        writer: says how many rows are held.
        directory: where files go; it is there.
        rank: of this process; in the names of its files.
        pad_index: fills up rows of shorter batches, where they are joined.

    Attributes:
        batches: rows of each batch so far.
        files: names of those written, and their rows.
        held, peak: rows in memory now, and the most so far.
    """

    def __init__(self, writer: PredictionWriter, directory: Path, rank: int, pad_index: int) -> None:
        self.writer, self.directory, self.rank, self.pad_index = writer, directory, rank, pad_index
        self.batches: list[int] = []
        self.files: list[tuple[str, int]] = []
        self.held = self.peak = self._bytes = 0
        self._waiting: list[Columns] = []
        self._form: dict[str, str] | None = None

    def add(self, columns: Columns) -> None:
        """Take a batch, and write what has been held if it is enough.

        Raises:
            ValueError: it has other columns than the batches before it.
        """
        form = form_of(columns)
        if self._form is None:
            self._form = form
        elif form != self._form:
            raise ValueError(f"Predictions can't be written: a batch has {form}, those before it have {self._form}.")
        rows = rows_in(columns)
        self.batches.append(rows)
        self._waiting.append(columns)
        self.held += rows
        self._bytes += bytes_in(columns)
        self.peak = max(self.peak, self.held)
        if self.held >= self.writer.rows or self._bytes >= self.writer.max_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if self.held:
            self.write(self._waiting)
        self._waiting, self.held, self._bytes = [], 0, 0

    def write(self, batches: list[Columns]) -> None:
        """Write some batches."""
        raise NotImplementedError

    def close(self) -> None:
        """Write the rest."""
        self.flush()

    def abandon(self) -> None:
        """Let go of what is open; what was written is removed by others."""
        self._waiting, self.held, self._bytes = [], 0, 0


class TensorPart(Part):
    """Safetensors files, each of so many rows."""

    def write(self, batches: list[Columns]) -> None:
        """Write some batches as a file.

        Raises:
            ValueError: a column isn't of tensors.
        """
        from safetensors.torch import save_file

        joined: dict[str, Tensor] = {}
        for name, column in batches[0].items():
            if not isinstance(column, Tensor):
                raise ValueError(
                    f"Predictions can't be written: {name} holds {type(column[0]).__name__}, and safetensors files "
                    "hold tensors. Write output='....parquet', or leave it out by ignore_keys."
                )
            joined[name] = concatenate([batch[name] for batch in batches], self.pad_index).contiguous()
        name = f"rank{self.rank:05d}-{len(self.files):05d}.safetensors"
        save_file(joined, self.directory / name)
        self.files.append((name, self.held))


class ParquetPart(Part):
    """One Parquet file, of row groups of so many rows."""

    _file: Any = None

    def write(self, batches: list[Columns]) -> None:
        """Write some batches as a row group."""
        from . import parquet

        table = parquet.table_of(batches)
        if self._file is None:
            name = f"rank{self.rank:05d}.parquet"
            self._file = parquet.open_file(self.directory / name, table.schema)
            self.files.append((name, 0))
        self._file.write_table(table, row_group_size=max(1, self.held))
        name, rows = self.files[0]
        self.files[0] = (name, rows + self.held)

    def close(self) -> None:
        """Write the rest and the file's end."""
        self.flush()
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def abandon(self) -> None:
        """Let go of the file."""
        super().abandon()
        file, self._file = self._file, None
        if file is not None:
            file.close()
