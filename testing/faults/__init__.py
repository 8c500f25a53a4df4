"""Faults that are brought about on purpose, so that a set-up is proven before an accident does it."""

from .damage import flip_bit
from .data import UnevenData, UnevenStream
from .disks import FileSizeLimit, FullDisk, SlowDisk
from .fault import PHASES, Fault, FaultError
from .gradients import NonfiniteGradient
from .kinds import (
    Delay,
    Exit,
    Kill,
    MismatchedCollective,
    OutOfMemory,
    Raise,
    SignalLauncher,
    SignalSelf,
    Stop,
    Within,
)
from .stores import DeadStore

__all__ = [
    "PHASES",
    "DeadStore",
    "Delay",
    "Exit",
    "Fault",
    "FaultError",
    "FileSizeLimit",
    "FullDisk",
    "Kill",
    "MismatchedCollective",
    "NonfiniteGradient",
    "OutOfMemory",
    "Raise",
    "SignalLauncher",
    "SignalSelf",
    "SlowDisk",
    "Stop",
    "UnevenData",
    "UnevenStream",
    "Within",
    "flip_bit",
]
