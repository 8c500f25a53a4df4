"""Finds weights wherever they are: the format is told by what a file or directory holds, and not by its name."""

from pathlib import Path

from ..checkpoint.directory import MANIFEST, NAME
from ..checkpoint.schema import read_state
from ..checkpoint.tensors import Piece, read_table
from ..checkpoint.verifying import verify
from ..pretrained.stored import Reader, StoredTensor
from .dcp import METADATA, open_dcp
from .safetensors_files import is_transformers, open_safetensors, open_transformers
from .sources import Pieces, Source, StoredWeights
from .torch_files import open_torch

MAGIC = {  # the first bytes of files that others write, and what to do about them
    b"GGUF": "GGUF, whose weights are quantized for llama.cpp. Take the safetensors files that it was made from",
    b"\x89HDF": "HDF5, as Keras writes it. Load it there, and write the arrays by safetensors.numpy.save_file",
}
FORMATS = (
    "a file of torch.save, a Lightning checkpoint, a safetensors file, a directory of torch.distributed.checkpoint or "
    "of transformers, or a checkpoint of stratagem"
)


def open_weights(path: Path, key: str | None = None, part: int = 0, parts: int = 1) -> StoredWeights:
    """Find the weights in a file or directory. Their numbers aren't read yet.

    Args:
        path: of one.
        key: see ``open_torch`` and ``open_dcp``.
        part, parts: of a checkpoint of ours, compare only this part of so many of the files with the manifest.

    Raises:
        ValueError: there are none, in no format that is known; or something is damaged. The message names the file.
    """
    if path.is_dir():
        found = open_directory(path, key, part, parts)
    elif path.is_file():
        found = open_file(path, key)
    else:
        raise ValueError(f"There is no file or directory {str(path)!r}.")
    if key is not None and found.format not in ("torch", "lightning", "dcp"):
        raise ValueError(f"key={key!r} has no effect: {path} ({found.format}) holds its tensors in no entries.")
    return found


def open_file(path: Path, key: str | None) -> StoredWeights:
    """Find the weights in a file.

    Raises:
        ValueError: see ``open_weights``.
    """
    with path.open("rb") as file:
        head = file.read(16)
    for magic, why in MAGIC.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is {why}.")
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 8 + length <= path.stat().st_size:
        return open_safetensors(path)
    if head.startswith((b"PK\x03\x04", b"\x80")):  # a zip archive, or a pickle, as before torch 1.6
        return open_torch(path, key)
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} is no whole safetensors file: it doesn't begin with a header.")
    raise ValueError(f"{path} isn't {FORMATS}. It begins with {head!r}.")


def open_directory(path: Path, key: str | None, part: int, parts: int) -> StoredWeights:
    """Find the weights in a directory.

    Raises:
        ValueError: see ``open_weights``.
    """
    if (path / MANIFEST).is_file():
        return open_checkpoint(path, part, parts)
    if (path / METADATA).is_file():
        return open_dcp(path, key)
    if is_transformers(path):
        return open_transformers(path)
    checkpoints = sorted(each.name for each in path.iterdir() if NAME.match(each.name))
    if checkpoints:
        raise ValueError(f"{path} holds checkpoints: give one of them, such as {path / checkpoints[-1]}.")
    files = sorted(
        each.name for each in path.iterdir() if each.suffix in (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
    )
    hint = f" Give a file in it, such as {files[0]}." if files else ""
    raise ValueError(f"{path} isn't {FORMATS}.{hint}")


def open_checkpoint(path: Path, part: int = 0, parts: int = 1) -> StoredWeights:
    """Find the weights in a checkpoint of ours, once it was compared with its manifest.

    Raises:
        CheckpointError: it is damaged.
    """
    verify(path, part, parts)
    state, table, reader = read_state(path), read_table(path), Reader()

    def stored(name: str, piece: Piece) -> Source:
        return StoredTensor(reader, piece.file, name, piece.place, piece.shape, piece.dtype)

    tensors: dict[str, Source] = {}
    for name, whole in table.stored("model").items():
        boxes = tuple((piece.begin, stored(name, piece)) for piece in table.pieces("model", name))
        tensors[name] = Pieces(name, whole.shape, whole.dtype, boxes)
    tied = {name: first for name, first in (state.get("tied") or {}).items() if first in tensors}
    left = ("optimizer", "random states", "callbacks", "data")
    return StoredWeights(path, "checkpoint", tensors, tied, left, tuple(state.get("frozen") or ()))
