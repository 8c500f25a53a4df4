"""The word for a strategy that is chosen when a Fit is made: by plans, and by measuring where that is asked for."""

from dataclasses import dataclass
from typing import Any, NoReturn

from ..precision.base import Precision
from .base import Strategy


@dataclass(frozen=True)
class AutoOptions:
    """Options of Auto.

    Args:
        measure: so many of the candidates that fit, the first ones by their plans, make a few updates each, and the
            fastest is taken; 0 goes by plans alone.
    """

    measure: int = 0

    def __post_init__(self) -> None:
        if self.measure < 0 or self.measure == 1:
            raise ValueError(
                f"Auto(measure={self.measure}): it counts the candidates of which the fastest is taken. Write 2 or "
                "more, or 0 to go by plans alone."
            )


class Auto(Strategy):
    """``strategy="auto"``: candidates are planned, and Fit takes one of them before anything is placed. See AutoOptions
    and docs/plan.md.

    Example:
        ``Fit(module, data, strategy=Auto(measure=3))``
    """

    name = "auto"
    Options = AutoOptions
    options: AutoOptions
    needs_ranks = True
    chooses = True
    unplayed = "stands for a strategy that is chosen among candidates: `stratagem plan --auto` plans them."

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.candidates_to_measure = self.options.measure

    def set_up(self, precision: Precision) -> NoReturn:
        """Refuse: Fit takes what was chosen in its place.

        Raises:
            ValueError: always.
        """
        raise ValueError("strategy='auto' stands for a strategy that Fit chooses, and can't be set up. Name one.")
