"""Row: a save of 0.5 GB by one process, flushed to the disk."""

import hashlib
import json
import os
import queue
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .measuring import measuring
from .states import directory, flush, save_by_fit, state

TITLE = "A save of 480 MiB (42 M parameters, AdamW), one process"
ROUNDS = 5
LIMIT = "by hand: streamed safetensors, SHA-256 in a thread"
COUNT, WIDTH, PIECE = 10, 2048, 1 << 20


def by_hand() -> dict[str, float]:
    """A header and each tensor's memory, in pieces of 1 MiB, which a thread hashes."""
    _, _, tensors = state(COUNT, WIDTH)
    with directory() as path, measuring() as figures:
        entries, place = {}, 0
        for name, tensor in tensors.items():
            entries[name] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": [place, place + tensor.nbytes]}
            place += tensor.nbytes
        header = json.dumps(entries).encode()
        digest = hashlib.sha256()
        pieces: queue.Queue[memoryview | bytes | None] = queue.Queue(maxsize=4)

        def work() -> None:
            while (piece := pieces.get()) is not None:
                digest.update(piece)

        thread = threading.Thread(target=work)
        thread.start()
        with (path / "by-hand.safetensors").open("wb", buffering=0) as file:
            start = struct.pack("<Q", len(header)) + header
            for whole in (memoryview(start), *(memory(tensor) for tensor in tensors.values())):
                for begin in range(0, len(whole), PIECE):
                    pieces.put(whole[begin : begin + PIECE])
                    file.write(whole[begin : begin + PIECE])
            os.fsync(file.fileno())
        pieces.put(None)
        thread.join()
    return figures


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, where they lie."""
    return memoryview(tensor.view(-1).numpy().view("uint8"))  # type: ignore[arg-type]


Write = Callable[[Path, nn.Module, torch.optim.Optimizer, dict[str, Tensor]], None]


def peer(write: Write) -> dict[str, float]:
    """Measure how another writes the state."""
    module, optimizer, tensors = state(COUNT, WIDTH)
    with directory() as path, measuring() as figures:
        write(path / "file", module, optimizer, tensors)
    return figures


def torch_save(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """As most loops do."""
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, path)
    flush(path)


def save_file(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """As transformers writes a model."""
    import safetensors.torch

    safetensors.torch.save_file(tensors, path)
    flush(path)


def dcp(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """As torchtitan does; it flushes by itself."""
    import torch.distributed.checkpoint

    torch.distributed.checkpoint.save(dict(tensors), checkpoint_id=path)


CONTESTANTS = {
    "stratagem": lambda: save_by_fit(COUNT, WIDTH),
    "stratagem, async_save": lambda: save_by_fit(COUNT, WIDTH, async_save=True),
    LIMIT: by_hand,
    "torch.save, no hash": lambda: peer(torch_save),
    "safetensors.torch.save_file, no hash": lambda: peer(save_file),
    "torch.distributed.checkpoint.save, no hash": lambda: peer(dcp),
}
