"""Functions of a package that are others while a rank is played."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def exchanged(owner: Any, **functions: Any) -> Iterator[None]:
    """In here an owner has other functions."""
    own = {name: getattr(owner, name) for name in functions}
    for name, function in functions.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(owner, name, function)
