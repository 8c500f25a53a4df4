"""Printing that doesn't end a run where it fails: at a closed pipe, a lost terminal or a full disk."""

import os
import sys
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

FAILURES = (OSError, ValueError)
"""The errors of writing to a stream that is broken or closed."""


class OutputWarning(UserWarning):
    """What this process prints can't be written. The process goes on."""


def say(line: str, stream: TextIO | None = None) -> bool:
    """Print a line at once, and return whether that succeeded.

    Args:
        line: the line, without a line break at its end.
        stream: where to print; None means ``sys.stdout`` as it is now.
    """
    try:
        print(line, file=stream, flush=True)
    except FAILURES as error:
        give_up(sys.stdout if stream is None else stream, error)
        return False
    return True


def console_for_tables(width: int = 140) -> "Console":
    """Make a console as wide as the terminal.

    Args:
        width: in columns, where the output is a file or a pipe: that has none, and rows are easier to read unbroken.
    """
    from rich.console import Console  # who prints no table needn't import it

    return Console(width=None if sys.stdout is not None and sys.stdout.isatty() else width)


def give_up(stream: TextIO, error: Exception) -> None:
    """Redirect a broken stream to nowhere from here on. The stream still holds the line that couldn't be written, with
    which the user's next print would fail too, and Python's flush at the end of the process (status 120).
    """
    with suppress(*FAILURES):  # the stream may be closed, or no file of the system
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
