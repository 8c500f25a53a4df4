"""A lock on the directory of a run, so that no two processes save into it, rotate it or tidy it at once.

It is a POSIX record lock, which the system releases however the process ends, so that a killed process leaves nothing
behind. A record lock belongs to one process alone. A lock by flock, which the package filelock takes, is inherited by
forked children that load data; these may outlive a killed run by some seconds, in which its restart would be refused.
Record locks work over NFS, too. Windows has none, and no forks either: there, filelock's is taken. A process isn't kept
out by its own record lock, so the locks of this process are also kept in a table here.
"""

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .directory import CheckpointError

LOCK = "run.lock"
PATIENCE = 5.0  # seconds to wait: ranks whose launcher was killed take a moment to end, and a restart may be quicker
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}

# The real path of a locked directory to the id of the process that locked it: this process, or its parent.
held: dict[str, int] = {}
without_locks: set[str] = set()  # real paths of directories that can't be locked, of which a warning was given


class DirectoryLock:
    """Keeps other processes out of a directory while this one works there.

    Args:
        directory: it must exist when the lock is taken.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.place = ""
        self.descriptor: int | None = None
        self.owner: dict[str, Any] = {}
        self._release_filelocks: Callable[[], Any] = int  # of a lock that was never taken: nothing

    def take(self) -> None:
        """Lock the directory. Wait a few seconds for a process that may be about to end.

        Raises:
            CheckpointError: another process works there; the message says which.
            OSError: the file of the lock can't be made.
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
        """Lock the directory where no other process holds the lock, and return whether it is locked now."""
        place = os.path.realpath(self.directory)
        if held.get(place) == os.getpid() or not self._try_to_take():
            return False
        self.place = place
        held[place] = os.getpid()
        return True

    def name(self, run: str) -> None:
        """Write down who holds the lock, for the error of a process that is refused.

        Args:
            run: the id of the run; "" while it isn't known.
        """
        if self.descriptor is None:
            return
        since = self.owner.get("since", time.strftime("%Y-%m-%d %H:%M:%S"))
        self.owner = {"host": socket.gethostname(), "pid": os.getpid(), "run": run, "since": since}
        text = (json.dumps(self.owner) + "\n").encode()
        with contextlib.suppress(OSError):  # the disk may be full; the lock holds all the same
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, text, 0)

    def release(self) -> None:
        """Release the lock where it is held."""
        if not self.place:
            return
        if held.get(self.place) == os.getpid():
            del held[self.place]
        self.place = ""
        self._release_filelocks()
        if self.descriptor is not None:
            with contextlib.suppress(OSError):  # somebody may have removed the file, or the directory
                (self.directory / LOCK).unlink()
            os.close(self.descriptor)
            self.descriptor = None

    def _try_to_take(self) -> bool:
        """Take the lock, and return whether this process holds it now. A filesystem without locks always grants it."""
        try:
            import fcntl
        except ImportError:
            return self._try_to_take_filelocks()
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
        if not is_at(descriptor, self.directory / LOCK):  # its last owner has removed the file meanwhile
            os.close(descriptor)
            return False
        self.descriptor = descriptor
        self.name("")
        return True

    def _try_to_take_filelocks(self) -> bool:
        import filelock

        lock = filelock.FileLock(self.directory / LOCK)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return False
        self._release_filelocks = lock.release
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
    """Return whether an open file still has this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
