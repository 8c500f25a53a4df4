"""Reading from a place in a file, on every system."""

import os
from io import FileIO


def read_at(file: FileIO, into: memoryview, place: int) -> int:
    """Read bytes from a place in a file, and return how many; 0 at its end. Where the system has no call for it
    (Windows), the file's position moves.
    """
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [into], place)
    file.seek(place)
    return file.readinto(into) or 0
