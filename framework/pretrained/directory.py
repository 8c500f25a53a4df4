"""A model's directory: its configuration and the tensors in its safetensors files, here or in the Hub's cache."""

import json
import os
from pathlib import Path
from typing import Any

from .stored import Reader, StoredTensor, read_header

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


def find_directory(path: str | os.PathLike[str]) -> Path:
    """Return the directory of a model; nothing is downloaded.

    Args:
        path: a directory, or the name of a model ("organization/name") that huggingface_hub has in its cache.

    Raises:
        ValueError: there is neither.
    """
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ValueError(f"{directory} is a file. Give the directory that it is in, with {SINGLE} or {INDEX}.")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(os.fspath(path), local_files_only=True))
    except (ImportError, ValueError, OSError) as error:  # HFValidationError is a ValueError, a missing entry an OSError
        raise ValueError(
            f"There is no directory {os.fspath(path)!r}, and the cache of huggingface_hub has no model of that name "
            f"({type(error).__name__}). Download it first (hf download {os.fspath(path)}), once on each host."
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json; empty where there is none.

    Raises:
        ValueError: it can't be understood.
    """
    config = read_json(directory / CONFIG)
    return {} if config is None else config


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a file that holds a mapping; None where there is no such file.

    Raises:
        ValueError: it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} isn't JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a mapping.")
    return found


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Find the tensors of a model by name, in one file or in those that an index lists. Only headers are read.

    Raises:
        ValueError: there are none, a file is missing or no safetensors file, or the index and a file differ.
    """
    reader = Reader()
    if (directory / SINGLE).is_file():
        return {tensor.name: tensor for tensor in read_header(directory / SINGLE, reader)}
    index = read_json(directory / INDEX)
    if index is None:
        others = sorted(file.name for file in directory.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".gguf"))
        held = f" It holds {', '.join(others[:3])}: load that by from_pretrained, and save_pretrained it once." * bool(
            others
        )
        raise ValueError(f"{directory} has neither {SINGLE} nor {INDEX}.{held}")
    files = index.get("weight_map")
    if not isinstance(files, dict) or not all(is_file_name(file) for file in files.values()):
        raise ValueError(f"{directory / INDEX} has no weight_map from tensors to files beside it.")
    found: dict[str, StoredTensor] = {}
    for file in sorted(set(files.values())):
        if not (directory / file).is_file():
            raise ValueError(f"{directory} has no {file}, which {INDEX} lists.")
        found |= {tensor.name: tensor for tensor in read_header(directory / file, reader)}
    if lost := sorted(files.keys() - found.keys()):
        raise ValueError(f"{directory / files[lost[0]]} doesn't hold {lost[0]!r}, of which {INDEX} says so.")
    return found


def is_file_name(file: object) -> bool:
    """Whether it names a file in the directory itself."""
    return isinstance(file, str) and bool(file) and Path(file).name == file
