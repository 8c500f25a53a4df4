"""Parts of tensors in safetensors files: any part of any tensor is what indexing the whole would give, and a file that
was altered is refused.
"""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from stratagem.framework.pretrained import stored
from stratagem.framework.pretrained.directory import stored_tensors
from stratagem.framework.pretrained.sources import Joined, Piece, Stacked
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn]
in_one_directory = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def tensor_and_part(draw: st.DrawFn, least: int = 0) -> tuple[Tensor, tuple[slice, ...]]:
    """A tensor of up to four dimensions, and a part of it, which may be empty."""
    shape = draw(st.lists(st.integers(0, 6), min_size=least, max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    numbers = torch.arange(math.prod(shape) * dtype.itemsize, dtype=torch.int64) % (2 if dtype is torch.bool else 200)
    part = []
    for size in shape:
        begin = draw(st.integers(0, size))
        part.append(slice(begin, draw(st.integers(begin, size))))
    return numbers.to(torch.uint8).view(dtype).reshape(shape), tuple(part)


def bits(tensor: Tensor) -> list[Any]:
    return [tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).tolist()]


def written(directory: Path, tensors: list[Tensor]) -> list[stored.StoredTensor]:
    """The tensors as they lie in a file, one after another."""
    save_file(
        {f"t{number}": tensor.contiguous() for number, tensor in enumerate(tensors)}, directory / "model.safetensors"
    )
    found = stored_tensors(directory)
    return [found[f"t{number}"] for number in range(len(tensors))]


@in_one_directory
@given(tensor_and_part(), st.sampled_from([1, 4096]), st.sampled_from([1, 40, 1 << 20]))
def test_any_part_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Any, short_run: int, block: int
) -> None:
    whole, part = case
    monkeypatch.setattr(stored, "SHORT_RUN", short_run)  # both ways of reading: run by run, and whole rows
    monkeypatch.setattr(stored, "BLOCK", block)
    (found,) = written(tmp_path, [whole])
    assert found.shape == whole.shape
    assert bits(found.read(part)) == bits(whole[part] if part else whole)


@in_one_directory
@given(tensor_and_part(least=2), st.data())
def test_parts_of_what_is_put_together_and_cut(tmp_path: Path, case: Any, data: st.DataObject) -> None:
    whole, part = case
    d = data.draw(st.integers(1, whole.ndim - 1), label="dimension")
    members = written(tmp_path, [member.clone() for member in whole])
    if members:
        assert bits(Stacked(tuple(members)).read(part)) == bits(whole[part])
    cuts = sorted(data.draw(st.lists(st.integers(0, whole.shape[d]), max_size=2), label="cuts"))
    pieces = written(tmp_path, list(whole.tensor_split(cuts, dim=d)))
    joined = Joined(tuple(pieces), d)
    assert joined.shape == whole.shape
    assert bits(joined.read(part)) == bits(whole[part])
    count = data.draw(st.integers(1, 4), label="count")
    (fused,) = written(tmp_path, [whole])
    for number, chunk in enumerate(whole.chunk(count, dim=d) if whole.shape[d] else ()):
        piece = Piece(fused, d, number, count)
        assert piece.shape == chunk.shape
        own = tuple(slice(min(s.start, size), min(s.stop, size)) for s, size in zip(part, chunk.shape, strict=True))
        assert bits(piece.read(own)) == bits(chunk[own])


@in_one_directory
@given(st.data())
def test_an_altered_file_is_refused_or_read_within_its_bounds(tmp_path: Path, data: st.DataObject) -> None:
    (found,) = written(tmp_path, [torch.ones(3, 4)])
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, found.begin - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        tensors = stored_tensors(tmp_path)
    except ValueError as error:
        assert str(file) in str(error)
        return
    for tensor in tensors.values():
        assert tensor.begin + math.prod(tensor.shape) * tensor.dtype.itemsize <= file.stat().st_size
        tensor.read(tuple(slice(0, size) for size in tensor.shape))


def test_a_part_is_read_without_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are one read; columns that are wide enough one read a row; narrow ones need whole rows."""
    (found,) = written(tmp_path, [torch.randn(64, 4096)])
    reads: list[int] = []
    preadv = os.preadv

    def counted(file: int, into: Any, offset: int) -> int:
        reads.append(len(into[0]))
        return preadv(file, into, offset)

    monkeypatch.setattr(os, "preadv", counted)
    for part, expected in [
        ((slice(16, 32), slice(0, 4096)), [16 * 4096 * 4]),
        ((slice(0, 64), slice(2048, 4096)), [2048 * 4] * 64),
        ((slice(0, 64), slice(0, 16)), [64 * 4096 * 4]),
    ]:
        reads.clear()
        found.read(part)
        assert reads == expected
