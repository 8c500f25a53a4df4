"""The formats that weights are written in: safetensors, torch.save, DCP, and a transformers directory."""

import io
import json
import pickle
import re
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3

from ..checkpoint.streaming import NAMES, write_file
from ..pretrained.directory import CONFIG, INDEX, SINGLE
from .dcp import METADATA
from .outgoing import Outgoing
from .safetensors_files import is_transformers

Write = Callable[[Path, Outgoing], None]

STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
    torch.complex64: torch.ComplexFloatStorage,
    torch.complex128: torch.ComplexDoubleStorage,
}
"""The names of dtypes in files of torch.save; later dtypes are named themselves."""
OF_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
OF_ITS_OWN = ("README.md", ".gitattributes")  # a card of other weights


def write_safetensors(path: Path, weights: Outgoing, names: Sequence[str] | None = None) -> None:
    """Write a safetensors file. Of names that share a tensor the first has it, and the header names the others, as
    safetensors' ``save_model`` has it.

    Args:
        path: of the file.
        weights: all of them.
        names: of those that are written; None for all.

    Raises:
        ValueError: a dtype can't be in such a file.
    """
    chosen = list(weights.tensors) if names is None else list(names)
    # Dtypes of most bytes come first, so that each tensor is aligned.
    chosen.sort(key=lambda name: -weights.dtype_of(name).itemsize)
    for name in chosen:
        if weights.dtype_of(name) not in NAMES:
            raise ValueError(
                f"{name} is of {weights.dtype_of(name)}, which a safetensors file doesn't hold here: write another "
                "format (--to torch, --to dcp)."
            )
    forms = {name: (NAMES[weights.dtype_of(name)], tuple(weights.tensors[name].shape)) for name in chosen}
    tied = {name: first for name, first in weights.tied.items() if first in forms}
    write_file(path, forms, {"format": "pt", **tied}, weights.all(chosen))


class Record:
    """Stands for a tensor in the pickle of a torch.save file, whose numbers are written after it."""

    def __init__(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.key, self.dtype, self.shape = key, dtype, shape

    def __reduce__(self) -> Any:
        strides = torch.empty(self.shape, device="meta").stride()
        found = (Storage(self.key, self.dtype, torch.Size(self.shape).numel()), 0, self.shape, strides, False)
        if self.dtype in STORAGES:
            return _rebuild_tensor_v2, (*found, OrderedDict())
        return _rebuild_tensor_v3, (*found, OrderedDict(), self.dtype)


class Storage:
    """Stands for a tensor's memory."""

    def __init__(self, key: str, dtype: torch.dtype, count: int) -> None:
        self.key, self.dtype, self.count = key, dtype, count


class RecordPickler(pickle.Pickler):
    """Pickles records as torch.save pickles tensors."""

    def persistent_id(self, obj: Any) -> Any:
        """What torch.load looks memory up by."""
        if not isinstance(obj, Storage):
            return None
        if obj.dtype in STORAGES:
            return "storage", STORAGES[obj.dtype], obj.key, "cpu", obj.count
        return "storage", torch.UntypedStorage, obj.key, "cpu", obj.count * obj.dtype.itemsize


def write_torch(path: Path, weights: Outgoing) -> None:
    """Write a file as torch.save writes it, with one tensor in memory at a time: torch.save has all of them. Names that
    share a tensor share it there, too.
    """
    names = list(weights.tensors)
    records = {
        name: Record(str(number), weights.dtype_of(name), tuple(weights.tensors[name].shape))
        for number, name in enumerate(names)
    }
    content = io.BytesIO()
    RecordPickler(content, protocol=2).dump(
        {**records, **{name: records[first] for name, first in weights.tied.items()}}
    )
    with path.open("wb") as opened:  # by its name, torch takes ASCII alone
        file = torch._C.PyTorchFileWriter(opened)
        for record, text in (
            ("data.pkl", content.getvalue()),
            (".format_version", b"1"),
            (".storage_alignment", b"64"),
        ):
            file.write_record(record, text, len(text))
        file.write_record("byteorder", sys.byteorder.encode(), len(sys.byteorder))
        for number, name in enumerate(names):  # no variable keeps a tensor while the next one is read
            memory: Any = in_memory_of_its_own(weights.read(name)).untyped_storage()
            file.write_record(f"data/{number}", memory, weights.bytes_of(name))
            del memory
        file.write_end_of_file()


def in_memory_of_its_own(tensor: Tensor) -> Tensor:
    """Return a tensor whose memory holds nothing else: of a view, torch.save would write all that it is a view of."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def write_dcp(path: Path, weights: Outgoing) -> None:
    """Write a directory that ``torch.distributed.checkpoint.load(model.state_dict(), checkpoint_id=path)`` reads, with
    one tensor in memory at a time: DCP's own writer has all of them. A tensor is there under each of its names.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    path.mkdir()
    entries, places, name_of_file = {}, {}, "__0_0.distcp"
    with (path / name_of_file).open("wb") as file:
        for name in (*weights.tensors, *weights.tied):
            tensor = in_memory_of_its_own(weights.read(weights.tied.get(name, name)))
            begin, content = file.tell(), io.BytesIO()
            torch.save(tensor, content)
            file.write(content.getbuffer())
            origin = torch.Size([0] * tensor.ndim)
            entries[name] = TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype), tensor.shape, [ChunkStorageMetadata(origin, tensor.shape)]
            )
            places[MetadataIndex(name, origin, 0)] = _StorageInfo(name_of_file, begin, file.tell() - begin)
    keys = {name: (name,) for name in entries}
    metadata = Metadata(entries, keys, places, StorageMeta(), version="1.0.0")  # type: ignore[arg-type]
    (path / METADATA).write_bytes(pickle.dumps(metadata))


def write_transformers(path: Path, weights: Outgoing, config: Path, shard_size: int) -> None:
    """Write a directory that ``from_pretrained`` loads: safetensors files with an index where they are several, and
    what else is in the directory that the configuration is from, such as the tokenizer.

    Args:
        path: of the directory.
        weights: all of them.
        config: a directory with a config.json, or such a file alone.
        shard_size: of a file, in bytes; a tensor that is larger has one of its own.
    """
    path.mkdir()
    copy_configuration(config, path, weights.dtype)
    shards: list[list[str]] = [[]]
    size = 0
    for name in weights.tensors:
        if shards[-1] and size + weights.bytes_of(name) > shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += weights.bytes_of(name)
    if len(shards) == 1:
        write_safetensors(path / SINGLE, weights)
        return
    files: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(path / file, weights, names)
        files |= dict.fromkeys(names, file)
    total = sum(map(weights.bytes_of, weights.tensors))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_configuration(config: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Copy config.json and what else isn't weights; another dtype is noted in it.

    Raises:
        ValueError: there is no config.json.
    """
    file = config / CONFIG if config.is_dir() else config
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(content, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise ValueError(
            f"{file} can't be read as a model's configuration ({type(error).__name__}). A transformers directory needs "
            "one: write config= (--config) and the directory of the model that was fine-tuned, or its config.json."
        ) from error
    if config.is_dir():
        for each in sorted(config.iterdir()):
            is_weights = each.name.endswith(OF_WEIGHTS) or re.search(r"\.index\.\w+\.json$", each.name)
            if each.is_file() and not is_weights and each.name not in (*OF_ITS_OWN, CONFIG):
                shutil.copyfile(each, target / each.name)
    if dtype is not None:
        content["torch_dtype" if "torch_dtype" in content else "dtype"] = str(dtype).removeprefix("torch.")
    (target / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_written(path: Path) -> bool:
    """Whether a directory is one that is written here: DCP's, or transformers'."""
    return (path / METADATA).is_file() or is_transformers(path)
