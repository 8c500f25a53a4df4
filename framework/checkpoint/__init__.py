"""Checkpoints: one format for every strategy, without pickle. A checkpoint exists whole or not at all."""

from importlib import import_module
from typing import Any

# These files are imported when they are first used, since torch.distributed.checkpoint takes long to import.
HOMES = {
    "BackgroundWriter": "writing",
    "CheckpointError": "directory",
    "RunDirectory": "run_directory",
    "Saver": "saver",
    "check_can_write": "directory",
    "export": "exporting",
    "check_states": "callback_states",
    "checkpoints_of_last_run": "line",
    "load_weights": "contents",
    "published": "directory",
    "read_state": "schema",
    "remove": "directory",
    "restore": "contents",
    "rotate": "directory",
    "take": "contents",
    "whole_weights": "exporting",
    "write": "writing",
}


def __getattr__(name: str) -> Any:
    """Import the public function or class of that name from its file."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{HOMES[name]}", __name__), name)
    return value
