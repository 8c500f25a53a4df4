"""Files and directories that get their name when they are whole: what fails half-way leaves nothing."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint.directory import PARTIAL, REPLACED, flush, remove


@contextmanager
def placed_whole(target: Path, force: bool, is_alike: Callable[[Path], bool]) -> Iterator[Path]:
    """Entered with a path to write a file or a directory at, which gets its own name, ``target``, at the end.

    Args:
        target: what is there is replaced, with ``force``.
        force: whether it may be.
        is_alike: whether a directory that is there holds what would be written, and may go.

    Raises:
        ValueError: something is there already that isn't replaced.
        OSError: the system refused.
    """
    if os.path.lexists(target):
        if not force:
            raise ValueError(f"{target} is there already. Give another name, or replace it by force=True (--force).")
        if target.is_dir() and not target.is_symlink() and not is_alike(target):
            raise ValueError(f"{target} is a directory of other things, which isn't replaced. Give another name.")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = (target.with_name(target.name + ending) for ending in (PARTIAL, REPLACED))
    remove(partial)  # a killed conversion's
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            flush(path)
        if os.path.lexists(target) and (partial.is_dir() or target.is_dir()):
            remove(replaced)
            target.rename(replaced)
            try:
                partial.rename(target)
            except BaseException:
                replaced.rename(target)
                raise
            remove(replaced)
        else:
            os.replace(partial, target)
        flush(target.parent)
    except BaseException:
        remove(partial)
        raise
