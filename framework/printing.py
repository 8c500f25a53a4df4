"""Printing that ends no run: nobody may read it any more (``| head -1``, a lost terminal), or the disk be full."""

import os
import sys
import warnings
from contextlib import suppress
from typing import TextIO

FAILURES = (OSError, ValueError)
"""What writing raises to a stream that is broken, or closed."""


class OutputWarning(UserWarning):
    """What this process prints can't be written. It goes on without."""


def say(line: str, stream: TextIO | None = None) -> bool:
    """Print a line at once; whether that could be done.

    Args:
        line: without its end.
        stream: None means ``sys.stdout`` as it is now.
    """
    try:
        print(line, file=stream, flush=True)
    except FAILURES as error:
        give_up(sys.stdout if stream is None else stream, error)
        return False
    return True


def give_up(stream: TextIO, error: Exception) -> None:
    """Have what a broken stream is given written nowhere from here on. It holds the line that couldn't be written, on
    which the user's next print would fail too, and the process when Python flushes it at the end (status 120).
    """
    with suppress(*FAILURES):  # it is closed, or no file of the system's
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
    name = getattr(stream, "name", type(stream).__name__)
    warnings.warn(
        f"Nothing can be written to {name} ({type(error).__name__}: {error}); what would be printed there is lost from "
        "here on. The run goes on.",
        OutputWarning,
        stacklevel=3,
    )
