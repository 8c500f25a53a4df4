"""Batches that are fetched by one index: what collating the samples gives, to the bit, with a call for each batch."""

import pickle
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stratagem import Fit, FitArguments
from stratagem.framework.data import DataStream, make_stream
from stratagem.framework.data.collating import collate
from stratagem.framework.data.columns import Columns, TableRows
from stratagem.framework.data.whole_batches import TENSOR_TYPES, fetch_of
from stratagem.strategies import Strategy
from tiny import MakeFit, Regressor, parameters_of, regression_rows
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

ROWS = 7
ARRAY_TYPES = [*"?bhilBHILefdFD", ">f4", "U3", "O", "M8[s]"]
SHAPES = [(), (3,), (2, 1, 2), (0,)]


def stream_of(data: Any, training: bool = True, **arguments: Any) -> DataStream:
    strategy = Strategy()
    strategy.data_rank, strategy.data_size = 0, 1
    return make_stream(data, FitArguments(**arguments), strategy, training=training)


def same(one: Any, other: Any) -> None:
    """Types, dtypes, order of keys, shapes and bits are the same."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape and one.requires_grad == other.requires_grad
        assert (
            one.resolve_conj()
            .detach()
            .contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .equal(other.resolve_conj().detach().contiguous().reshape(-1).view(torch.uint8))
        )
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            same(one[name], other[name])
    elif isinstance(one, tuple | list):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            same(mine, theirs)
    else:
        assert one == other


def fetched_and_collated(dataset: Any, indices: list[int]) -> tuple[Any, Any]:
    """A batch as it is fetched whole, and as it is made of samples; the exception's type where there is none."""
    fetch = fetch_of(dataset)
    both = []
    for make in (
        lambda: fetch(dataset, numpy.array(indices)) if fetch else collate([dataset[i] for i in indices]),
        lambda: collate([dataset[i] for i in indices]),
    ):
        try:
            both.append(make())
        except Exception as error:
            both.append(type(error))
    return both[0], both[1]


def bits(draw: Any, count: int) -> bytes:
    return draw(st.binary(min_size=count, max_size=count))


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    """Tensors of any bits, of every dtype; also ones that are views, transposed, or want gradients."""
    shape = (ROWS, *draw(st.sampled_from(SHAPES)))
    dtype = draw(st.sampled_from([*sorted(TENSOR_TYPES, key=str), torch.float8_e5m2, torch.complex32]))
    size = torch.empty(0, dtype=dtype).element_size()
    count = int(numpy.prod(shape))
    if dtype is torch.bool:
        tensor = torch.tensor([bool(byte & 1) for byte in bits(draw, count)], dtype=dtype).reshape(shape)
    else:
        raw = numpy.frombuffer(bits(draw, max(1, count) * size), dtype=numpy.uint8).copy()
        tensor = torch.from_numpy(raw).view(dtype)[:count].reshape(shape)
    form = draw(st.sampled_from(["plain", "strided", "transposed", "conjugate", "grad"]))
    if form == "strided":
        tensor = torch.cat([tensor.view(torch.uint8) if tensor.ndim > 1 and tensor.numel() else tensor] * 2)[::2]
        tensor = tensor.view(dtype)
    elif form == "transposed" and tensor.ndim > 1:
        tensor = tensor.transpose(1, -1)
    elif form == "conjugate" and dtype is torch.complex64:
        tensor = tensor.conj()
    elif form == "grad" and dtype in (torch.float32, torch.complex64):
        tensor.requires_grad_()
    return tensor


@st.composite
def arrays(draw: Any) -> Any:
    """Arrays of every kind that torch takes, and of some that it doesn't."""
    shape = (ROWS, *draw(st.sampled_from(SHAPES)))
    array = numpy.array(draw(st.lists(st.integers(0, 250), min_size=ROWS * 4, max_size=ROWS * 4)))
    array = numpy.resize(array, shape).astype(draw(st.sampled_from(ARRAY_TYPES)))
    form = draw(st.sampled_from(["plain", "reversed", "fortran", "sliced", "frozen"]))
    if form == "reversed":
        return array[::-1]
    if form == "fortran":
        return numpy.asfortranarray(array)
    if form == "sliced" and array.ndim > 1:
        return array[:, :1]
    array.flags.writeable = form != "frozen"
    return array


indices = st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=9)


@settings(max_examples=200, deadline=None)
@given(columns=st.lists(tensors(), min_size=1, max_size=3), indices=indices, wraps=st.integers(0, 2))
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_tensor_dataset_and_its_subsets(columns: list[torch.Tensor], indices: list[int], wraps: int) -> None:
    dataset: Any = TensorDataset(*columns)
    for _ in range(wraps):
        dataset = Subset(dataset, [6, 5, 4, 3, 2, 1, 0])
    same(*fetched_and_collated(dataset, indices))


@settings(max_examples=250, deadline=None)
@given(columns=st.lists(tensors() | arrays(), min_size=1, max_size=3), indices=indices, alone=st.booleans())
@pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:The given NumPy array is not writable")
def test_columns_and_arrays(columns: list[Any], indices: list[int], alone: bool) -> None:
    dataset = columns[0] if alone else Columns({f"column {i}": column for i, column in enumerate(columns)})
    same(*fetched_and_collated(dataset, indices))


VALUES: dict[Any, Any] = {
    pyarrow.int8(): st.integers(-100, 100), pyarrow.uint16(): st.integers(0, 60000), pyarrow.int64(): st.integers(0, 9),
    pyarrow.float32(): st.floats(width=32), pyarrow.float64(): st.floats(), pyarrow.bool_(): st.booleans(),
    pyarrow.string(): st.text(max_size=3), pyarrow.list_(pyarrow.float32()): st.lists(st.floats(width=32), max_size=2),
    pyarrow.list_(pyarrow.int32(), 2): st.lists(st.integers(0, 9), min_size=2, max_size=2),
    pyarrow.list_(pyarrow.list_(pyarrow.int8())): st.lists(st.just([1, 2]), min_size=1, max_size=2),
    pyarrow.struct({"a": pyarrow.int32()}): st.fixed_dictionaries({"a": st.integers(0, 9)}),
    pyarrow.date32(): st.dates(),
}  # fmt: skip


@st.composite
def tables(draw: Any) -> pyarrow.Table:
    """Tables of some columns, in one piece or in two."""
    kinds = draw(st.lists(st.sampled_from(list(VALUES)), min_size=1, max_size=3))
    columns = {
        f"c{i}": pyarrow.array(draw(st.lists(VALUES[kind], min_size=ROWS, max_size=ROWS)), kind)
        for i, kind in enumerate(kinds)
    }
    table = pyarrow.table(columns)
    return pyarrow.concat_tables([table.slice(2, 5), table.slice(0, 2)]) if draw(st.booleans()) else table


@settings(max_examples=80, deadline=None)
@given(table=tables(), indices=indices)
def test_a_table_of_arrow(table: pyarrow.Table, indices: list[int]) -> None:
    rows = TableRows(table)
    same(*fetched_and_collated(rows, indices))
    for mine, theirs in zip(rows.__getitems__(indices), [rows[i] for i in indices], strict=True):
        assert list(mine) == list(theirs) and str(mine) == str(theirs)
    for name, column in zip(table.column_names, table.columns, strict=True):  # and the values are the table's
        if pyarrow.types.is_integer(column.type):
            assert [int(rows[i][name]) for i in range(ROWS)] == column.to_pylist()


def test_numbers_of_a_table_are_indexed_where_they_lie_and_sent_to_workers_once() -> None:
    numbers = numpy.arange(6000, dtype=numpy.float32)
    lists = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(numbers), 3)
    rows = TableRows(pyarrow.table({"x": lists.slice(500, 1500), "y": pyarrow.array(numbers[:1500])}))
    assert sorted(rows.views) == ["x", "y"] and rows.views["y"].base is not None
    assert rows.views["x"][7].tolist() == [1521.0, 1522.0, 1523.0]
    assert len(pickle.dumps(rows)) < len(pickle.dumps(rows.table)) + 200
    same(fetch_of(rows)(rows, numpy.array([3, 1])), collate([pickle.loads(pickle.dumps(rows))[i] for i in (3, 1)]))  # type: ignore[misc]


@settings(max_examples=60, deadline=None)
@given(table=tables(), indices=indices, form=st.sampled_from([None, "torch", "numpy"]))
def test_a_dataset_of_datasets(table: pyarrow.Table, indices: list[int], form: str | None) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset(table).with_format(form)
    fetch = fetch_of(dataset)
    assert fetch is not None
    both = []
    for make in (lambda: fetch(dataset, numpy.array(indices)), lambda: collate(dataset.__getitems__(indices))):
        try:
            both.append(make())
        except Exception as error:
            both.append(type(error))
    same(*both)


def test_what_reads_its_samples_by_itself_is_asked_for_samples() -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            return super().__getitem__(index)

    class Named(TensorDataset):
        pass

    x = torch.arange(6.0)
    assert fetch_of(Noisy(x)) is None and fetch_of(Subset(Noisy(x), [0])) is None
    assert fetch_of(Named(x)) is not None
    for column in (torch.nn.Parameter(x), x.to_sparse(), numpy.ma.masked_array(x.numpy())):
        assert fetch_of(column) is None
    datasets = pytest.importorskip("datasets")
    assert fetch_of(type("Own", (datasets.Dataset,), {"__getitems__": list})(pyarrow.table({"a": [1]}))) is None


# A call for each batch.


class Batches(Dataset):
    """A dataset that makes its batches, and counts what it is asked for."""

    gives_batches = True

    def __init__(self) -> None:
        self.x = torch.arange(20.0)
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        return {"x": self.x[index]}

    def __getitems__(self, indices: list[int]) -> Any:
        self.asked.append(indices)
        return {"x": self.x[indices], "of": len(indices)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_that_gives_batches_is_asked_once_for_each(workers: int) -> None:
    data = Batches()
    arguments: dict[str, Any] = {"per_device_train_batch_size": 8, "dataloader_num_workers": workers, "shuffle": False}
    batches = list(stream_of(data, **arguments).epoch(0))
    assert [batch["of"] for batch in batches] == [8, 8, 4]
    assert torch.cat([batch["x"] for batch in batches]).equal(data.x)
    if not workers:
        assert data.asked == [list(range(8)), list(range(8, 16)), list(range(16, 20))]
    plain = list(stream_of(DataLoader(data, batch_size=8)).epoch(0))
    assert [batch["of"] for batch in plain] == [8, 8, 4]


def test_without_the_word_a_getitems_gives_samples() -> None:
    class Samples(Batches):
        gives_batches = False

        def __getitems__(self, indices: list[int]) -> Any:
            self.asked.append(indices)
            return [self[index] for index in indices]

    data = Samples()
    first, *rest = stream_of(data, per_device_train_batch_size=8, shuffle=False).epoch(0)
    assert list(first) == ["x"] and first["x"].equal(data.x[:8]) and len(data.asked) == 1 + len(rest) == 3


def test_saying_that_batches_are_given_needs_what_gives_them() -> None:
    class Empty(Dataset):
        gives_batches = True

        def __len__(self) -> int:
            return 1

    with pytest.raises(TypeError, match=r"Empty\.gives_batches is True, and there is no method __getitems__"):
        stream_of(Empty())
    with pytest.raises(ValueError, match=r"data_collator=<class 'list'> makes a batch of samples, and Batches\.gives"):
        Fit(Regressor(), Batches(), max_steps=1, data_collator=list)


def test_a_batch_of_a_memory_map_has_memory_of_its_own(tmp_path: Path) -> None:
    tokens = numpy.memmap(tmp_path / "tokens", dtype=numpy.uint16, mode="w+", shape=(20, 5))
    tokens[:] = numpy.arange(100).reshape(20, 5)
    for data in (tokens, {"tokens": tokens}):
        for shuffle in (True, False):
            for batch in stream_of(data, shuffle=shuffle).epoch(0):
                (batch if data is tokens else batch["tokens"]).view(torch.int16).zero_()
    assert tokens.sum() == 4950


# In a run.


def columns_of(rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize(("form", "workers"), [("columns", 0), ("arrays", 2), ("table", 0)])
def test_a_run_on_columns_is_that_on_rows(make_fit: MakeFit, form: str, workers: int) -> None:
    rows = regression_rows(30)
    columns = columns_of(rows)
    data: Any = columns
    if form == "arrays":
        data = {name: column.numpy() for name, column in columns.items()}
    elif form == "table":
        data = pyarrow.table({name: list(column.numpy()) for name, column in columns.items()})
    arguments: dict[str, Any] = {
        "max_steps": 9, "per_device_train_batch_size": 4, "shuffle": True, "dataloader_num_workers": workers,
    }  # fmt: skip
    results = []
    for form_of in (rows, data):
        torch.manual_seed(0)
        fit = make_fit(Regressor(), form_of, eval_data=form_of, **arguments)
        fit.train()
        predictions = fit.predict(form_of).predictions
        results.append((parameters_of(fit.module), fit.evaluate(), fit.evaluate({"part": form_of}), predictions))
    for name, value in results[0][0].items():
        assert value.equal(results[1][0][name])
    assert results[0][1] == results[1][1] and results[0][2] == results[1][2]
    assert list(results[1][2]) == ["eval_part_loss"]
    assert results[0][3].equal(results[1][3])
    assert "one sample" in str(fit.summary())


def test_columns_of_other_lengths_are_refused(make_fit: MakeFit) -> None:
    wrong = {"x": torch.zeros(3, 3), "y": torch.zeros(4, 1)}
    with pytest.raises(ValueError, match=r"one set of data by column, and these have lengths \{'x': 3, 'y': 4\}"):
        make_fit(Regressor(), wrong)
    with pytest.raises(ValueError, match=r"for several sets by name, give each as a dataset"):
        make_fit(Regressor(), regression_rows(4), eval_data=wrong)


def test_a_missing_value_names_its_column() -> None:
    table = pyarrow.table({"x": [1.0, None]})
    with pytest.raises(ValueError, match=r"The column 'x' of the table has missing values"):
        list(stream_of(table).epoch(0))


def test_a_mapping_by_numbers_holds_samples() -> None:
    data = {0: torch.zeros(3), 1: torch.ones(3)}
    (batch,) = stream_of(data, shuffle=False).epoch(0)
    assert batch.equal(torch.stack([torch.zeros(3), torch.ones(3)]))
