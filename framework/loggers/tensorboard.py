"""TensorBoard event files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import Logger

if TYPE_CHECKING:
    from ..fit import Fit


class TensorBoardLogger(Logger):
    """Writes scalars that ``tensorboard --logdir <directory>`` shows.

    "eval_loss" is shown as "eval/loss" and training numbers under "train/". A resumed run hides what a killed one wrote
    beyond the step it resumes from.

    Args:
        directory: of the event files; None means ``<output_dir>/tensorboard``, and the ``run_name`` in there.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = None if directory is None else Path(directory).expanduser()
        self.writer: Any = None

    def open(self, fit: "Fit") -> None:
        """Start an event file."""
        from torch.utils.tensorboard import SummaryWriter  # half a second that only runs with TensorBoard pay

        directory = self.directory or Path(fit.args.output_dir, "tensorboard", fit.args.run_name or "")
        step = fit.state.global_step
        self.writer = SummaryWriter(str(directory), purge_step=step + 1 if step else None)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Add each number as a scalar."""
        if self.writer is None:
            return
        for name, value in metrics.items():
            group, _, rest = name.partition("_")
            tag = f"{group}/{rest}" if group == "eval" else f"train/{name}"
            self.writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Write everything out."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None
