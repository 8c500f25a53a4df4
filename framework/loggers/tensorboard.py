"""A logger that writes TensorBoard event files."""

from pathlib import Path
from typing import Any

from .base import LoggedRun, Logger


class TensorBoardLogger(Logger):
    """Writes scalars that ``tensorboard --logdir <directory>`` shows.

    "eval_loss" is shown as "eval/loss" and training numbers under "train/". A resumed run hides what a killed one wrote
    beyond the step it resumes from. Where the event file can't be written, the next log begins another one.

    Args:
        directory: of the event files; None means ``<output_dir>/tensorboard``, and the ``run_name`` in there.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = None if directory is None else Path(directory).expanduser()
        self.current: Path | None = None  # the directory that was opened last
        self.writer: Any = None
        self.last_step = 0

    def open(self, fit: LoggedRun) -> None:
        """Start an event file."""
        self.current = self.directory or Path(fit.args.output_dir, "tensorboard", fit.args.run_name or "")
        self.last_step = 0
        self._start(fit.state.global_step)

    def begin(self, fit: LoggedRun) -> None:
        """Start another file where training resumes from an earlier update than the last one in this file."""
        step = fit.state.global_step
        if 0 < step < self.last_step:
            self._let_go()
            self._start(step)
        self.last_step = step

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Add each number as a scalar."""
        if self.writer is None:
            self._start(0)
        try:
            for name, value in metrics.items():
                group, _, rest = name.partition("_")
                tag = f"{group}/{rest}" if group == "eval" else f"train/{name}"
                self.writer.add_scalar(tag, value, step)
        except Exception:
            self.writer = None  # its thread has failed: from now on it raises the same error, and never writes again
            raise
        self.last_step = max(self.last_step, step)

    def flush(self) -> None:
        """Write out what is buffered."""
        if self.writer is not None:
            try:
                self.writer.flush()
            except Exception:
                self.writer = None
                raise

    def close(self) -> None:
        """Write out what is buffered, and end the file."""
        self.current = None
        self._let_go()

    def _start(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # importing it takes half a second

        self.writer = SummaryWriter(str(self.current), purge_step=step + 1 if step else None)

    def _let_go(self) -> None:
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.close()
