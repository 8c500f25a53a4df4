"""Named tensors on disk: torch.distributed.checkpoint plans and reshards, safetensors stores. No pickle is read."""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from .directory import CheckpointError, flush

FILE_BYTES = 1 << 30  # safetensors builds a file's bytes in memory: this bounds what a save needs beyond the state


@dataclass(frozen=True)
class Stored:
    """Shape and dtype of a tensor in a directory."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def save_tensors(directory: Path, tensors: Mapping[str, Tensor], group: Any = None) -> None:
    """Write tensors, sharded ones by the ranks that own the shards. Collective: every rank calls it.

    Args:
        directory: exists already.
        tensors: name to tensor; the same names in the same order on every rank.
        group: the ranks' group to use, in another thread than training's.
    """
    writer = HuggingFaceStorageWriter(str(directory), fqn_to_index_mapping=_files(tensors), save_distributed=True)
    with _plainly(directory):
        dcp.save(_apart(tensors), storage_writer=writer, process_group=group)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: contiguous (a convolution's weights may be channels_last), and no two in
    one place of memory (the tables of 8-bit optimizers are one for all parameters).
    """
    found, places = {}, set()
    for name, tensor in tensors.items():
        found[name] = tensor.contiguous()
        if type(tensor) in (Tensor, nn.Parameter) and tensor.numel():
            place = tensor.data_ptr(), tensor.nbytes
            if place in places:
                found[name] = tensor.clone(memory_format=torch.contiguous_format)
            places.add(place)
    return found


def load_tensors(directory: Path, into: Mapping[str, Tensor]) -> None:
    """Read tensors in place, each rank its shards, whatever the sharding was when they were written. Collective."""
    if not into:
        return
    with _plainly(directory):
        dcp.load(dict(into), storage_reader=HuggingFaceStorageReader(str(directory)))


@contextmanager
def _plainly(directory: Path) -> Iterator[None]:
    """Around a call of torch.distributed.checkpoint: its failure as one line, and no warnings."""
    try:
        with warnings.catch_warnings():
            # DCP says that it assumes one process; without a process group that is so.
            warnings.filterwarnings("ignore", message=".*torch.distributed is.*unavailable or uninitialized.*")
            warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # torch 2.9 uses it itself
            yield
    except CheckpointException as error:  # no Exception: it would pass every handler on the way out
        rank, (cause, _) = min(error.failures.items())
        if not isinstance(cause, Exception):  # an interrupt, on whichever rank
            raise cause from None
        raise CheckpointError(f"{directory}: rank {rank}: {type(cause).__name__}: {cause}") from cause


def rank_files(directory: Path, rank: int) -> list[Path]:
    """The files that a rank wrote with ``save_tensors``, flushed."""
    files = sorted(directory.glob(f"shard-{rank + 1:05d}-*.safetensors"))
    for file in files:
        flush(file)
    return files


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """What a directory holds: name to whole shape and dtype. Reads headers only."""
    found: dict[str, Stored] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as content:
            offsets = json.loads((content.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in content.keys():  # noqa: SIM118 (not a dict)
                part = content.get_slice(name)
                begin = offsets.get(name, {}).get("saved_offsets") or [0] * len(part.get_shape())
                end = tuple(b + n for b, n in zip(begin, part.get_shape(), strict=True))
                shape = found[name].shape if name in found else end
                found[name] = Stored(tuple(map(max, shape, end)), DTYPES[part.get_dtype()])
    return found


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Tensor name to file number, so that no file is much larger than FILE_BYTES."""
    file, size, files = 1, 0, {}
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > FILE_BYTES:
            file, size = file + 1, 0
        files[name] = file
        size += tensor.nbytes
    return files


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
