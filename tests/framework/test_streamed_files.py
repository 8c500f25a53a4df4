"""Safetensors files that are written in a stream and read in place: what safetensors itself writes and reads."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as draw
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stratagem.framework.checkpoint import CheckpointError, loading, staging, streaming
from stratagem.framework.checkpoint.directory import read_header
from stratagem.framework.checkpoint.dtypes import DTYPES
from stratagem.framework.checkpoint.loading import Reader, load_tensors
from stratagem.framework.checkpoint.shards import WHOLE, Part
from stratagem.framework.checkpoint.sharing import TensorFile, files_of, own_share
from stratagem.framework.checkpoint.staging import HostCopies
from stratagem.framework.checkpoint.streaming import form_of, write_file
from stratagem.framework.checkpoint.tensors import Header, Table, pieces_in
from stratagem.framework.checkpoint.writing import write_tensors
from torch import Tensor, nn

MANY = settings(
    max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SIZES = draw.lists(draw.integers(0, 9), max_size=4).map(tuple)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that tensors of a few numbers are cut in every place that they can be."""
    monkeypatch.setattr(streaming, "PIECE", 64)
    monkeypatch.setattr(streaming, "SMALL", 24)
    monkeypatch.setattr(staging, "BLOCK", 96)
    monkeypatch.setattr(loading, "BUFFER", 48)
    monkeypatch.setattr(loading, "SHORT", 16)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor of any bits at all, NaNs among them."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return (bits % 2).bool().view(shape) if dtype == torch.bool else bits.view(dtype).view(shape)


def bits_of(tensor: Tensor) -> bytes:
    plain = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return bytes(plain.view(torch.uint8).tolist())


@draw.composite
def tensors(draws: Any) -> Tensor:
    """A tensor of any dtype that lies in memory in one of the ways in which tensors do."""
    shape = draws(SIZES)
    tensor = random_bits(shape, draws(draw.sampled_from(list(DTYPES.values()))), draws(draw.integers(0, 99)))
    match draws(draw.sampled_from(["plain", "turned", "every second", "repeated", "parameter", "conjugate"])):
        case "turned":
            return tensor.permute([*reversed(range(tensor.ndim))])
        case "every second" if shape:
            return tensor[..., ::2]
        case "repeated":
            return tensor.unsqueeze(0).expand(3, *shape)
        case "parameter":
            return nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        case "conjugate" if tensor.is_complex():
            return tensor.conj()
    return tensor


@settings(MANY, max_examples=50)
@given(draw.lists(tensors(), max_size=7))
def test_a_file_is_what_safetensors_reads_and_its_hash_is_that_of_its_bytes(
    tmp_path: Path, found: list[Tensor]
) -> None:
    named = {f"layer.{number} \N{SNOWMAN}": tensor for number, tensor in enumerate(found)}
    parts = [Part(name, tensor.detach(), (0,) * tensor.ndim, WHOLE) for name, tensor in named.items()]
    for number, file in enumerate(files_of("model", own_share(((part, (0,)) for part in parts), 0, {}), 0)):
        path = tmp_path / f"{number}.safetensors"
        entry, _ = write_tensors(path, file)
        content = path.read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        with safe_open(path, framework="pt") as read:
            assert set(read.keys()) == set(named)
            for name, tensor in named.items():
                assert read.get_tensor(name).dtype == tensor.dtype and read.get_tensor(name).shape == tensor.shape
                assert bits_of(read.get_tensor(name)) == bits_of(tensor)
        copies = HostCopies()
        for _ in range(2):  # the second time into the memory of the first
            staged = copies.copy([file, file])
            for copy in staged:
                write_tensors(path, copy)
                assert path.read_bytes() == content


def test_one_copy_is_held_and_its_memory_is_used_again() -> None:
    tensor = torch.arange(1000)
    file = TensorFile("model/a", {"a": form_of(tensor)}, {"a": (0,)}, [tensor])
    copies = HostCopies()
    (first,) = copies.copy([file])
    places = {block.untyped_storage().data_ptr() for block in first.data}
    assert sum(block.nbytes for block in first.data) == tensor.nbytes
    tensor += 1
    (second,) = copies.copy([file])
    assert {block.untyped_storage().data_ptr() for block in second.data} == places
    assert torch.equal(torch.cat([*second.data]).view(torch.int64), tensor)


@draw.composite
def boxes(draws: Any) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """A shape, and a box in it that isn't empty."""
    shape = draws(draw.lists(draw.integers(1, 9), max_size=4).map(tuple))
    begins = [draws(draw.integers(0, size - 1)) for size in shape]
    return shape, tuple(
        slice(begin, draws(draw.integers(begin + 1, size))) for begin, size in zip(begins, shape, strict=True)
    )


@MANY
@given(boxes(), draw.sampled_from([torch.float32, torch.bfloat16, torch.int64]), draw.booleans(), draw.booleans())
def test_a_box_is_read_as_safetensors_reads_a_slice(
    tmp_path: Path, cut: tuple[tuple[int, ...], tuple[slice, ...]], dtype: torch.dtype, turned: bool, converted: bool
) -> None:
    shape, box = cut
    path = tmp_path / "file.safetensors"
    whole = torch.arange(math.prod(shape)).view(shape).to(dtype)
    save_file({"before": torch.ones(3), "whole": whole, "after": torch.ones(5)}, path)
    with safe_open(path, framework="pt") as file:
        expected = file.get_slice("whole")[box] if shape else file.get_tensor("whole")
    target = torch.zeros(expected.shape, dtype=torch.float64 if converted else dtype)
    if turned:
        dims = [*reversed(range(target.ndim))]
        target = target.permute(dims).contiguous().permute(dims)
    version = target._version
    with path.open("rb") as opened:
        header = Header(*read_header(opened), path.stat().st_size)
    piece = dict(pieces_in(path, header))["whole"]
    with Reader(path) as reader:
        reader.read(piece, tuple(each.start for each in box), target)
    assert torch.equal(target, expected.to(target.dtype))
    assert target._version > version  # as any change in place is known by


@settings(MANY, max_examples=60)
@given(boxes(), draw.data())
def test_tensors_cut_anyhow_are_read_whole(
    tmp_path: Path, cut: tuple[tuple[int, ...], tuple[slice, ...]], data: Any
) -> None:
    shape, _ = cut
    whole = torch.arange(math.prod(shape)).view(shape)
    edges = [sorted({0, size, *data.draw(draw.lists(draw.integers(0, size), max_size=2))}) for size in shape]
    headers = {}
    for number, box in enumerate(grid(edges)):
        piece = whole[tuple(slice(b, e) for b, e in box)]
        name = f"model/{number}.safetensors"
        (tmp_path / "model").mkdir(exist_ok=True)
        begin = tuple(b for b, _ in box)
        entry, text = write_tensors(tmp_path / name, TensorFile(name, {"w": form_of(piece)}, {"w": begin}, [piece]))
        headers[name] = Header(text, 8 + len(text) + -len(text) % 8, entry["bytes"])
    table = Table(tmp_path, headers)
    assert table.stored("model")["w"].shape == shape
    target = torch.zeros_like(whole)
    load_tensors(table, "model", {"w": target})
    assert torch.equal(target, whole)
    if len(headers) > 1:
        headers.pop(data.draw(draw.sampled_from(sorted(headers))))
        with pytest.raises(CheckpointError):
            load_tensors(Table(tmp_path, headers), "model", {"w": target})


def grid(edges: list[list[int]]) -> Iterator[tuple[tuple[int, int], ...]]:
    """The boxes between edges along each dimension."""
    if not edges:
        yield ()
        return
    for pair in zip(edges[0], edges[0][1:], strict=False):
        for rest in grid(edges[1:]):
            yield (pair, *rest)


@MANY
@given(draw.lists(draw.tuples(draw.integers(0, 5000), draw.sampled_from([(0, 1, 2), (0, 2), (1,)])), max_size=40))
def test_what_several_hold_is_written_once_and_shared_out_by_size(held: list[tuple[int, tuple[int, ...]]]) -> None:
    parts = [
        (Part(f"{number}", torch.empty(size, dtype=torch.uint8), (0,), WHOLE), holders)
        for number, (size, holders) in enumerate(held)
    ]
    shares = [own_share([(part, holders) for part, holders in parts if rank in holders], rank, {}) for rank in range(3)]
    written = sorted(part.name for share in shares for part in share)
    assert written == sorted(part.name for part, _ in parts)
    for holders in {holders for _, holders in parts}:
        names = {part.name for part, those in parts if those == holders}
        loads = [sum(p.tensor.nbytes + 8192 for p in shares[rank] if p.name in names) for rank in holders]
        of_first = sum(size + 8192 for size, those in held if those == holders and size < 1024)
        assert max(loads) - min(loads) <= max(of_first, 5000 + 8192)


def test_what_no_file_can_hold_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^odd can't be saved: it is a tensor of torch\.complex128"):
        streaming.check_is_storable("odd", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(CheckpointError, match=r"thin can't be saved: .* torch\.sparse_coo"):
        streaming.check_is_storable("thin", torch.eye(2).to_sparse())
    with pytest.raises(CheckpointError, match=r"nowhere/a\.safetensors can't be written: "):
        write_file(tmp_path / "nowhere" / "a.safetensors", {}, {}, [])
    write_file(tmp_path / "a.safetensors", {}, {"format": "pt"}, [])
    assert load_file(tmp_path / "a.safetensors") == {}
