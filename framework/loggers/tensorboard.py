"""A logger that writes TensorBoard event files."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .base import LoggedRun, Logger, grouped
from .values import Array, Histogram, as_markdown


class TensorBoardLogger(Logger):
    """Writes what ``tensorboard --logdir <output_dir>`` shows (the extra ``tensorboard``).

    Training and evaluation are two runs of TensorBoard's, in the directories ``train`` and ``eval``, so that it draws
    both losses into one chart. Arguments are on its pages TEXT and HPARAMS, the latter beside the last numbers of each
    run; totals are text. A resumed run hides what a killed one wrote beyond the step that it resumes from, and a run
    that begins anew hides an earlier one in the same directory. Where an event file can't be written, the next log
    begins another one.

    Args:
        directory: that holds both; None means ``output_dir``, and the ``run_name`` in there.
    """

    package = ("tensorboard", "tensorboard")

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = None if directory is None else Path(directory).expanduser()
        self.current = Path()
        self.writers: dict[str, Any] = {}  # by the directory in the current one
        self.hides_from: int | None = None  # the step from which on earlier files of the directory are hidden
        self.last_step: int | None = None  # None before the first training

    def open(self, fit: LoggedRun) -> None:
        """Note the directory."""
        self.current = self.directory or Path(fit.args.output_dir, fit.args.run_name or "")
        self.hides_from = self.last_step = None

    def begin(self, fit: LoggedRun) -> None:
        """Hide what a killed run, or another one, has written, and write the arguments."""
        step = fit.state.global_step
        is_first = self.last_step is None
        if is_first or 0 < step < (self.last_step or 0):
            self.close()
            self.hides_from = step + 1 if step else 0
            for group in ("train", "eval", "test"):
                if any(self.current.glob(f"{group}/events.out.tfevents.*")):
                    with self._writing(group):  # it hides what was there, even where nothing is written
                        pass
        self.last_step = step
        if is_first and not fit.is_resumed:
            with self._writing("") as writer:
                write_arguments(writer, fit)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Add each number as a scalar, and totals as text. Epochs are left out, which make a chart of their own."""
        for group, numbers in grouped(metrics).items():
            if group == "totals":
                self.text("totals", as_markdown(("total", "value"), [*numbers.items()]), step)
                continue
            # TensorBoard gathers charts by what is before "/".
            scalars = {tag if "/" in tag else f"metrics/{tag}": v for tag, v in numbers.items() if tag != "epoch"}
            if scalars:
                with self._writing(group) as writer:
                    add_scalars(writer, scalars, step)
        self.last_step = None if self.last_step is None else max(self.last_step, step)

    def image(self, name: str, image: Array, step: int) -> None:
        """Add an image."""
        with self._writing("") as writer:
            writer.add_image(name, image, step, dataformats="HWC")

    def text(self, name: str, text: str, step: int) -> None:
        """Add a text."""
        with self._writing("") as writer:
            writer.add_text(name, text, step)

    def histogram(self, name: str, histogram: Histogram, step: int) -> None:
        """Add a histogram, whose values are taken to lie in the middle between their edges."""
        counts, edges = (part.astype(float) for part in histogram)
        middle = (edges[1:] + edges[:-1]) / 2
        sums = counts.sum(), (counts * middle).sum(), (counts * middle**2).sum()
        with self._writing("") as writer:
            writer.add_histogram_raw(name, edges[0], edges[-1], *sums, edges[1:].tolist(), counts.tolist(), step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Add a table as text."""
        self.text(name, as_markdown(columns, rows), step)

    def flush(self) -> None:
        """Write out what is buffered."""
        for group in list(self.writers):
            with self._writing(group) as writer:
                writer.flush()

    def close(self) -> None:
        """Write out what is buffered, and end the files."""
        writers, self.writers = self.writers, {}
        for writer in writers.values():
            writer.close()

    @contextmanager
    def _writing(self, group: str) -> Iterator[Any]:
        """Entered around writing into a directory of the current one."""
        if group not in self.writers:
            from torch.utils.tensorboard import SummaryWriter  # importing it takes half a second

            self.writers[group] = SummaryWriter(str(self.current / group), purge_step=self.hides_from)
        try:
            yield self.writers[group]
        except Exception:
            del self.writers[group]  # its thread has failed: from now on it raises the same error, and never writes
            raise


def add_scalars(writer: Any, scalars: Mapping[str, float], step: int) -> None:
    """Add numbers as one event, which takes a third of the time of an event for each of five."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in scalars.items()]
    writer.file_writer.add_summary(Summary(value=values), step)


def write_arguments(writer: Any, fit: LoggedRun) -> None:
    """Write the arguments as text, and those that differ from the defaults for the page HPARAMS."""
    from torch.utils.tensorboard.summary import hparams

    chosen, settings = fit.chosen(), fit.settings()
    rows = [(f"**{name}**" if name in chosen else name, settings[name]) for name in {**chosen, **settings}]
    writer.add_text("arguments", as_markdown(("argument (**chosen**)", "value"), rows), 0)
    plain = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in chosen.items()
        if not name.startswith(("logging_", "eval_", "save_", "progress"))  # they change no weight
    }
    _, begin, end = hparams(plain, {})  # without a list of metrics, TensorBoard shows all that the runs hold
    for summary in (begin, end):
        writer.file_writer.add_summary(summary)
