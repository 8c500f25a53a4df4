"""Locks on files, which the system releases however a process ends, so that dead processes can be told.

They are POSIX record locks, which belong to one process (children that load data don't inherit them), and which work
over NFS too.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Entered under a lock on a file: no other process is inside the same lock meanwhile."""
    import fcntl

    with path.open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


class Claim:
    """A claim of this process on something, which lasts as long as the process lives.

    Args:
        path: the file of the claim, which is made.
    """

    def __init__(self, path: Path) -> None:
        import fcntl

        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file: IO[str] = path.open("a")
        fcntl.lockf(self.file, fcntl.LOCK_EX)

    def release(self) -> None:
        """Release the claim."""
        self.path.unlink(missing_ok=True)
        self.file.close()


def is_claimed(path: Path) -> bool:
    """Return whether another process has a claim on this file, and is alive."""
    import fcntl

    with suppress(FileNotFoundError), path.open("r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
