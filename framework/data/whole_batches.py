"""Batches that are fetched whole, by one index, from data that lie in memory or in columns.

Made sample by sample, a batch takes a call of Python and a copy for each: 8 to 39 times one index of the whole. What is
fetched here whole is, value for value and type for type, what collating the samples would have given, and data of which
that isn't certain are fetched sample by sample.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, default_collate

from .columns import Columns, TableRows

DECLARED = "gives_batches"
"""The attribute by which a dataset says that its ``__getitems__`` returns a batch, and no list of samples: True."""

Fetch = Callable[[Any, "numpy.ndarray[Any, Any]"], Any]
"""A function of a dataset and indices to a batch."""

FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128
WHOLE_NUMBERS = torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64
UNSIGNED = torch.uint16, torch.uint32, torch.uint64
"""Types for which torch has ``tensor[indices]``, older ones not even that, and no ``index_select``, which is faster."""
TENSOR_TYPES = frozenset((*FLOATS, *WHOLE_NUMBERS, *(UNSIGNED if torch.__version__ >= "2.10" else ())))
ARRAY_TYPES = frozenset(torch.empty(0, dtype=kind).numpy().dtype for kind in TENSOR_TYPES - {torch.bfloat16})


class WholeBatches(Dataset):
    """A dataset as a loader asks it for whole batches.

    Args:
        dataset: the user's.
        fetch: see ``fetch_of``.
    """

    def __init__(self, dataset: Any, fetch: Fetch) -> None:
        self.dataset, self.fetch = dataset, fetch

    def __getitems__(self, indices: Any) -> Any:
        """Return the batch of some samples, which needs no collation."""
        return self.fetch(self.dataset, numpy.asarray(indices))


def as_it_is(batch: Any) -> Any:
    """Collate what is a batch already."""
    return batch


def declares(dataset: Any, attribute: str, method: str, does: str, without: str = "") -> bool:
    """Whether a dataset says by an attribute that it has a method of ours to call.

    Args:
        dataset: the user's.
        attribute: True where it says so.
        method: as it is called: "shard(num_shards, index)".
        does: what the method does.
        without: what happens without the attribute.

    Raises:
        TypeError: it says so, and has no such method.
    """
    says = getattr(dataset, attribute, False) is True
    if says and not callable(getattr(dataset, method.partition("(")[0], None)):
        raise TypeError(
            f"{type(dataset).__name__}.{attribute} is True, and there is no method {method} that would {does}. Write "
            f"one, or leave {attribute} out{f': {without}' if without else ''}."
        )
    return says


def gives_batches(dataset: Any) -> bool:
    """Whether a dataset says that its ``__getitems__`` returns a batch.

    Raises:
        TypeError: it says so, and has none.
    """
    return declares(dataset, DECLARED, "__getitems__(indices)", "return a batch")


def fetch_of(dataset: Any) -> Fetch | None:
    """Return what fetches a batch of a dataset at once; None where it is to be collated of samples.

    Raises:
        TypeError: see ``gives_batches``.
    """
    kind = type(dataset)
    if isinstance(dataset, IterableDataset):
        return None
    if gives_batches(dataset):
        return fetch_ready
    if kind is Subset:
        return None if fetch_of(dataset.dataset) is None else fetch_from_subset
    if isinstance(dataset, TensorDataset):
        is_plain = kind.__getitem__ is TensorDataset.__getitem__ and not hasattr(dataset, "__getitems__")
        return fetch_tensors if is_plain and all(map(is_indexed, dataset.tensors)) else None
    if kind is Columns:
        return fetch_columns if all(map(is_indexed, dataset.columns.values())) else None
    if kind is TableRows:
        return fetch_from_table
    if is_indexed(dataset):
        return index
    datasets = sys.modules.get("datasets")  # who has made such a dataset has imported it
    if datasets is not None and isinstance(dataset, datasets.Dataset):
        plain = datasets.Dataset
        is_plain = kind.__getitem__ is plain.__getitem__ and kind.__getitems__ is plain.__getitems__
        return fetch_from_datasets if is_plain else None
    return None


def is_indexed(values: Any) -> bool:
    """Whether one index of a tensor or an array gives what collating its entries would."""
    if type(values) is Tensor:
        is_plain = values.layout is torch.strided and not (values.is_quantized or values.is_nested)
        return is_plain and values.ndim > 0 and values.dtype in TENSOR_TYPES
    if type(values) is numpy.ndarray or type(values) is numpy.memmap:
        # torch makes no tensor of a list of numpy's uint64.
        return values.ndim > 0 and values.dtype in ARRAY_TYPES and not (values.ndim == 1 and values.dtype == "uint64")
    return False


def index(values: Any, indices: "numpy.ndarray[Any, Any]") -> Tensor:
    """Return some entries of a tensor or an array as one tensor, in memory of its own."""
    if isinstance(values, Tensor):
        places = torch.from_numpy(indices)
        if values.device.type == "cpu" and values.dtype not in UNSIGNED:
            return values.index_select(0, places)
        return values[places]
    plain = values.view(numpy.ndarray)
    # numpy's take, the faster one, would first copy all of an array that isn't contiguous.
    takes = plain.flags.c_contiguous and plain.flags.aligned
    return torch.from_numpy(plain.take(indices, axis=0) if takes else plain[indices])


def fetch_tensors(dataset: Any, indices: "numpy.ndarray[Any, Any]") -> tuple[Tensor, ...]:
    """Fetch a batch of a TensorDataset."""
    return tuple(index(tensor, indices) for tensor in dataset.tensors)


def fetch_columns(dataset: Columns, indices: "numpy.ndarray[Any, Any]") -> dict[str, Tensor]:
    """Fetch a batch of columns."""
    return {name: index(column, indices) for name, column in dataset.columns.items()}


def fetch_ready(dataset: Any, indices: "numpy.ndarray[Any, Any]") -> Any:
    """Fetch a batch of a dataset that makes its batches."""
    return dataset.__getitems__(indices.tolist())


def fetch_from_subset(dataset: Any, indices: "numpy.ndarray[Any, Any]") -> Any:
    """Fetch a batch of a Subset, as ``random_split`` makes them."""
    whole = dataset.dataset
    fetch = fetch_of(whole)
    assert fetch is not None
    return fetch(whole, numpy.asarray([dataset.indices[place] for place in indices.tolist()]))


def fetch_from_table(dataset: TableRows, indices: "numpy.ndarray[Any, Any]") -> dict[str, Any]:
    """Fetch a batch of a table of pyarrow's."""
    others, views = dataset.take_others(indices), dataset.views
    return {
        name: index(views[name], indices) if name in views else collate_column(others[name])
        for name in dataset.column_names
    }


def fetch_from_datasets(dataset: Any, indices: "numpy.ndarray[Any, Any]") -> Any:
    """Fetch a batch of a ``datasets.Dataset``, whose own ``__getitems__`` cuts the same columns into samples."""
    return collate_columns(dataset[indices.tolist()])


def collate_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Collate the values of each column, as ``default_collate`` does of samples that are mappings."""
    return {name: collate_column(values) for name, values in columns.items()}


def collate_column(values: Any) -> Any:
    """Collate the values of one column: a tensor or an array with an entry for each sample, or a list of them."""
    if is_indexed(values):
        return values if isinstance(values, Tensor) else torch.from_numpy(numpy.array(values))
    return default_collate(list(values))
