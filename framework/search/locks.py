"""Locks on files, which the system releases however a process ends, so that dead processes can be told.

A claim is a POSIX record lock, which belongs to one process: children that load data don't inherit it, as they would a
lock of the package filelock's, which stands in on Windows.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Entered under a lock on a file: no other process is inside the same lock meanwhile."""
    while (release := try_to_lock(path)) is None:
        time.sleep(0.01)
    try:
        yield
    finally:
        release()


class Claim:
    """A claim of this process on something, which lasts as long as the process lives.

    Args:
        path: the file of the claim, which is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        while (release := try_to_lock(path)) is None:  # another process asks just now whether it is claimed
            time.sleep(0.01)
        self._release = release

    def release(self) -> None:
        """Release the claim."""
        with suppress(PermissionError):  # Windows removes no file that is open
            self.path.unlink(missing_ok=True)
        self._release()


def is_claimed(path: Path) -> bool:
    """Return whether another process has a claim on this file, and is alive."""
    if not path.exists():
        return False
    if (release := try_to_lock(path)) is None:
        return True
    release()
    return False


def try_to_lock(path: Path) -> Callable[[], None] | None:
    """Lock a file for this process, and return what releases it; None where another process has it."""
    try:
        import fcntl
    except ImportError:
        import filelock

        lock = filelock.FileLock(path)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return None
        return lock.release
    file = path.open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file.close
