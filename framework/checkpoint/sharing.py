"""Which rank writes which tensors of a checkpoint: each its shards, and what several hold is shared out by size.

Every rank works out its own share, since it knows which ranks hold what it holds. What they exchange for that is one
digest of the names and forms, and each rank's place in the meshes: nothing that grows with the number of tensors.
"""

import hashlib
import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...strategies.base import Strategy
from ..agreement import on_all_ranks
from .directory import CheckpointError
from .shards import WHOLE, Coordinates, Part, Parts
from .streaming import Form, check_is_storable, form_of

FILE_BYTES = 1 << 30  # ranks that compare a checkpoint with its manifest share the files, which may be of one rank
FILE_TENSORS = 100_000  # a header may have 100 MB
SMALL = 1 << 10  # bytes of a tensor, below
TENSOR_COST = 1 << 13  # bytes that could be written in the time that goes into a tensor of any size

Loads = dict[tuple[int, ...], list[tuple[int, int]]]


@dataclass(frozen=True)
class TensorFile:
    """A file that this rank is to write.

    Attributes:
        name: in the checkpoint, "model/shard-00001-model-00001-of-00001.safetensors".
        forms: tensor name to dtype and shape of what is in this file, in the order in which they lie there.
        begins: where each lies in its whole tensor.
        data: the tensors in that order, or their bytes, in any number of tensors.
    """

    name: str
    forms: Mapping[str, Form]
    begins: Mapping[str, tuple[int, ...]]
    data: Sequence[Tensor]


def share_out(
    folders: Mapping[str, Mapping[str, Tensor]], strategy: Strategy, group: Any = None, kind: str = "model"
) -> list[TensorFile]:
    """Find the files that this rank writes. Collective.

    Args:
        folders: folder to tensors by name; the same names in the same order on every rank, but for folders of which
            one rank may have more.
        strategy: its ranks write together.
        group: the process group to use, where this isn't called in the thread that trains.
        kind: a word in the names of the files.

    Raises:
        CheckpointError: on every rank; a tensor is of a dtype or layout that no file can hold.
    """
    held: dict[str, list[Part]] = {}

    @torch.no_grad()
    def describe() -> list[tuple[str, dict[str, Coordinates]]]:
        found = []
        for folder, tensors in folders.items():
            parts, digest = Parts(), hashlib.sha256()
            held[folder] = [parts.of(name, tensor) for name, tensor in tensors.items()]
            for part, tensor in zip(held[folder], tensors.values(), strict=True):
                check_is_storable(part.name, part.tensor)
                digest.update(f"{part.name}\0{tensor.dtype} {tensor.shape} {part.kind}\n".encode())
            found.append((digest.hexdigest(), parts.coordinates))
        return found

    everyones = on_all_ranks(strategy, describe, CheckpointError, group)
    files, loads = [], Loads()
    for number, folder in enumerate(folders):
        digests, places = zip(*(found[number] for found in everyones), strict=True)
        if len(set(digests)) == 1:
            mine = own_share(with_holders(held[folder], places, strategy.rank), strategy.rank, loads)
        else:
            names = strategy.gather([(part.name, part.begin) for part in held[folder]], group)
            mine = own_share(with_named_holders(held[folder], names), strategy.rank, {})
        files += files_of(folder, mine, strategy.rank, kind)
    return files


def with_holders(
    parts: Iterable[Part], places: Sequence[Mapping[str, Coordinates]], rank: int
) -> Iterable[tuple[Part, tuple[int, ...]]]:
    """Pair this rank's parts with the ranks that hold the same, where all ranks have the same tensors."""
    holders: dict[str, tuple[int, ...]] = {}
    for kind, own in places[rank].items():
        alike = (other for other, place in enumerate(places) if place[kind] == own)
        holders[kind] = () if own is None else tuple(alike)
    return ((part, holders[part.kind]) for part in parts)


def with_named_holders(
    parts: Sequence[Part], names: Sequence[Sequence[tuple[str, tuple[int, ...]]]]
) -> Iterable[tuple[Part, tuple[int, ...]]]:
    """Pair this rank's parts with the ranks that hold the same, by what each rank says that it holds."""
    holders: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
    for rank, held in enumerate(names):
        for part in held:
            holders[part] = (*holders.get(part, ()), rank)
    # In an order that doesn't depend on what else a rank holds.
    return ((part, holders[part.name, part.begin]) for part in sorted(parts, key=lambda part: part.name))


def own_share(parts: Iterable[tuple[Part, tuple[int, ...]]], rank: int, loads: Loads) -> list[Part]:
    """Return the parts that this rank writes. Of what several hold, what is small is the first holder's, so that a rank
    that reads the counters of thousands of parameters opens one file for them; each other part goes to the holder that
    has least to write so far.

    Args:
        parts: of this rank, each with its holders; those who hold a part come upon it in the same order.
        rank: this one.
        loads: what the holders of parts before these have to write, which is added to.
    """
    mine: list[Part] = []
    shared: dict[tuple[int, ...], list[Part]] = {}
    for part, holders in parts:
        if len(holders) > 1 and (part.tensor.numel() or part.kind == WHOLE):
            shared.setdefault(holders, []).append(part)
        elif holders and (part.tensor.numel() or part.kind == WHOLE):
            mine.append(part)
    for holders, held in shared.items():
        small = [part for part in held if part.tensor.nbytes < SMALL]
        mine += small if rank == holders[0] else []
        of_first = sum(part.tensor.nbytes + TENSOR_COST for part in small)
        before = loads.get(holders) or [(0, holder) for holder in holders]
        heap = [(load + (of_first if holder == holders[0] else 0), holder) for load, holder in before]
        heapq.heapify(heap)
        for part in held:
            if part.tensor.nbytes >= SMALL:
                load, chosen = heap[0]
                heapq.heapreplace(heap, (load + part.tensor.nbytes + TENSOR_COST, chosen))
                if chosen == rank:
                    mine.append(part)
        loads[holders] = heap
    return mine


def files_of(folder: str, parts: Iterable[Part], rank: int, kind: str = "model") -> list[TensorFile]:
    """Divide the parts that a rank writes among files, in which the dtypes of most bytes come first, as safetensors
    has them: each tensor is aligned then.
    """
    files: list[list[Part]] = []
    size = 0
    for part in sorted(parts, key=lambda part: -part.tensor.itemsize):
        nbytes = part.tensor.nbytes
        if not files or size + nbytes > FILE_BYTES or len(files[-1]) == FILE_TENSORS:
            files.append([])
            size = 0
        files[-1].append(part)
        size += nbytes
    return [
        TensorFile(
            f"{folder}/shard-{rank + 1:05d}-{kind}-{number:05d}-of-{len(files):05d}.safetensors",
            {part.name: form_of(part.tensor) for part in held},
            {part.name: part.begin for part in held},
            [part.tensor for part in held],
        )
        for number, held in enumerate(files, 1)
    ]
