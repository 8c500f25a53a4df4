"""Saving a run's checkpoints into its directory, at once or in the background, and removing the oldest."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...strategies.base import Strategy
from ..agreement import on_all_ranks
from ..arguments import FitArguments
from ..callbacks import Callbacks
from ..measures.best import best_checkpoints
from . import naming
from .directory import CheckpointError
from .run_directory import RunDirectory

if TYPE_CHECKING:
    from .contents import Snapshot
    from .kept_files import KeptFiles
    from .writing import BackgroundWriter  # importing it takes longer than training a small model


class Saver:
    """Saves the checkpoints of one ``train``, and what is saved of its run afterwards.

    Args:
        strategy: its ranks write together.
        args: of the run.
        callbacks: are told of each checkpoint, and asked which they still need.
        tell: called on the main process, by the thread that writes, with "save" or "remove" and a checkpoint's path.

    Attributes:
        directory: where the checkpoints go.
        writer: writes in the background; None where nothing was written that way.
        kept: the files of frozen tensors that the checkpoints so far have; None before the first.
        seconds: that the longest save kept training waiting.
    """

    def __init__(
        self, strategy: Strategy, args: FitArguments, callbacks: Callbacks, tell: Callable[[str, Path], None]
    ) -> None:
        self.strategy, self.args, self.callbacks, self.tell = strategy, args, callbacks, tell
        self.directory = RunDirectory(strategy, args)
        self.writer: BackgroundWriter | None = None
        self.kept: KeptFiles | None = None
        self.seconds = 0.0
        self.names: dict[int, tuple[str, ...]] = {}  # that were given to the checkpoint of an update

    def follow(self, strategy: Strategy) -> None:
        """Have the ranks write together as another strategy says; nothing is under way."""
        self.strategy = strategy
        self.directory.follow(strategy)

    def save(
        self, take: Callable[[Sequence[str]], "Snapshot"], update: int, best: Sequence[int], name: str | None = None
    ) -> Path:
        """Save the run as ``checkpoint-<update>``, then remove the oldest beyond ``save_total_limit``. Collective.

        Args:
            take: takes the snapshot of now, with the names of the checkpoint.
            update: that the run stands at.
            best: the updates of the evaluations so far, the best first.
            name: gives the checkpoint a name, beside those that it may have; rotation leaves it.

        Raises:
            CheckpointError: on every rank, where one could not write, or where ``take`` refuses, or another checkpoint
                of the run has the name: then nothing in the directory has changed.
            ValueError: it can't be a name.
        """
        began = time.monotonic()
        directory = self.directory
        had = self.names.get(update, ()) or naming.names_at(directory.path, directory.line, update)
        if name is not None:
            naming.check_name(name)
            directory.on_main(lambda: naming.check_is_free(name, directory.path, directory.line, update, self.names))
        names = tuple(dict.fromkeys([*had, *([name] if name is not None else [])]))
        with without_collector():
            self._save(take, update, best, names)
        self.seconds = max(self.seconds, time.monotonic() - began)
        return directory.path / f"checkpoint-{update}"

    def _save(
        self, take: Callable[[Sequence[str]], "Snapshot"], update: int, best: Sequence[int], names: tuple[str, ...]
    ) -> None:
        from .kept_files import KeptFiles
        from .writing import BackgroundWriter, share_of, write

        self.kept = self.kept or KeptFiles()
        snapshot = take(names)
        self.names[update] = names
        with self.directory.saving(update) as path:

            def published() -> None:
                if self.strategy.is_main:
                    self.directory.note_published(path)
                    self.tell("save", path)
                    self.callbacks.checkpoint_published(path)
                    self._rotate(best)

            if self.args.async_save:
                if self.writer is None:
                    self.writer = BackgroundWriter(self.strategy)
                self.writer.start(snapshot, path, published, self.kept)
                if not self.directory.is_at_work:
                    self.writer.finish()
            else:
                write(share_of(snapshot, self.strategy, self.kept), path, self.strategy)
                on_all_ranks(self.strategy, published, CheckpointError)

    def rotate(self, best: Sequence[int]) -> None:
        """Remove the oldest checkpoints of the run's line beyond ``save_total_limit``, but for the best, the newest,
        those with a name and those that a callback still needs. Collective.
        """

        def rotate() -> None:
            if self.strategy.is_main:
                self._rotate(best)

        on_all_ranks(self.strategy, rotate, CheckpointError)

    def _rotate(self, best: Sequence[int]) -> None:
        removed = self.directory.rotate(
            self.args.save_total_limit,
            keep=best_checkpoints(self.args, best),
            spare=self.callbacks.checkpoints_to_keep(),
        )
        for path in removed:
            self.tell("remove", path)

    # The thread that writes.

    def has_failed(self) -> bool:
        """Whether writing in the background has failed, which ``finish`` then raises."""
        return self.writer is not None and self.writer.has_failed()

    def raise_failure(self) -> None:
        """Raise what writing in the background has failed with, where it has."""
        if self.has_failed():
            self.finish()

    def finish(self) -> None:
        """Wait until nothing is under way, and raise what the write failed with."""
        if self.writer is not None:
            self.writer.finish()

    def close(self) -> None:
        """Wait for the checkpoint under way, and end the thread and the process group that wrote it. Collective."""
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.close()

    def abandon(self) -> None:
        """End the thread once what is under way is written, or has failed: training has, perhaps on this rank alone."""
        if self.writer is not None:
            self.writer.abandon()

    def let_go(self) -> None:
        """Wait for what is under way, whatever becomes of it, and let go of the thread and its connections."""
        writer, self.writer = self.writer, None
        if writer is not None:
            with contextlib.suppress(Exception):  # of a run that failed; the others may have left it half done
                writer.finish()
            writer.abandon()


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """In here Python doesn't look for garbage in cycles. It would look through all objects of the process whenever
    there are many new ones: with 40,000 tensors to name, that takes longer than to write them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
