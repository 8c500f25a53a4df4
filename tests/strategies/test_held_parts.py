"""The parts of a tensor that a rank holds, against torch's own cutting, in worlds that exist on paper alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from stratagem.strategies.held_parts import cut_like, held_parts, local_shape, parts_of
from stratagem.strategies.mesh import clear_tensor_caches
from stratagem.strategies.process_group import leave
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def world(shape: tuple[int, ...], rank: int) -> Iterator[Any]:
    """This process as one rank of a mesh whose others don't exist: what it sends goes nowhere."""
    leave()  # of a Fit that an earlier test made in this process
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=prod(shape))
    try:
        yield init_device_mesh("cpu", shape, mesh_dim_names=tuple(f"dim{i}" for i in range(len(shape))))
    finally:
        clear_tensor_caches()  # they would hand out this mesh, with this rank's place in it
        dist.destroy_process_group()


def check(tensor: DTensor, whole: Tensor) -> None:
    """The parts, laid where they say, are the shard that torch made."""
    parts = held_parts(tensor)
    assert local_shape(parts) == tuple(tensor.to_local().shape)
    local = torch.full(local_shape(parts), -1.0)
    for part in parts:
        local[part.local] = whole[part.whole]
    assert torch.equal(local, tensor.to_local())
    assert torch.equal(cut_like(whole, tensor), tensor.to_local())


@st.composite
def cuttings(draw: st.DrawFn) -> tuple[tuple[int, ...], int, tuple[int, ...], list[Any]]:
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    rank = draw(st.integers(0, prod(mesh) - 1))
    shape = tuple(draw(st.lists(st.integers(0, 13), min_size=1, max_size=3)))
    one = st.one_of(st.just(Replicate()), st.builds(Shard, st.integers(0, len(shape) - 1)))
    return mesh, rank, shape, [draw(one) for _ in mesh]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(cuttings())
def test_parts_are_what_distribute_tensor_cuts(cutting: Any) -> None:
    mesh_shape, rank, shape, placements = cutting
    whole = torch.arange(float(prod(shape))).reshape(shape)
    with world(mesh_shape, rank) as mesh:
        check(distribute_tensor(whole, mesh, placements, src_data_rank=None), whole)


class Two(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(columns, rows), nn.Linear(rows, columns)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.booleans(), st.data())
def test_parts_are_what_fully_shard_cuts(
    shards: int, tensor: int, rows: int, columns: int, replicated: bool, data: st.DataObject
) -> None:
    """Strided shards: tensor parallelism cuts rows, and FSDP each rank's rows again, evenly or not."""
    shape = (2, shards, tensor) if replicated else (shards, tensor)
    rank = data.draw(st.integers(0, prod(shape) - 1))
    module = Two(rows * tensor, columns)
    whole = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    with world(shape, rank) as mesh:
        names = mesh.mesh_dim_names
        cut_by = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(module, mesh[names[-1]], cut_by, src_data_rank=None)
        fully_shard(module, mesh=mesh[names[:-1]] if replicated else mesh[names[0]])
        for name, parameter in module.named_parameters():
            check(parameter, whole[name])


def test_a_strided_shard_may_be_several_parts() -> None:
    from torch.distributed.tensor.placement_types import _StridedShard

    strided = _StridedShard(0, split_factor=2)
    found = [part.whole[0] for part in parts_of((8, 3), (2, 2), (1, 0), [strided, Replicate()])]
    assert found == [slice(2, 4), slice(6, 8)]
    assert [part.whole[0] for part in parts_of((8, 3), (2, 2), (1, 0), [strided, Shard(0)])] == [slice(2, 4)]


@pytest.mark.parametrize("tensor", [torch.zeros(()), torch.zeros(3, 4), torch.zeros(0, 2)])
def test_a_plain_tensor_is_one_part(tensor: Tensor) -> None:
    (part,) = held_parts(tensor)
    assert part.whole == part.local == tuple(slice(0, size) for size in tensor.shape)
