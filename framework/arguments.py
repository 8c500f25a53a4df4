"""FitArguments, every option of a run: the fields of argument_fields.py, checked together when they are made."""

import os
from dataclasses import InitVar, dataclass
from typing import Any

from .fields import accumulation, argument_ranges, batch_limits, cadence, durations
from .fields.argument_fields import ArgumentFields
from .fields.argument_types import (
    Options,
    as_options,
    hints,
    path_of,
    type_problems,
    with_help,
)
from .fields.foreign_arguments import unknown_argument
from .optim import optimizers, schedulers


@dataclass(frozen=True)
class FitArguments(ArgumentFields):  # noqa: D101 (its documentation is that of the fields)
    __doc__ = ArgumentFields.__doc__

    deterministic: InitVar[bool | None] = None
    """Lightning's name for ``full_determinism``, which it sets."""

    def __new__(cls, *values: Any, **arguments: Any) -> "FitArguments":
        """Make the object, where all names are names of fields.

        Raises:
            TypeError: a name isn't; the message says what to write instead, or suggests the nearest name.
        """
        known = hints(cls)
        for name in arguments:
            if name not in known:
                raise TypeError(unknown_argument(name, known))
        return super().__new__(cls)

    def __post_init__(self, deterministic: bool | None) -> None:
        if deterministic is not None:
            if not isinstance(deterministic, bool):
                raise ValueError(
                    f"deterministic={deterministic!r}: must be True or False. With True, an operation that has no "
                    "deterministic algorithm ends training with torch's error."
                )
            object.__setattr__(self, "full_determinism", deterministic)
        if isinstance(self.output_dir, str):
            object.__setattr__(self, "output_dir", os.path.expanduser(self.output_dir))
        if callable(self.optim):
            object.__setattr__(self, "optim", path_of(self.optim))
        for name, kind in hints(type(self)).items():
            if kind is Options:
                object.__setattr__(self, name, as_options(getattr(self, name)))
        object.__setattr__(self, accumulation.NAME, accumulation.as_schedule(getattr(self, accumulation.NAME)))
        for name in batch_limits.LIMITS:
            object.__setattr__(self, name, batch_limits.as_limit(getattr(self, name)))
        object.__setattr__(self, "max_time", durations.as_duration(self.max_time))
        if self.fast_dev_run is True:
            object.__setattr__(self, "fast_dev_run", 1)
        elif self.fast_dev_run is False:
            object.__setattr__(self, "fast_dev_run", 0)
        problems = [f"{name}={getattr(self, name)!r}: {why}" for name, why in self._problems()]
        if problems:
            raise ValueError("These arguments can't work:\n  " + "\n  ".join(problems))

    def _problems(self) -> list[tuple[str, str]]:
        """Return (field, why it can't work and what to write instead) for every field that can't work. The file of each
        subject knows the rules for its fields.
        """
        return type_problems(self) or [
            *argument_ranges.problems(self),
            *accumulation.problems(self),
            *batch_limits.problems(self),
            *cadence.problems(self),
            *schedulers.problems(self),
            *optimizers.problems(self),
        ]


with_help(FitArguments)
