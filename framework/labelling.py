"""Labelled: an object some of whose methods can be wrapped for a while, for who measures it. Else it costs nothing."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, ClassVar

Label = Callable[[str], AbstractContextManager[Any]]
"""Makes what is entered around a phase of the run, given the phase's name."""


class Labelled:
    """An object whose methods are phases of a run.

    Attributes:
        PHASES: the name of a method to that of its phase.
    """

    PHASES: ClassVar[Mapping[str, str]] = {}
    _unlabelled: Mapping[str, Any] | None = None

    def begin_labels(self, label: Label, methods: Iterable[str] | None = None) -> None:
        """Enter what ``label`` makes around each call of a method, until ``end_labels``.

        Args:
            label: makes the context.
            methods: of ``PHASES``; None takes all.
        """
        self.end_labels()
        chosen = self.PHASES if methods is None else methods
        self._unlabelled = {method: vars(self).get(method) for method in chosen}
        for method in chosen:
            setattr(self, method, within(label, self.PHASES[method], getattr(self, method)))

    def end_labels(self) -> None:
        """Have the methods be what they were."""
        for method, own in (self._unlabelled or {}).items():
            if own is None:
                vars(self).pop(method, None)
            else:
                setattr(self, method, own)
        self._unlabelled = None


def within(label: Label, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that enters a phase's context around each call of another."""

    @wraps(call)
    def labelled(*arguments: Any, **named: Any) -> Any:
        with label(phase):
            return call(*arguments, **named)

    return labelled
