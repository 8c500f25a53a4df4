"""FitArguments, every option of a run: the fields of argument_fields.py, checked together when they are made."""

import os
from collections.abc import Sequence
from dataclasses import MISSING, InitVar, dataclass, fields
from typing import Any

from .fields import accumulation, argument_ranges, batch_limits, cadence, compilation, durations
from .fields.argument_fields import ArgumentFields
from .fields.argument_types import (
    Options,
    as_options,
    hints,
    path_of,
    type_problems,
    with_help,
)
from .optim import optimizers, schedulers


class ArgumentsError(ValueError):
    """Arguments that can't work.

    Args:
        problems: (field, its value, why it can't work and what to write instead) of each of them.
    """

    def __init__(self, problems: Sequence[tuple[str, Any, str]]) -> None:
        lines = [f"{name}={value!r}: {why}" for name, value, why in problems]
        super().__init__("These arguments can't work:\n  " + "\n  ".join(lines))
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self.problems,)


@dataclass(frozen=True)
class FitArguments(ArgumentFields):  # noqa: D101 (its documentation is that of the fields)
    __doc__ = ArgumentFields.__doc__

    deterministic: InitVar[bool | None] = None
    """Lightning's name for ``full_determinism``, which it sets."""

    def __post_init__(self, deterministic: bool | None) -> None:
        if deterministic is not None:
            if not isinstance(deterministic, bool):
                why = "must be True or False; an operation that has no deterministic algorithm ends training"
                raise ArgumentsError([("deterministic", deterministic, why)])
            object.__setattr__(self, "full_determinism", deterministic)
        if isinstance(self.output_dir, str):
            object.__setattr__(self, "output_dir", os.path.expanduser(self.output_dir))
        if callable(self.optim):
            object.__setattr__(self, "optim", path_of(self.optim))
        for name, kind in hints(type(self)).items():
            if kind == Options:
                object.__setattr__(self, name, as_options(getattr(self, name)))
        object.__setattr__(self, accumulation.NAME, accumulation.as_schedule(getattr(self, accumulation.NAME)))
        for name in batch_limits.LIMITS:
            object.__setattr__(self, name, batch_limits.as_limit(getattr(self, name)))
        object.__setattr__(self, "max_time", durations.as_duration(self.max_time))
        if isinstance(self.fast_dev_run, bool):
            object.__setattr__(self, "fast_dev_run", int(self.fast_dev_run))
        if problems := self._problems():
            raise ArgumentsError([(name, getattr(self, name), why) for name, why in problems])

    def _problems(self) -> list[tuple[str, str]]:
        """Return (field, why it can't work and what to write instead) for every field that can't work. The file of each
        subject knows the rules for its fields.
        """
        return type_problems(self) or [
            *argument_ranges.problems(self),
            *accumulation.problems(self),
            *batch_limits.problems(self),
            *cadence.problems(self),
            *compilation.problems(self),
            *schedulers.problems(self),
            *optimizers.problems(self),
        ]


with_help(FitArguments)


def other_than_defaults(args: FitArguments) -> list[str]:
    """The names of the arguments that were given another value than their default."""
    found = []
    for field in fields(args):
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        if default is MISSING or getattr(args, field.name) != default:
            found.append(field.name)
    return found
