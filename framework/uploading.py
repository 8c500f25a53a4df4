"""A callback that uploads checkpoints in the background, to any URL that fsspec knows."""

import threading
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .arguments import FitArguments
from .callbacks import Callback
from .checkpoint import remote
from .state import Control, TrainState


class UploadWarning(UserWarning):
    """A checkpoint could not be uploaded. It stays where it is, and training goes on."""


class Upload(Callback):
    """Copies each checkpoint to ``<url>/checkpoint-<update>`` while training goes on.

    Only whole checkpoints are uploaded, and a copy is whole once it has its ``manifest.json``, which comes last. The
    main process uploads one checkpoint at a time, and the end of training waits for all of them. ``save_total_limit``
    removes no checkpoint before it is uploaded. An upload that fails is reported by an UploadWarning and as
    ``failed_uploads`` in the logs, and is tried again with the next checkpoint, and by a run that is resumed. Nothing
    waits for a checkpoint that is saved outside of ``train`` (``fit.save_checkpoint()``), but ``wait(seconds)`` does.

    Args:
        url: a folder: "s3://bucket/runs/7", "gs://...", "file:///mnt/backup/7".
        grace: seconds that uploads may still take where training ends with an exception.
        **options: options of the filesystem, as fsspec takes them.

    Raises:
        ValueError: no filesystem goes by that name, or its package isn't installed.

    Example:
        ``Fit(..., save_total_limit=2, callbacks=[Upload("s3://bucket/runs/7")])``, on every rank
    """

    def __init__(self, url: str, *, grace: float = 30.0, **options: Any) -> None:
        self.url = url
        self.grace = grace
        self.filesystem, self.folder = remote.open_filesystem(url, **options)
        # Three threads share what follows: the one that trains, the one that writes checkpoints, the one that uploads.
        self.lock = threading.Lock()
        self.waiting: list[Path] = []
        self.under_way: Path | None = None
        self.failed: dict[Path, str] = {}
        self.unreported: list[tuple[Path, str]] = []
        self.thread: threading.Thread | None = None
        self.has_failed = False  # a log says 0 once, after uploads succeed again

    def on_train_begin(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Upload first what a run that is resumed may have left without an upload."""
        if state.global_step and fit.strategy.is_main:
            self.enqueue(fit.saver.directory.checkpoints())

    def checkpoint_published(self, path: Path) -> None:
        """Upload a checkpoint, and once more those whose upload failed."""
        self.enqueue([*self.failed, path])

    def checkpoints_to_keep(self) -> Iterable[Path]:
        """Return the checkpoints that aren't uploaded yet."""
        with self.lock:
            return [*self.failed, *self.waiting, *([self.under_way] if self.under_way else [])]

    def on_log(
        self, args: FitArguments, state: TrainState, control: Control, *, logs: dict[str, float], **context: Any
    ) -> None:
        """Report the uploads that failed since the last log."""
        self.report()
        if self.has_failed:
            logs["failed_uploads"] = len(self.failed)
            self.has_failed = bool(self.failed)

    def on_train_end(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Wait for the uploads, then remove checkpoints beyond the limit that were kept until they were uploaded."""
        # A collective that lasted as long as uploads may would time out on the ranks that wait: many short ones don't.
        while not fit.strategy.broadcast(self.wait(seconds=1.0)):
            pass
        if self.unreported:
            fit.log({})  # on_log adds the number of failures
        fit.rotate_checkpoints()

    def on_exception(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Give uploads a little time, report what failed, and leave the others to a resumed run."""
        self.wait(self.grace)
        with self.lock:
            late = [*([self.under_way] if self.under_way else []), *self.waiting]
            self.waiting.clear()
            self.unreported += [(path, f"training ended {self.grace:g} s ago") for path in late]
        self.report()

    def enqueue(self, paths: Iterable[Path]) -> None:
        """Upload these checkpoints after those that wait already."""
        with self.lock:
            self.waiting += [path for path in dict.fromkeys(paths) if path not in self.waiting]
            if self.waiting and self.thread is None:
                # The thread is a daemon, since a filesystem that hangs must not keep the process from ending.
                self.thread = threading.Thread(target=self.work, name="upload", daemon=True)
                self.thread.start()

    def work(self) -> None:
        """Upload the checkpoints that wait, until none does. Runs in a thread of its own."""
        while True:
            with self.lock:
                if not self.waiting:
                    self.thread = None
                    return
                path = self.under_way = self.waiting.pop(0)
            why = None
            try:
                remote.upload(path, self.filesystem, self.folder)
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
            with self.lock:
                self.under_way = None
                self.failed.pop(path, None)
                if why is not None and path not in self.waiting:  # a checkpoint that waits again was replaced meanwhile
                    self.has_failed = True
                    self.unreported.append((path, why))
                    if path.exists():
                        self.failed[path] = why

    def wait(self, seconds: float) -> bool:
        """Wait, for this many seconds at most, until nothing is left to upload, and return whether nothing is."""
        deadline = time.monotonic() + seconds
        while (thread := self.thread) is not None and (left := deadline - time.monotonic()) > 0:
            thread.join(left)
        return self.thread is None

    def report(self) -> None:
        """Warn of the uploads that failed since the last report. Runs in the thread that trains."""
        with self.lock:
            failures, self.unreported = self.unreported, []
        for path, why in failures:
            warnings.warn(
                f"{path} could not be uploaded to {self.url} ({why}). It stays there; training goes on.",
                UploadWarning,
                stacklevel=2,
            )
