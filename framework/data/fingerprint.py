"""The fingerprint of a dataset, made of its first and its last sample, which tells a resume on another dataset."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from .. import random_state


def fingerprint(dataset: Any) -> str | None:
    """Hash the first and the last sample. The global random generators don't change, and don't change the hash.

    Args:
        dataset: it has ``__getitem__`` and ``__len__``.

    Returns:
        The hash; None where the samples can't be read or hashed, or aren't the same when they are read again.
    """
    if isinstance(dataset, IterableDataset):  # its __getitem__ raises
        return None
    first, again = _read(dataset), _read(dataset)
    return first if first == again else None


def _read(dataset: Any) -> str | None:
    digest = hashlib.sha256()
    try:
        with random_state.OwnRandomState(0).entered():
            for index in (0, len(dataset) - 1):
                _add(digest, dataset[index])
    except Exception:  # any error of the user's dataset: a fingerprint is no part of training
        return None
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Add a sample to a hash.

    Raises:
        TypeError: the sample holds something whose content can't be hashed.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    elif isinstance(value, numpy.ndarray | numpy.generic) and value.dtype != object:
        digest.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            _add(digest, key)
            _add(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for entry in value:
            _add(digest, entry)
    elif value is None or isinstance(value, bool | int | float | str):
        digest.update(f"{type(value).__name__} {value!r}".encode())
    elif isinstance(value, bytes):
        digest.update(value)
    else:
        raise TypeError(f"{type(value).__name__} can't be hashed")
