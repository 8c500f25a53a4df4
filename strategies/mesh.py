"""The mesh that ranks are arranged on: its dimensions, one object for each shape, and what must forget it again."""

import gc
from functools import cache
from types import FunctionType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

# Mesh dimensions, outermost first. Neighbours in the last one are neighbours in rank, on one node's fast links.
REPLICATE, SHARD, CONTEXT, TENSOR = "replicate", "shard", "context", "tensor"

CACHE = type(cache(lambda: None))
LAST_SHAPE: list[tuple[tuple[str, int], ...]] = []  # the shape of the mesh that was set up last in this process


@cache
def mesh_for(world: dist.ProcessGroup | None, device_type: str, shape: tuple[tuple[str, int], ...]) -> DeviceMesh:
    """The mesh of that shape, one in the world's life: each dimension is a process group with threads and connections
    of its own, which a second Fit in the same process needn't make again.

    Args:
        world: the group of all ranks, which tells one life from the next.
        device_type: of the ranks' devices.
        shape: the dimensions' names and sizes, outermost first.
    """
    names, sizes = zip(*shape, strict=True)
    return init_device_mesh(device_type, sizes, mesh_dim_names=names)


@cache
def submesh(mesh: DeviceMesh, *names: str) -> DeviceMesh:
    """Dimensions of a mesh of ``mesh_for``, one object in the world's life. DTensor's caches hand out the first of
    those that are equal, and a graph that is compiled with one mesh in its parameters and another in its results fails.
    """
    return mesh[names]


def forget_other_meshes(shape: tuple[tuple[str, int], ...]) -> None:
    """Where the last run's mesh had another shape, empty DTensor's caches: a part of it may be equal to one of this
    mesh, and has process groups of its own.
    """
    if LAST_SHAPE and [shape] != LAST_SHAPE:
        clear_tensor_caches()
    LAST_SHAPE[:] = [shape]


def clear_tensor_caches() -> None:
    """Empty DTensor's caches, which hold meshes and hand them out where an equal one is asked for."""
    clear_native_cache = getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", None)
    if clear_native_cache is not None:
        clear_native_cache()
    for thing in gc.get_objects():
        if type(thing) is CACHE and (getattr(thing, "__module__", None) or "").startswith("torch.distributed.tensor"):
            thing.cache_clear()


def forget_meshes() -> None:
    """Have ``mesh_for`` and ``submesh`` make every mesh anew, as the process group of theirs is left."""
    mesh_for.cache_clear()
    submesh.cache_clear()


def forget_groups() -> None:
    """Take the process groups out of all meshes and default arguments, and the meshes out of DTensor's caches.

    gloo closes a group's connections when the last reference to it goes, and a rank that waits for this one is woken by
    nothing else. The caches would also find an equal mesh of another world, whose groups are gone.
    """
    forget_meshes()
    clear_tensor_caches()
    gc.collect()
    for thing in gc.get_objects():
        if type(thing) is DeviceMesh:
            getattr(thing, "_pg_registry", {}).clear()
        elif type(thing) is FunctionType and any(type(v) is dist.ProcessGroup for v in thing.__defaults__ or ()):
            # torch.distributed.nn has group=group.WORLD: a group, where it is imported after the world was joined.
            thing.__defaults__ = tuple(None if type(v) is dist.ProcessGroup else v for v in thing.__defaults__ or ())


def split_world(world_size: int, strategy: str, **degrees: int) -> int:
    """Divide the number of ranks by the product of some degrees.

    Raises:
        ValueError: they don't; the message names the world sizes and degrees that work.
    """
    product = 1
    for name, degree in degrees.items():
        if degree < 1:
            raise ValueError(f"{strategy}({name}={degree}): a degree counts ranks and must be at least 1.")
        product *= degree
    if world_size % product:
        asked = " x ".join(f"{name}={degree}" for name, degree in degrees.items() if degree > 1)
        works = [d for d in range(1, world_size + 1) if world_size % d == 0]
        raise ValueError(
            f"{strategy} can't cut {world_size} ranks by {asked} (a product of {product}). The product must divide the "
            f"number of ranks: with {world_size} ranks it may be {', '.join(map(str, works))}; with these degrees, "
            f"start {product}, {2 * product} or another multiple of {product} ranks."
        )
    return world_size // product


def whole_of(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be spread over a mesh. Collective over that mesh."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """The mesh a parameter is spread over; None for a plain tensor."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None
