"""A lock on a run's directory, so that no two processes save into it, rotate it or tidy it at once.

It is a POSIX record lock, which the system releases however its process ends: one that was killed leaves nothing that
would have to be recognized. It belongs to the process alone: flock, which the package filelock takes, is inherited by
the forked children that load data, and those may outlive a killed run by some seconds, in which its restart would be
refused. Record locks work over NFS, too. A process is never kept out by a record lock of its own, so that those this
process holds are also kept in a table here.
"""

import contextlib
import errno
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from .directory import CheckpointError

LOCK = "run.lock"
PATIENCE = 5.0  # seconds: ranks whose launcher was killed take a moment to end, and its restart may be quick
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}

# The real path of a locked directory to the process that locked it: this one, or one that has forked it.
held: dict[str, int] = {}
without_locks: set[str] = set()  # real paths of directories of which it was said that they can't be locked


class DirectoryLock:
    """Keeps other processes out of a directory while this one works there.

    Args:
        directory: exists when the lock is taken.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.place = ""
        self.descriptor: int | None = None
        self.owner: dict[str, Any] = {}

    def take(self) -> None:
        """Lock the directory; wait a few seconds for a process that is about to end.

        Raises:
            CheckpointError: another process works there; the message says which.
            OSError: the lock's file can't be made.
        """
        place = os.path.realpath(self.directory)
        if held.get(place) == os.getpid():
            raise CheckpointError(
                f"{self.directory} is in use by another Fit of this process ({os.getpid()}), which is still in train "
                "or save_checkpoint. Give this one an output_dir of its own."
            )
        deadline = time.monotonic() + PATIENCE
        while not self._try_to_take():
            if time.monotonic() > deadline:
                raise CheckpointError(self._refusal())
            time.sleep(0.1)
        self.place = place
        held[place] = os.getpid()

    def try_to_take(self) -> bool:
        """Lock the directory if no one else has, and say whether that was so."""
        place = os.path.realpath(self.directory)
        if held.get(place) == os.getpid() or not self._try_to_take():
            return False
        self.place = place
        held[place] = os.getpid()
        return True

    def name(self, run: str) -> None:
        """Write down who holds the lock, for those who are refused.

        Args:
            run: id of the run; "" while it isn't known.
        """
        if self.descriptor is None:
            return
        since = self.owner.get("since", time.strftime("%Y-%m-%d %H:%M:%S"))
        self.owner = {"host": socket.gethostname(), "pid": os.getpid(), "run": run, "since": since}
        text = (json.dumps(self.owner) + "\n").encode()
        with contextlib.suppress(OSError):  # a full disk; the lock itself holds
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, text, 0)

    def release(self) -> None:
        """Let others in; nothing where the lock isn't held."""
        if not self.place:
            return
        if held.get(self.place) == os.getpid():
            del held[self.place]
        self.place = ""
        if self.descriptor is not None:
            with contextlib.suppress(OSError):  # someone removed it, or the whole directory
                (self.directory / LOCK).unlink()
            os.close(self.descriptor)
            self.descriptor = None

    def _try_to_take(self) -> bool:
        """Whether the lock is this process's now; on a filesystem without locks it always is."""
        try:
            import fcntl
        except ImportError:  # not a POSIX system
            self._say_there_are_no_locks("this system has no POSIX locks")
            return True
        descriptor = os.open(self.directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in WITHOUT_LOCKS:
                (self.directory / LOCK).unlink(missing_ok=True)
                self._say_there_are_no_locks(error.strerror)
                return True
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        if not is_at(descriptor, self.directory / LOCK):  # its last owner removed it meanwhile
            os.close(descriptor)
            return False
        self.descriptor = descriptor
        self.name("")
        return True

    def _say_there_are_no_locks(self, why: str | None) -> None:
        place = os.path.realpath(self.directory)
        if place in without_locks:
            return
        without_locks.add(place)
        print(
            f"{self.directory} can't be locked ({why}): see to it yourself that no two processes train in it.",
            file=sys.stderr,
        )

    def _refusal(self) -> str:
        try:
            owner = json.loads((self.directory / LOCK).read_text())
            run = f", run {owner['run']}" if owner["run"] else ""
            who = f"process {owner['pid']} on {owner['host']}{run}, since {owner['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            who = f"another process, which holds a lock on {self.directory / LOCK}"
        return (
            f"{self.directory} is in use by {who}. Two runs in one directory would remove each other's checkpoints: "
            "wait for that one or end it, or write another output_dir."
        )


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still goes by that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
