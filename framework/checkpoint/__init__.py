"""Checkpoints: one format for every strategy, without pickle, there whole or not at all."""

from .contents import load_weights, restore, take
from .directory import CheckpointError, rotate
from .export import export
from .finding import find
from .writing import BackgroundWriter, write

__all__ = [
    "BackgroundWriter",
    "CheckpointError",
    "export",
    "find",
    "load_weights",
    "restore",
    "rotate",
    "take",
    "write",
]
