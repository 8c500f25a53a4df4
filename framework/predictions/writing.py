"""Writing: one prediction on its way to the disk, by all ranks together; it has its name when it is whole."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ...strategies.base import Strategy
from ..agreement import on_all_ranks
from ..arguments import FitArguments
from ..checkpoint.directory import PARTIAL, REPLACED, flush, remove, write_text
from ..measures.outputs import KeptOutputs, to_host
from . import parquet
from .columns import columns_of
from .options import PredictionWriter, writer_of
from .order import run_lengths
from .parts import ParquetPart, Part, TensorPart
from .reading import INDEX, VERSION


class PredictionError(ValueError):
    """Predictions that couldn't be written; the message says what failed, and on which rank."""


class Writing:
    """Writes one prediction: each rank its own rows, and the main process what joins them. Collective.

    Args:
        writer: says where.
        strategy: set up; its ranks see one directory.
        pad_index: fills up rows of shorter batches, where they are joined.

    Raises:
        PredictionError: on every rank, where something is in the way, or can't be written.
        ImportError: pyarrow is needed and isn't there.
    """

    def __init__(self, writer: PredictionWriter, strategy: Strategy, pad_index: int) -> None:
        self.writer, self.strategy, self.pad_index = writer, strategy, pad_index
        self.final = writer.place
        self.partial = self.final.with_name(self.final.name + PARTIAL)
        if writer.is_parquet:
            parquet.check_package()
        on_all_ranks(strategy, lambda: self._clear() if strategy.is_main else None, PredictionError)
        kind = ParquetPart if writer.is_parquet else TensorPart
        self.part: Part = kind(writer, self.partial, strategy.rank, pad_index)
        self.failure: Exception | None = None

    def _clear(self) -> None:
        """Make an empty directory to write into; remove what a killed prediction left there."""
        final, replaced = self.final, self.final.with_name(self.final.name + REPLACED)
        if self.writer.is_parquet and final.is_dir():
            raise PredictionError(f"output={str(final)!r} is a directory. Write the path of a file, or remove it.")
        if not self.writer.is_parquet and final.exists() and not is_ours(final):
            raise PredictionError(
                f"output={str(final)!r} is there, and isn't a directory of predictions, which would be replaced. Write "
                "another output."
            )
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        remove(replaced)
        remove(self.partial)
        self.partial.mkdir(parents=True)

    # While it predicts.

    def keep(self, ignored: Collection[str], batches: int, preprocess: Callable[[Any, Any], Any] | None) -> KeptOutputs:
        """Make what takes the outputs of an evaluation, see KeptOutputs, and hands them on to be written."""
        return WrittenOutputs(self, ignored, batches, preprocess)

    def add(self, outputs: Any, labels: Any) -> None:
        """Take a batch on the host. A failure is kept until all ranks can hear of it."""
        self._try(lambda: self.part.add(columns_of(outputs, labels)))

    def close(self) -> None:
        """Write the rest of this rank's rows. A failure is kept, too."""
        self._try(self.part.close)

    def _try(self, action: Callable[[], None]) -> None:
        if self.failure is not None:
            return
        try:
            action()
        except Exception as error:
            if self.strategy.world_size == 1:
                raise
            self.failure = error

    # When it has.

    def finish(self, reports: Sequence[dict[str, Any]]) -> Path:
        """Publish the prediction, and return its path. Collective.

        Args:
            reports: what ``WrittenOutputs.on_host`` gave, of each part in the order of ranks.

        Raises:
            PredictionError: on every rank.
        """

        def raise_failure() -> None:
            if self.failure is not None:
                raise self.failure

        def publish() -> None:
            if self.strategy.is_main:
                self._publish([report for report in reports if report["batches"]])

        try:
            on_all_ranks(self.strategy, raise_failure, PredictionError)  # nothing is published of half the ranks
            on_all_ranks(self.strategy, publish, PredictionError)
        except BaseException:
            if self.strategy.is_main:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise
        return self.final

    def _publish(self, reports: Sequence[dict[str, Any]]) -> None:
        if not reports:
            raise PredictionError("There was nothing to predict: the data is empty.")
        files = [self.partial / name for report in reports for name, _ in report["files"]]
        for file in files:
            if not file.exists():
                raise PredictionError(
                    f"{file} isn't there, which another rank says it wrote. All ranks write below one directory: "
                    "write an output on a filesystem that all machines share."
                )
        sizes = [report["batches"] for report in reports]
        if self.writer.is_parquet:
            whole = files[0]
            if len(files) > 1:
                whole = self.partial / "joined.parquet"
                parquet.join(files, sizes, whole, self.writer)
            flush(whole)
            os.replace(whole, self.final)
            shutil.rmtree(self.partial)
        else:
            parts = [
                {"files": [[name, rows] for name, rows in report["files"]], "batches": run_lengths(report["batches"])}
                for report in reports
            ]
            index = {"version": VERSION, "rows": sum(map(sum, sizes)), "pad_index": self.pad_index, "parts": parts}
            for file in files:
                flush(file)
            write_text(self.partial / INDEX, json.dumps(index) + "\n")
            replaced = self.final.with_name(self.final.name + REPLACED)
            if self.final.exists():
                self.final.rename(replaced)
            self.partial.rename(self.final)
            remove(replaced)
        flush(self.final.absolute().parent)

    def abandon(self) -> None:
        """Let go after a failure, perhaps of this rank alone: what was written is removed by the next prediction, and
        at once where there is one rank.
        """
        self.part.abandon()
        if self.strategy.world_size == 1:
            shutil.rmtree(self.partial, ignore_errors=True)


class Predicting(Protocol):
    """A Fit, as far as its predictions are written."""

    compute_metrics: Any

    @property
    def args(self) -> FitArguments:
        """The arguments of the run."""

    @property
    def strategy(self) -> Strategy:
        """The strategy, set up."""


@contextmanager
def written(output: "str | Path | PredictionWriter", fit: Predicting) -> Iterator["Writing"]:
    """Entered around a prediction that is written where ``output`` says. Collective."""
    writer = writer_of(output)
    if fit.compute_metrics is not None and fit.strategy.is_main:
        warnings.warn(
            "compute_metrics isn't called where predictions are written: it wants all of them at once. Use the "
            "module's metrics(), which fit.evaluate() adds up batch by batch.",
            stacklevel=4,
        )
    writing = Writing(writer, fit.strategy, fit.args.pad_index)
    try:
        yield writing
    except BaseException:
        writing.abandon()
        raise


def is_ours(path: Path) -> bool:
    """Return whether a directory holds nothing, or predictions."""
    return path.is_dir() and ((path / INDEX).is_file() or not any(path.iterdir()))


class WrittenOutputs(KeptOutputs):
    """Outputs and labels that are written as they come, and not kept.

    Args:
        writing: takes them.
        ignored, batches, preprocess: see KeptOutputs.
    """

    are_written = True

    def __init__(
        self,
        writing: Writing,
        ignored: Collection[str],
        batches: int,
        preprocess: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        strategy = writing.strategy
        self.sharing = strategy.context_parallel_size
        super().__init__(ignored, 1 if self.sharing > 1 else batches, preprocess)
        self.writing = writing
        self.place = strategy.rank // strategy.tensor_parallel_size
        self.writes = strategy.rank % strategy.tensor_parallel_size == 0 and self.place % self.sharing == 0

    def move(self) -> None:
        """Write what is on the device."""
        waiting, self.on_device = self.on_device, []
        for outputs, labels in waiting:
            batch: Any = to_host(outputs, self.ignored), to_host(labels)
            if self.sharing > 1:
                batch = self.join(batch)
            if self.writes:
                self.writing.add(*batch)

    def pass_by(self) -> None:
        """Take part where other ranks join a batch of theirs."""
        if self.sharing > 1:
            self.join(None)

    def join(self, batch: Any) -> Any:
        """Return a batch whose sequences are whole, of those of the ranks that share it. Collective."""
        strategy = self.writing.strategy
        everyones = strategy.gather(batch)[:: strategy.tensor_parallel_size]
        first = self.place // self.sharing * self.sharing
        return None if batch is None else strategy.join_outputs(everyones[first : first + self.sharing])

    def on_host(self) -> Any:
        """Return what this rank has written: the rows of its batches, and its files."""
        self.move()
        self.writing.close()
        return {"batches": self.writing.part.batches, "files": self.writing.part.files}
