"""Checkpoints: one format for every strategy, without pickle. A checkpoint exists whole or not at all."""

from ...precision.names import lazy_exports

# These files are imported when they are first used, since torch.distributed.checkpoint takes long to import.
HOMES = {
    "BackgroundWriter": "writing",
    "CheckpointError": "directory",
    "HistoryPart": "log_history",
    "Launch": "line",
    "LogHistory": "log_history",
    "RunDirectory": "run_directory",
    "Saver": "saver",
    "check_can_write": "directory",
    "export": "exporting",
    "check_states": "callback_states",
    "checkpoints_of_last_run": "line",
    "load_weights": "contents",
    "published": "directory",
    "read_history": "log_history",
    "read_state": "schema",
    "remove": "directory",
    "restore": "contents",
    "rotate": "directory",
    "take": "contents",
    "whole_weights": "exporting",
    "write": "writing",
}

__getattr__, __dir__ = lazy_exports(__name__, HOMES)
