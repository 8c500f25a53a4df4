"""Locks on files, which the system releases when a process ends, however it ends: the living are told from the dead.

They are POSIX record locks: of the process that takes them (children that load data don't inherit them), and good over
NFS too.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """In here no other process is inside the same lock."""
    import fcntl

    with path.open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


class Claim:
    """Says that this process works on something, as long as it lives.

    Args:
        path: of the file, which is made.
    """

    def __init__(self, path: Path) -> None:
        import fcntl

        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file: IO[str] = path.open("a")
        fcntl.lockf(self.file, fcntl.LOCK_EX)

    def release(self) -> None:
        """Take the claim back."""
        self.path.unlink(missing_ok=True)
        self.file.close()


def is_claimed(path: Path) -> bool:
    """Whether another process that claimed something is alive."""
    import fcntl

    with suppress(FileNotFoundError), path.open("r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
