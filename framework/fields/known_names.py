"""A dataclass that refuses names which aren't its fields', with what to write instead."""

from typing import Any

from .argument_types import hints
from .foreign_arguments import unknown_argument


class KnownNames:
    """The base of a dataclass of arguments. It isn't the dataclass itself that makes the check, since parsers take the
    parameters of a class's own ``__new__`` for its fields.
    """

    def __new__(cls, *values: Any, **arguments: Any) -> Any:
        """Make the object, where all names are names of fields.

        Raises:
            TypeError: a name isn't; the message says what to write instead, or suggests the nearest names.
        """
        known = hints(cls)
        for name in arguments:
            if name not in known:
                raise TypeError(unknown_argument(name, known))
        return super().__new__(cls)
