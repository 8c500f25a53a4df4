"""Row: a save of 40,000 small tensors by one process."""

import torch

from .measuring import measuring
from .states import directory, flush, save_by_fit, state

TITLE = "A save of 40,000 small tensors (10,000 parameters of 64 numbers, AdamW), one process: a tensor"
ROUNDS = 3
LIMIT = "safetensors.torch.save_file, no hash"
COUNT, WIDTH = 10_000, 8
TENSORS = 4 * COUNT  # each parameter's numbers, two moments and a counter


def save_file() -> dict[str, float]:
    """All in one file."""
    import safetensors.torch

    _, _, tensors = state(COUNT, WIDTH)
    with directory() as path, measuring(TENSORS) as figures:
        safetensors.torch.save_file(tensors, path / "file")
        flush(path / "file")
    return figures


def torch_save() -> dict[str, float]:
    """As most loops do."""
    module, optimizer, _ = state(COUNT, WIDTH)
    with directory() as path, measuring(TENSORS) as figures:
        torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, path / "file")
        flush(path / "file")
    return figures


def dcp() -> dict[str, float]:
    """torch's distributed checkpoint, with its planning."""
    import torch.distributed.checkpoint

    _, _, tensors = state(COUNT, WIDTH)
    with directory() as path, measuring(TENSORS) as figures:
        torch.distributed.checkpoint.save(dict(tensors), checkpoint_id=path / "dcp")
    return figures


CONTESTANTS = {
    "stratagem": lambda: save_by_fit(COUNT, WIDTH, TENSORS),
    LIMIT: save_file,
    "torch.save, no hash": torch_save,
    "torch.distributed.checkpoint.save, no hash": dcp,
}
