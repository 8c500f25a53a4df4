"""Files of torch.save, Lightning's checkpoints among them: read by ``weights_only``, which runs no code of the file."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .sources import Mapped, Source, StoredWeights, some

NESTED = ("state_dict", "model", "module", "model_state_dict")
"""Under which names programs keep a model's state_dict, in the order in which they are looked for."""
LIGHTNING = "pytorch-lightning_version"


def open_torch(path: Path, key: str | None) -> StoredWeights:
    """Find the weights in a file that torch.save wrote. Its numbers are mapped and not read, but for files of torch
    before 1.6.

    Args:
        path: of the file.
        key: where the state_dict is in it, with dots between the keys ("ema.model"); None looks for it.

    Raises:
        ValueError: the file holds more than ``weights_only`` takes, or no weights.
    """
    return weights_in(load(path), path, key)


def load(path: Path) -> Any:
    """Load a file by ``torch.load(weights_only=True)``.

    Raises:
        ValueError: it can't be read so; the message says what is in the way, and what to do.
    """
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise ValueError(
                    f"{path} is a program of TorchScript, not weights. Load it by torch.jit.load, and write "
                    'torch.save(program.state_dict(), "weights.pt").'
                )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip or None)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds {culprit(error)}, which only code of the file's could build; nothing is unpickled here. If "
            "you trust where it is from, save its tensors alone, where the classes are known: "
            'torch.save(torch.load(path, weights_only=False)["state_dict"], "weights.pt"). In a Lightning checkpoint '
            'it is mostly what save_hyperparameters() kept: save_hyperparameters(ignore=["name"]) leaves objects out.'
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError, AssertionError) as error:
        raise ValueError(f"{path} can't be read: {' '.join(str(error).split())[:300]}. Is it whole?") from error


def culprit(error: Exception) -> str:
    """What ``weights_only`` didn't take."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(
        r"Unsupported (?:global|class)\W+([\w.]+)", str(error)
    )
    return f"an object of {found.group(1)}" if found else "something other than tensors and numbers"


def weights_in(found: Any, path: Path, key: str | None) -> StoredWeights:
    """Find the state_dict in what a file holds.

    Raises:
        ValueError: there is none.
    """
    kind = "lightning" if isinstance(found, Mapping) and LIGHTNING in found else "torch"
    outside: tuple[str, ...] = ()
    if key is not None:
        for part in key.split("."):
            if not isinstance(found, Mapping) or part not in found:
                raise ValueError(f"{path} has no {key!r}: {said(found)}.")
            found = found[part]
    elif isinstance(found, Mapping):
        nested = next((name for name in NESTED if holds_tensors(found.get(name))), None)
        if nested is not None:
            outside = tuple(str(name) for name in found if name != nested)
            found = found[nested]
    if not holds_tensors(found):
        raise ValueError(
            f"{path} has no state_dict, neither itself nor under {', '.join(map(repr, NESTED))}: {said(found)}. Say "
            "where it is by key= (--key), with dots between keys."
        )
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    rest = tuple(str(name) for name, value in found.items() if not isinstance(value, Tensor))
    first: dict[Any, str] = {}
    tied, sources = {}, dict[str, Source]()
    for name, tensor in tensors.items():
        check(path, name, tensor)
        same = first.setdefault(place_of(tensor), name) if tensor.numel() else name
        if same == name:
            sources[name] = Mapped(name, tensor.detach())
        else:
            tied[name] = same
    return StoredWeights(path, kind, sources, tied, (*rest, *outside))


def holds_tensors(found: Any) -> bool:
    """Whether something is a mapping with a tensor in it."""
    return isinstance(found, Mapping) and any(isinstance(value, Tensor) for value in found.values())


def said(found: Any) -> str:
    """What is there instead."""
    if not isinstance(found, Mapping):
        return f"there is a {type(found).__name__}"
    return f"there are {some([repr(name) for name in found])}" if found else "there is an empty mapping"


def check(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose numbers aren't one whole array.

    Raises:
        ValueError: names the tensor.
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else f"{type(tensor).__name__} of {tensor.layout}"
        raise ValueError(
            f"{path}: {name} is {kind}, and no plain tensor with numbers. Save it as one (of a DTensor: full_tensor())."
        )


def place_of(tensor: Tensor) -> Any:
    """What two tensors have in common that are the same memory, seen alike."""
    storage = tensor.untyped_storage().data_ptr()
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
