"""Disks that are full or slow, for this process."""

import errno
import io
import os
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from .opening import writing_through


class FullDisk(AbstractContextManager["FullDisk"]):
    """In here, writing below a directory fails with ENOSPC once so many bytes were written, as on a disk that is full.

    What Python opens is affected: checkpoints, logs. What a library opens by itself (safetensors' ``save_file``, which
    ``fit.export`` calls) isn't; FileSizeLimit, which the kernel enforces, meets that as well.

    Args:
        directory: files below it; those that are open already aren't affected.
        free: bytes that can be written before, over all files.

    Example:
        >>> with FullDisk("somewhere", free=3):
        ...     _ = open("elsewhere.txt", "w").write("as ever")
    """

    def __init__(self, directory: str | Path, free: int = 0) -> None:
        self.directory, self.free = directory, free
        self._lock = threading.Lock()

    def __enter__(self) -> "FullDisk":
        self._context = writing_through(self.directory, self._file)
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def take(self, wanted: int) -> int:
        """Return how many of the wanted bytes still fit, and count them as written."""
        with self._lock:
            taken = min(wanted, self.free)
            self.free -= taken
        return taken

    def _file(self, *how: Any) -> io.RawIOBase:
        return _Full(self, *how)


class _Full(io.FileIO):
    """A file on a full disk."""

    def __init__(self, disk: FullDisk, *how: Any) -> None:
        super().__init__(*how)
        self._disk = disk

    def write(self, data: Any) -> int:
        """Write what fits.

        Raises:
            OSError: nothing fits.
        """
        data = memoryview(data).cast("B")
        fits = self._disk.take(len(data))
        if len(data) and not fits:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
        return super().write(data[:fits])


class SlowDisk(AbstractContextManager["SlowDisk"]):
    """In here, each write below a directory takes longer. Python's files are affected, as with FullDisk.

    Args:
        directory: files below it; those that are open already aren't affected.
        seconds: that each write waits first. A file is written in few, large ones.
        bytes_per_second: that a write is held to, besides.

    Example:
        ``with SlowDisk("runs/a", seconds=2.0): fit.train()``
    """

    def __init__(self, directory: str | Path, seconds: float = 0.0, bytes_per_second: float = float("inf")) -> None:
        self.directory, self.seconds, self.bytes_per_second = directory, seconds, bytes_per_second

    def __enter__(self) -> "SlowDisk":
        self._context = writing_through(self.directory, self._file)
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def _file(self, *how: Any) -> io.RawIOBase:
        return _Slow(self, *how)


class _Slow(io.FileIO):
    """A file on a slow disk."""

    def __init__(self, disk: SlowDisk, *how: Any) -> None:
        super().__init__(*how)
        self._disk = disk

    def write(self, data: Any) -> int:
        """Wait, and write."""
        time.sleep(self._disk.seconds + memoryview(data).nbytes / self._disk.bytes_per_second)
        return super().write(data) or 0


class FileSizeLimit(AbstractContextManager["FileSizeLimit"]):
    """In here, the kernel refuses to make any file of this process longer than a limit, whoever writes it: EFBIG.

    Args:
        limit: bytes. Standard output counts as well, where it leads to a file.

    Example:
        ``with FileSizeLimit(4096): fit.export("weights.safetensors")``
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __enter__(self) -> "FileSizeLimit":
        import resource  # not on Windows

        # Python ignores SIGXFSZ, which would end the process, from its start.
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self._before[1]))
        return self

    def __exit__(self, *error: Any) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)
