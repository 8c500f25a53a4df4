"""Row: a restore of 0.5 GB by one process: compared with its hashes, then loaded."""

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ...framework.callbacks import Callback
from .measuring import measuring
from .states import Matrices, Saving, directory, fit_in, state

TITLE = "A restore of 480 MiB (42 M parameters, AdamW), one process"
ROUNDS = 5
LIMIT = "by hand: SHA-256 of the file, then safe_open and copies"
COUNT, WIDTH = 10, 2048


class Begun(Callback):
    """Ends measuring when the run is restored."""

    def __init__(self) -> None:
        self.block = measuring()

    def on_train_begin(self, *_, **__):  # type: ignore[no-untyped-def]
        self.block.__exit__(None, None, None)


def stratagem() -> dict[str, float]:
    """From ``fit.train(resume_from_checkpoint=...)`` to the first callback; a small one before has imported all."""
    with directory() as path:
        for width in (8, WIDTH):
            saved, begun = path / f"saved-{width}", Begun()
            fit_in(saved, Matrices(COUNT, width), callbacks=[Saving()]).train()
            fit = fit_in(path / "out", Matrices(COUNT, width), callbacks=[begun], max_steps=2)
            figures = begun.block.__enter__()
            fit.train(resume_from_checkpoint=saved / "checkpoint-1")
    return figures


def by_hand() -> dict[str, float]:
    """The bytes are compared, and each tensor is copied to where it belongs; moments are made."""
    module, optimizer, tensors = state(COUNT, WIDTH)
    with directory() as path:
        file = path / "file.safetensors"
        save_file(tensors, file)
        expected = sha256(file)
        optimizer.state.clear()
        parameters = dict(module.named_parameters())
        del tensors
        with measuring() as figures:
            assert sha256(file) == expected
            with safe_open(file, framework="pt") as content, torch.no_grad():
                for name in content.keys():  # noqa: SIM118 (not a dict)
                    parameter, _, key = name.partition("/")
                    if key:
                        optimizer.state[parameters[parameter]][key] = content.get_tensor(name)
                    else:
                        parameters[parameter].copy_(content.get_tensor(name))
    return figures


def sha256(path: Path) -> str:
    """The hash of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def torch_load() -> dict[str, float]:
    """As most loops do; nothing is compared."""
    module, optimizer, _ = state(COUNT, WIDTH)
    with directory() as path:
        torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, path / "file")
        optimizer.state.clear()
        with measuring() as figures:
            held = torch.load(path / "file", weights_only=True)
            module.load_state_dict(held["model"])
            optimizer.load_state_dict(held["optimizer"])
    return figures


def dcp() -> dict[str, float]:
    """torch's distributed checkpoint, into tensors that are there; nothing is compared."""
    import torch.distributed.checkpoint

    _, _, tensors = state(COUNT, WIDTH)
    with directory() as path:
        torch.distributed.checkpoint.save(dict(tensors), checkpoint_id=path / "dcp")
        with measuring() as figures:
            torch.distributed.checkpoint.load(dict(tensors), checkpoint_id=path / "dcp")
    return figures


CONTESTANTS = {
    "stratagem": stratagem,
    LIMIT: by_hand,
    "torch.load, no hash": torch_load,
    "torch.distributed.checkpoint.load, no hash": dcp,
}
