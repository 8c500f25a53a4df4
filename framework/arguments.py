"""FitArguments: every option of a run, under the field's names, checked together when they are made."""

import os
from dataclasses import dataclass
from typing import Any

from . import argument_ranges, cadence, optimizers, schedulers
from .argument_fields import ArgumentFields
from .argument_types import Options, as_options, hints, path_of, type_problems, with_help
from .foreign_arguments import unknown_argument


@dataclass(frozen=True)
class FitArguments(ArgumentFields):  # noqa: D101 (its documentation is that of the fields)
    __doc__ = ArgumentFields.__doc__

    def __new__(cls, *values: Any, **arguments: Any) -> "FitArguments":
        """A new object, where the names are those of fields.

        Raises:
            TypeError: one isn't; the message says what is written here instead, or suggests the nearest.
        """
        known = hints(cls)
        for name in arguments:
            if name not in known:
                raise TypeError(unknown_argument(name, known))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.output_dir, str):
            object.__setattr__(self, "output_dir", os.path.expanduser(self.output_dir))
        if callable(self.optim):
            object.__setattr__(self, "optim", path_of(self.optim))
        for name, kind in hints(type(self)).items():
            if kind is Options:
                object.__setattr__(self, name, as_options(getattr(self, name)))
        problems = [f"{name}={getattr(self, name)!r}: {why}" for name, why in self._problems()]
        if problems:
            raise ValueError("These arguments can't work:\n  " + "\n  ".join(problems))

    def _problems(self) -> list[tuple[str, str]]:
        """(field, why it can't work and what to write instead), for every field that can't; each subject's file knows
        its own.
        """
        return type_problems(self) or [
            *argument_ranges.problems(self),
            *cadence.problems(self),
            *schedulers.problems(self),
            *optimizers.problems(self),
        ]


with_help(FitArguments)
