"""Data that are given by column: a mapping of tensors or arrays, or a table of pyarrow's, as a dataset of rows."""

import sys
from collections.abc import Mapping
from typing import Any

import numpy
from torch import Tensor
from torch.utils.data import Dataset


class Columns(Dataset):
    """The rows of tensors and arrays of one length: row i holds the i-th entry of each, by name.

    Args:
        columns: names to tensors or numpy arrays, memory maps among them.

    Raises:
        ValueError: they aren't equally long.

    Example:
        >>> rows = Columns({"x": torch.zeros(10, 3), "labels": numpy.arange(10)})
        >>> len(rows), rows[2]["x"]
        (10, tensor([0., 0., 0.]))
    """

    def __init__(self, columns: Mapping[str, Any]) -> None:
        lengths = {name: len(column) if column.ndim else None for name, column in columns.items()}
        if len({*lengths.values()}) > 1 or None in lengths.values():
            raise ValueError(
                f"A mapping of tensors or arrays is one set of data by column, and these have lengths {lengths}. Cut "
                "them to one length; or, for several sets by name, give each as a dataset: "
                "{name: TensorDataset(tensor)}."
            )
        self.columns = dict(columns)
        self.column_names = list(columns)
        self.length = len(next(iter(columns.values())))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self.columns[index]
        return {name: column[index] for name, column in self.columns.items()}


class TableRows(Dataset):
    """The rows of a table of pyarrow's, by column name. Numbers come as numpy's, with the column's type, lists of
    numbers as numpy arrays, and all else as Python's.

    Args:
        table: a pyarrow.Table, in memory or of a mapped file.

    Attributes:
        views: the columns that numpy can index where they lie, by name: numbers, and lists of one fixed length of
            numbers, in one piece.
    """

    def __init__(self, table: Any) -> None:
        self.table = table
        self.column_names = list(table.column_names)
        views = {name: view_of(column) for name, column in zip(self.column_names, table.columns, strict=True)}
        self.views = {name: view for name, view in views.items() if view is not None}

    def __reduce__(self) -> Any:
        return TableRows, (self.table,)  # a view would be sent to a worker as a copy of the column

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self.table[index].to_pylist()
        return {name: values[0] for name, values in self.take([index]).items()}

    def __getitems__(self, indices: Any) -> list[dict[str, Any]]:
        taken = self.take(indices)
        return [{name: values[row] for name, values in taken.items()} for row in range(len(indices))]

    def take(self, indices: Any) -> dict[str, Any]:
        """Return the values of some rows by column: a numpy array, or a list of values."""
        others = self.take_others(indices)
        return {name: others[name] if name in others else self.views[name][indices] for name in self.column_names}

    def take_others(self, indices: Any) -> dict[str, Any]:
        """The same, of the columns that have no view."""
        names = [name for name in self.column_names if name not in self.views]
        columns = self.table.select(names).take(indices).columns if names else []
        return {name: values_of(column, name) for name, column in zip(names, columns, strict=True)}


def view_of(column: Any) -> Any:
    """Return an Arrow column as a numpy array in the same memory; None where it can't be one."""
    import pyarrow

    if column.num_chunks != 1 or column.null_count:
        return None
    array = column.chunk(0)
    is_list = pyarrow.types.is_fixed_size_list(column.type)
    values = array.flatten() if is_list else array
    is_number = pyarrow.types.is_integer(values.type) or pyarrow.types.is_floating(values.type)
    # torch makes no tensor of a list of numpy's uint64.
    if not is_number or values.null_count or values.type == pyarrow.uint64():
        return None
    view = values.to_numpy(zero_copy_only=True)
    return view.reshape(len(array), column.type.list_size) if is_list else view


def values_of(column: Any, name: str) -> Any:
    """Return the values of an Arrow column: an array of numbers, also of lists that are equally long; else a list.

    Raises:
        ValueError: a value is missing.
    """
    import pyarrow

    if column.null_count:
        raise ValueError(
            f"The column {name!r} of the table has missing values, and a batch can't hold them. Fill or drop them: "
            "table.drop_null()."
        )
    types = pyarrow.types
    if types.is_integer(column.type) or types.is_floating(column.type) or types.is_boolean(column.type):
        return column.to_numpy(zero_copy_only=False)
    if types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type):
        return lists_of(column.combine_chunks() if isinstance(column, pyarrow.ChunkedArray) else column, name)
    return column.to_pylist()


def lists_of(lists: Any, name: str) -> Any:
    """Return the lists of an Arrow array as one array, where they are equally long, else as a list of arrays."""
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    values = values_of(lists.flatten(), name)
    if len({*lengths.tolist()}) == 1 and isinstance(values, numpy.ndarray):
        return values.reshape(len(lists), int(lengths[0]), *values.shape[1:])
    ends = numpy.cumsum(lengths)
    return [values[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def are_columns(data: Any) -> bool:
    """Whether data are a mapping of names to tensors and arrays. One by numbers holds samples."""
    return (
        isinstance(data, Mapping)
        and bool(data)
        and all(isinstance(name, str) and isinstance(column, Tensor | numpy.ndarray) for name, column in data.items())
    )


def as_dataset(data: Any) -> Any:
    """Return data that are given by column as a dataset of their rows, and any others as they are.

    Raises:
        ValueError: the columns aren't equally long.
    """
    if are_columns(data):
        return Columns(data)
    pyarrow = sys.modules.get("pyarrow")  # who has made a table has imported it
    return TableRows(data) if pyarrow is not None and isinstance(data, pyarrow.Table) else data


def sets_by_name(data: Any) -> Mapping[str, Any]:
    """Return the sets of data to evaluate, by name; one alone has the empty name."""
    data = as_dataset(data)
    return data if isinstance(data, Mapping) else {"": data}
