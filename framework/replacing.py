"""Files that are replaced whole: a reader, or a kill, finds the old one or the new one. They aren't flushed."""

import os
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Write a file beside its name and then give it the name. The directory is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def remove_partial(path: Path) -> None:
    """Remove what was written beside a file by processes that were killed before they could give it the name."""
    for partial in path.parent.glob(f"{path.name}.*.partial"):
        with suppress(OSError):  # another process may have been about to
            partial.unlink()
