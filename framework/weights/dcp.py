"""Directories of torch.distributed.checkpoint (DCP), as FSDP and torchtitan write them: read without its pickle.

``.metadata`` is a pickle. It is read by an unpickler that makes the few classes which torch itself writes there and
refuses any other; the tensors are read by ``weights_only``.
"""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from ..pretrained.stored import Part
from .sources import Pieces, Source, StoredWeights, some
from .torch_files import NESTED

METADATA = ".metadata"
CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "device", "strided"),
    "pathlib": ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path"),
    "pathlib._local": ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path"),
    "collections": ("OrderedDict",),
}  # fmt: skip
"""What a .metadata may be made of; dtypes of torch beside it."""


class MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but what torch writes into a .metadata."""

    def find_class(self, module: str, name: str) -> Any:
        """Look up a class that is known.

        Raises:
            UnpicklingError: it isn't.
        """
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no such file of torch's does")
        if module.startswith("pathlib"):
            return str_of_path  # where it was saved: another system's paths can't be made here
        return super().find_class(module, name)


def str_of_path(*parts: str) -> str:
    """Stand for a path of the machine that saved."""
    return "/".join(parts)


class Window(io.RawIOBase):
    """A part of a file, as a file.

    Args:
        file: open for reading.
        begin, length: of the part, in bytes.
    """

    def __init__(self, file: io.RawIOBase, begin: int, length: int) -> None:
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """Its place can be set."""
        return True

    def tell(self) -> int:
        """Where the next byte is read, from the beginning of the part."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set where the next byte is read."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, as far as the part goes."""
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._begin + self._at)
        count = self._file.readinto(view) or 0
        self._at += count
        return count


@dataclass(frozen=True)
class Chunk:
    """A piece of a tensor, as a file of torch.save within a file.

    Attributes:
        begin, length: where it lies in the file, in bytes.
    """

    name: str
    path: Path
    begin: int
    length: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, part: Part) -> Tensor:
        """Read the piece, and return a part of it.

        Raises:
            ValueError: it isn't what the metadata says.
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                piece = cast(IO[bytes], Window(file, self.begin, self.length))
                found = torch.load(piece, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise ValueError(f"{self.path} was altered: {self.name} can't be read at {self.begin}: {error}") from error
        if not isinstance(found, Tensor) or tuple(found.shape) != self.shape or found.dtype != self.dtype:
            form = f"{tuple(found.shape)}, {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"{self.path} was altered: a piece of {self.name} is {form}, and {METADATA} says {self.shape}, "
                f"{self.dtype}."
            )
        return found.detach()[part]


def open_dcp(directory: Path, key: str | None) -> StoredWeights:
    """Find the weights in a directory of DCP's.

    Args:
        directory: with a .metadata.
        key: the entry of the saved state that holds the model; None looks for it, and else takes the tensors that are
            in none.

    Raises:
        ValueError: the metadata, or a file that it names, isn't as torch writes it.
    """
    metadata = read_metadata(directory)
    tensors, others = dict[str, Source](), []
    for name, entry in metadata.state_dict_metadata.items():
        if hasattr(entry, "chunks"):
            tensors[name] = pieces_of(directory, name, entry, metadata.storage_data)
        else:
            others.append(name)
    paths = {name: tuple(map(str, path)) for name, path in (metadata.planner_data or {}).items()}
    chosen, found = choose(list(tensors), paths, key)
    if not chosen:
        raise ValueError(
            f"{directory} holds no tensors {f'under {key!r}' if key else 'of a model'}: there are "
            f"{some([*tensors, *others]) or 'none at all'}. Say by key= (--key) under which entry the model is."
        )
    left = [name for name in (*tensors, *others) if name not in chosen]
    return StoredWeights(directory, "dcp", {found(name): tensors[name] for name in chosen}, left_out=tuple(left))


def choose(
    names: list[str], paths: dict[str, tuple[str, ...]], key: str | None
) -> tuple[list[str], Callable[[str], str]]:
    """Choose the tensors that are the model's, and what each is called in it.

    Args:
        names: of all tensors.
        paths: to each, its keys in the state that was saved, from the outermost.
        key: see ``open_dcp``.
    """
    keys = [key] if key else [nested for nested in NESTED if any(under(paths.get(n, ()), nested) for n in names)][:1]
    if keys:
        prefix = f"{keys[0]}."
        chosen = [name for name in names if name.startswith(prefix)]
        return chosen, lambda name: name.removeprefix(prefix)
    # torchtitan's model is the state itself, and its optimizer an entry.
    return [name for name in names if len(paths.get(name, ())) < 2], lambda name: name


def under(path: tuple[str, ...], key: str) -> bool:
    """Whether a tensor is in the entry of that name."""
    return len(path) > 1 and path[0] == key


def read_metadata(directory: Path) -> Any:
    """Read .metadata.

    Raises:
        ValueError: it isn't as torch writes it.
    """
    path = directory / METADATA
    try:
        with path.open("rb") as file:
            metadata = MetadataUnpickler(file).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(
            f"{path} can't be read: {error}. It isn't as torch.distributed.checkpoint writes it."
        ) from error
    kinds = [type(getattr(metadata, name, None)) for name in ("state_dict_metadata", "storage_data")]
    if type(metadata).__name__ != "Metadata" or kinds != [dict, dict]:
        raise ValueError(f"{path} isn't as torch.distributed.checkpoint writes it: it holds no tables of tensors.")
    return metadata


def pieces_of(directory: Path, name: str, entry: Any, places: dict[Any, Any]) -> Pieces:
    """Find where the pieces of a tensor lie.

    Raises:
        ValueError: one is missing, cut off, or stored in a way that isn't read; or they don't fill the tensor.
    """
    from torch.distributed.checkpoint.metadata import MetadataIndex

    dtype, shape, boxes, held = entry.properties.dtype, tuple(entry.size), [], 0
    for chunk in entry.chunks:
        begin, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        place = places.get(MetadataIndex(name, begin))
        if place is None:
            raise ValueError(f"{directory / METADATA} doesn't say where the piece of {name} at {begin} is.")
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{directory}: {name} is compressed ({', '.join(place.transform_descriptors)}).")
        file = directory / place.relative_path
        if Path(place.relative_path).is_absolute() or ".." in Path(place.relative_path).parts or not file.is_file():
            raise ValueError(f"{directory} has no {place.relative_path}, where {METADATA} says that {name} is.")
        if file.stat().st_size < place.offset + place.length:
            raise ValueError(f"{file} was cut off: {METADATA} says that {name} ends at {place.offset + place.length}.")
        boxes.append((begin, Chunk(name, file, place.offset, place.length, sizes, dtype)))
        held += torch.Size(sizes).numel()
    if held != torch.Size(shape).numel():
        raise ValueError(f"{directory}: the pieces of {name} hold {held} numbers, and it has the shape {shape}.")
    return Pieces(name, shape, dtype, tuple(boxes))
