"""Safetensors files alone, and transformers' directories: safetensors or torch.save, in one file or with an index."""

import json
from pathlib import Path

from ..checkpoint.directory import read_header as header_of
from ..pretrained.directory import INDEX, SINGLE, is_file_name, read_json, stored_tensors
from ..pretrained.stored import Reader, read_header
from .sources import StoredWeights
from .torch_files import open_torch

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARDING = "DCP_SHARDING_INFO"  # in the header of a file that holds pieces of tensors


def open_safetensors(path: Path) -> StoredWeights:
    """Find the tensors in a safetensors file. Names that share a tensor are in its header, as safetensors' own
    ``save_model`` leaves them there.

    Raises:
        ValueError: it can't be read, or holds a rank's pieces.
    """
    tensors = {tensor.name: tensor for tensor in read_header(path, Reader())}
    with path.open("rb") as file:
        metadata = json.loads(header_of(file)[0]).get("__metadata__") or {}
    if SHARDING in metadata:
        raise ValueError(f"{path} holds one rank's pieces of a checkpoint. Give the checkpoint's directory.")
    tied = {name: first for name, first in metadata.items() if first in tensors and name not in tensors}
    return StoredWeights(path, "safetensors", tensors, tied)


def is_transformers(directory: Path) -> bool:
    """Whether a directory holds weights under one of the names that transformers gives them."""
    return any((directory / name).is_file() for name in (SINGLE, INDEX, BIN, BIN_INDEX))


def open_transformers(directory: Path) -> StoredWeights:
    """Find the tensors of a directory that a transformers model was saved in.

    Raises:
        ValueError: a file is missing or can't be read, or the index and a file differ.
    """
    if (directory / SINGLE).is_file():
        alone = open_safetensors(directory / SINGLE)
        return StoredWeights(directory, "transformers", alone.tensors, alone.tied)
    if (directory / INDEX).is_file():
        return StoredWeights(directory, "transformers", stored_tensors(directory))
    files = [BIN]
    if not (directory / BIN).is_file():
        index = read_json(directory / BIN_INDEX) or {}
        listed = index.get("weight_map")
        if not isinstance(listed, dict) or not all(is_file_name(file) for file in listed.values()):
            raise ValueError(f"{directory / BIN_INDEX} has no weight_map from tensors to files beside it.")
        files = sorted(set(listed.values()))
    parts = []
    for file in files:
        if not (directory / file).is_file():
            raise ValueError(f"{directory} has no {file}, which {BIN_INDEX} lists.")
        parts.append(open_torch(directory / file, None))
    tensors = {name: source for part in parts for name, source in part.tensors.items()}
    tied = {name: first for part in parts for name, first in part.tied.items()}
    return StoredWeights(directory, "transformers", tensors, tied, tuple(n for part in parts for n in part.left_out))
