"""Checkpoints: one format for every strategy, without pickle, there whole or not at all."""

from .contents import read_state, restore, take, write
from .directory import CheckpointError, newest_whole, rotate, verify

__all__ = ["CheckpointError", "newest_whole", "read_state", "restore", "rotate", "take", "verify", "write"]
