"""Damaged and forged checkpoints: what test files share to make them and to resume from them."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from stratagem import Fit
from stratagem.framework.checkpoint.directory import hash_file
from tiny import Dropping, MakeFit, parameters_of, regression_rows
from torch import Tensor

SAVED_AT = 3
RUN = {
    "per_device_train_batch_size": 4,
    "max_steps": SAVED_AT,
    "logging_steps": 2,
    "save_strategy": "steps",
    "save_steps": SAVED_AT,
    "lr_scheduler_type": "linear",
    "shuffle": True,
}


def save(make_fit: MakeFit, **arguments: Any) -> Path:
    """A run of Dropping, and the checkpoint that it ends with, in the middle of its first epoch."""
    fit = make_fit(Dropping(), regression_rows(22), **{**RUN, **arguments})
    fit.train()
    return Path(fit.args.output_dir) / f"checkpoint-{SAVED_AT}"


def resume(make_fit: MakeFit, checkpoint: Path, **arguments: Any) -> Fit:
    """The run after one update more."""
    given = {**RUN, "max_steps": SAVED_AT + 1, "save_strategy": "no", **arguments}
    fit = make_fit(Dropping(), regression_rows(22), **given)
    fit.train(resume_from_checkpoint=checkpoint)
    return fit


def result(fit: Fit) -> dict[str, Tensor]:
    return parameters_of(fit.module)


def seal(checkpoint: Path, *, lists: bool = True) -> None:
    """Have the manifest list what is there now, as anyone can who sends a checkpoint."""
    manifest = checkpoint / "manifest.json"
    content = json.loads(manifest.read_text())
    names = [f.relative_to(checkpoint).as_posix() for f in sorted(checkpoint.rglob("*")) if f.is_file()]
    names = [name for name in names if name != "manifest.json" and (lists or name in content["files"])]
    content["files"] = {name: hash_file(checkpoint / name) for name in names}
    manifest.write_text(json.dumps(content))


def change_state(checkpoint: Path, change: Any) -> None:
    """Change state.json by a function of its content, and seal it."""
    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    (checkpoint / "state.json").write_text(json.dumps(state))
    seal(checkpoint)


def shard(checkpoint: Path, folder: str) -> Path:
    [file] = (checkpoint / folder).iterdir()
    return file


def change_tensors(checkpoint: Path, change: Any, folder: str = "optimizer", *, relist: bool = True) -> None:
    """Change a folder's tensors by a function of the mapping, list them in state.json as they are now, and seal it."""
    file = shard(checkpoint, folder)
    tensors = load_file(file)
    change(tensors)
    offsets = json.dumps({name: {"saved_offsets": [0] * tensor.ndim} for name, tensor in tensors.items()})
    save_file({k: t.contiguous() for k, t in tensors.items()}, file, {"format": "pt", "DCP_SHARDING_INFO": offsets})

    def listed(state: dict[str, Any]) -> None:
        if relist and folder in state:
            state[folder] = {k: {"shape": list(t.shape), "dtype": str(t.dtype)} for k, t in tensors.items()}

    change_state(checkpoint, listed)


def change_header(file: Path, change: Any) -> None:
    """Change a safetensors file's header by a function of its content."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
