"""Files that this process opens to write, below a directory: what is opened in their place, or done before."""

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def before_writing(directory: str | Path, do: Callable[[str], None]) -> Iterator[None]:
    """In here, something is done before Python opens a file to write below a directory.

    Args:
        directory: it needn't be there yet.
        do: called with the file's absolute path; what it raises, ``open`` raises.
    """

    def replaced(before: Callable[..., Any], path: str, *args: Any, **options: Any) -> Any:
        do(path)
        return before(*args, **options)

    with _replaced_open(directory, replaced):
        yield


@contextmanager
def writing_through(directory: str | Path, raw: Callable[..., io.RawIOBase]) -> Iterator[None]:
    """In here, what Python opens to write below a directory is written through another file object.

    Args:
        directory: it needn't be there yet.
        raw: (path, mode, closefd, opener) to the unbuffered file, such as a subclass of io.FileIO.
    """

    def replaced(
        before: Callable[..., Any], path: str, file: Any, mode: str = "r", buffering: int = -1,
        encoding: str | None = None, errors: str | None = None, newline: str | None = None, closefd: bool = True,
        opener: Any = None,
    ) -> Any:  # fmt: skip
        unbuffered: Any = raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return unbuffered
        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        buffered: Any = io.BufferedRandom(unbuffered, size) if "+" in mode else io.BufferedWriter(unbuffered, size)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)

    with _replaced_open(directory, replaced):
        yield


@contextmanager
def _replaced_open(directory: str | Path, replaced: Callable[..., Any]) -> Iterator[None]:
    """Have builtins.open, and pathlib's, which is io.open, come by here."""
    place = os.path.realpath(Path(directory).expanduser())
    before = builtins.open, io.open

    def passing(original: Callable[..., Any]) -> Callable[..., Any]:
        def open_(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if isinstance(file, str | os.PathLike) and set(mode) & set("wax+"):
                path = os.path.realpath(os.fspath(file))
                if path.startswith(place + os.sep):
                    return replaced(original, path, file, mode, *args, **options)
            return original(file, mode, *args, **options)

        return open_

    builtins.open, io.open = passing(before[0]), passing(before[1])
    try:
        yield
    finally:
        builtins.open, io.open = before
