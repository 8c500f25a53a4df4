"""Ending this process at once, from any thread, without leaving anything behind."""

import multiprocessing
import os
import sys
from contextlib import suppress
from typing import NoReturn

from ..printing import FAILURES, say


def end_process(status: int, line: str = "") -> NoReturn:
    """End this process without waiting for its main thread, whose collective may never return.

    Args:
        status: of the process, see ``strategies/statuses.py``.
        line: printed first; empty prints nothing.
    """
    if line:
        say(line, sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(*FAILURES, AttributeError):
            stream.flush()
    for child in multiprocessing.active_children():  # workers that load data
        child.kill()
    os._exit(status)
