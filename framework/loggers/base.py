"""What a logger does: takes numbers by name at a step, on the main process."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..fit import Fit


class Logger:
    """Somewhere numbers go. Called on the main process only.

    Example:
        >>> class Print(Logger):
        ...     def log(self, metrics, step):
        ...         print(step, metrics)
    """

    def open(self, fit: "Fit") -> None:
        """Training begins, or is resumed; files are made here, not in the constructor."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write down numbers that belong to an update."""

    def close(self) -> None:
        """Training is over or has failed; everything logged must be readable after this."""
