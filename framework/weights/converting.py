"""Conversion of weights from any format that is read to any that is written."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..checkpoint.directory import MANIFEST
from ..pretrained.directory import CONFIG, read_config
from .names import renamed
from .opening import open_weights
from .outgoing import Outgoing
from .placing import placed_whole
from .sources import StoredWeights
from .targets import Write, is_written, write_dcp, write_safetensors, write_torch, write_transformers

TARGETS = ("safetensors", "torch", "dcp", "transformers")
ENDINGS = {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch", ".bin": "torch"}
DTYPES = ("float64", "float32", "float16", "bfloat16")
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}  # as transformers counts


@dataclass(frozen=True)
class Converted:
    """What a conversion has written.

    Attributes:
        path: of the file or the directory.
        format: that it is in.
        source_format: that it was read from.
        tensors: how many; those with several names count once.
        bytes: of their numbers.
        left_out: names of what the source holds beside them.
    """

    path: Path
    format: str
    source_format: str
    tensors: int
    bytes: int
    left_out: tuple[str, ...]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    rename: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    key: str | None = None,
    config: str | os.PathLike[str] | None = None,
    shard_size: str | int = "5GB",
    force: bool = False,
) -> Converted:
    """Read weights in one format and write them in another, one tensor in memory at a time.

    The source is a file of torch.save or a Lightning checkpoint (read by ``weights_only``: no code of the file runs), a
    safetensors file, a directory of torch.distributed.checkpoint or of a transformers model, or a checkpoint of a run.
    Which one it is, is told by what it holds. Names that share a tensor share it in the target, as far as it can.

    Args:
        source: a file or a directory.
        target: the file or directory to write. It is there when it is whole, and nothing is left where that fails.
        to: "safetensors", "torch", "dcp" or "transformers"; None takes it from the target's ending.
        dtype: of floating-point tensors ("bfloat16"); None keeps each one's.
        rename: patterns OLD=NEW, where * stands for any text: ``["model.*=*"]`` takes a prefix off.
        leave_out: patterns of names that aren't written, as they are in the source.
        key: where the weights are in a file of torch.save or a DCP directory, if not at a usual place: "ema.model".
        config: of a transformers directory: the directory of the model that the weights are of, or its config.json.
            None takes the source's own, where that is such a directory.
        shard_size: of a file in a transformers directory, in bytes or as "5GB".
        force: replace a target that is there.

    Raises:
        ValueError: a source that can't be read, a target that can't be written, a pattern that fits nothing; names the
            tensor or file, and says what to do.
        OSError: the system refused.

    Example:
        >>> torch.save({"state_dict": {"model.weight": torch.ones(2, 3)}, "epoch": 3}, "epoch=3.ckpt")
        >>> convert("epoch=3.ckpt", "weights.safetensors", rename=["model.*=*"], dtype="bfloat16").left_out
        ('epoch',)
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    form = find_format(target, to)
    number_format = find_dtype(dtype)
    found = renamed(open_weights(source, key), rename, leave_out)
    check_apart(source, target)
    write = writer_of(form, found, config, shard_size, check=bool(rename or leave_out))
    weights = Outgoing(found.tensors, found.tied, number_format)
    with placed_whole(target, force, may_go) as path:
        write(path, weights)
    size = sum(map(weights.bytes_of, weights.tensors))
    return Converted(target, form, found.format, len(weights.tensors), size, found.left_out)


def find_format(target: Path, to: str | None) -> str:
    """The format to write.

    Raises:
        ValueError: there is none of that name, or none was named and the target's ending doesn't say it.
    """
    if to in TARGETS:
        return str(to)
    if to in ("checkpoint", "checkpoint-weights", "lightning"):
        raise ValueError(
            f"to={to!r} can't be written: a checkpoint holds a run (an optimizer's state, a place in the data, random "
            "states), which weights don't say. Write to='safetensors', and begin a run by fit.load_weights(path)."
        )
    if to is not None:
        raise ValueError(f"to={to!r} is none of {', '.join(TARGETS)}.")
    if target.suffix not in ENDINGS:
        raise ValueError(
            f"The name {target.name!r} doesn't say the format to write. Give to= (--to): {', '.join(TARGETS)}; or a "
            f"name that ends in {', '.join(ENDINGS)}."
        )
    return ENDINGS[target.suffix]


def find_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of what is written.

    Raises:
        ValueError: it is none of those that are known.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}.")
    found: torch.dtype = getattr(torch, name)
    return found


def writer_of(
    form: str, found: StoredWeights, config: str | os.PathLike[str] | None, shard_size: str | int, check: bool
) -> Write:
    """What writes a format.

    Raises:
        ValueError: a transformers directory has no configuration, or another format is given one.
    """
    if form != "transformers":
        if config is not None:
            raise ValueError(
                f"config={str(config)!r} has no effect: it is for a transformers directory, not for {form}."
            )
        return {"safetensors": write_safetensors, "torch": write_torch, "dcp": write_dcp}[form]
    own = found.path if found.format == "transformers" else None
    place = own if config is None else Path(config).expanduser()
    if place is None:
        raise ValueError(
            f"A transformers directory needs the model's config.json, and {found.path} has none. Write config= "
            "(--config) and the directory of the model that was fine-tuned, or its config.json."
        )
    write = partial(write_transformers, config=place, shard_size=bytes_in(shard_size))
    if place == own and not check:
        return write  # as it was saved

    def write_checked(path: Path, weights: Outgoing) -> None:
        write(path, weights)
        check_fits(path)

    return write_checked


def check_fits(directory: Path) -> None:
    """Refuse weights that the model of the config.json beside them has no place for, or lacks. Only headers are read.
    Configurations of models whose code isn't transformers' own, and machines without transformers, leave this out.

    Raises:
        ValueError: names the tensors.
    """
    config = read_config(directory)
    if not config.get("architectures") or "auto_map" in config or config.get("quantization_config"):
        return
    try:
        import transformers  # noqa: F401
    except ImportError:
        return
    from ..pretrained.building import model_of, weights_of

    try:
        weights_of(model_of(directory, None), directory, ())
    except ValueError as error:
        raise ValueError(
            f"The weights don't fit the model of {CONFIG}: {str(error).replace(f' in {directory}', '')} Names of "
            'another program become the model\'s by rename=["OLD=NEW"] (--rename).'
        ) from error


def bytes_in(size: str | int) -> int:
    """Read a size.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B)?", str(size).strip(), re.IGNORECASE)
    count = int(float(found.group(1)) * UNITS[(found.group(2) or "").upper()]) if found else 0
    if count < 1:
        raise ValueError(f"shard_size={size!r} isn't a number of bytes, such as '5GB' or '200MB'.")
    return count


def check_apart(source: Path, target: Path) -> None:
    """Refuse a target that would take the place of its source.

    Raises:
        ValueError: one is the other, or lies in it.
    """
    one, other = source.resolve(), target.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(f"{target} can't be written: it would lie in, or replace, what is read ({source}).")


def may_go(path: Path) -> bool:
    """Whether a directory may be replaced: it holds weights as they are written here, and no run's checkpoint."""
    return is_written(path) and not (path / MANIFEST).exists()
