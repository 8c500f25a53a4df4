"""Writing a snapshot: on all ranks or on none, at once or in the background."""

import atexit
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from ...strategies.base import Strategy
from ..agreement import on_all_ranks
from . import directory
from .contents import Snapshot
from .directory import CheckpointError
from .tensors import rank_files, save_tensors


def write(snapshot: Snapshot, final: Path, strategy: Strategy, group: Any = None) -> None:
    """Write a snapshot and publish it. Collective; when it returns, the checkpoint is there whole, and where it fails,
    nothing is left of it.

    Args:
        snapshot: this rank's.
        final: the checkpoint's name.
        strategy: its ranks write together.
        group: the ranks' group to use, in another thread than training's.

    Raises:
        CheckpointError: on every rank, where one could not write.
    """
    try:
        _write(snapshot, final, strategy, group)
    except BaseException:
        if strategy.is_main:
            shutil.rmtree(directory.partial_path(final), ignore_errors=True)
        raise


def _write(snapshot: Snapshot, final: Path, strategy: Strategy, group: Any) -> None:
    rank, partial = strategy.rank, directory.partial_path(final)

    def write_part() -> dict[str, dict[str, Any]]:
        written = [partial / f"random-{rank:05d}.json"]
        directory.write_text(written[0], snapshot.random)
        if strategy.is_main:
            written.append(partial / "state.json")
            directory.write_text(written[1], snapshot.state)
        for folder in snapshot.folders():
            written += rank_files(partial / folder, rank)
        return {str(file.relative_to(partial)): directory.hash_file(file) for file in written}

    on_all_ranks(strategy, lambda: directory.begin(final) if strategy.is_main else None, CheckpointError, group)
    for folder, tensors in snapshot.folders().items():
        if any(strategy.gather(bool(tensors), group)):  # a callback may be on one rank alone
            save_tensors(partial / folder, tensors, group)  # collective itself: one rank's error is raised on all
    files = {
        name: entry
        for part in on_all_ranks(strategy, write_part, CheckpointError, group)
        for name, entry in part.items()
    }
    on_all_ranks(
        strategy, lambda: directory.publish(final, files) if strategy.is_main else None, CheckpointError, group
    )


def copy_to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, sharded as they are; training may change the originals from here on."""
    staged = BlockingAsyncStager().stage(dict(tensors))
    return {name: t.clone() if tensors[name].device.type == "cpu" else t for name, t in staged.items()}


class BackgroundWriter:
    """Writes one snapshot at a time while training goes on.

    Args:
        strategy: gives the thread a process group of its own; collectives of two threads in one group would mix.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.group = strategy.new_group()
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.under_way: Future[None] | None = None
        atexit.register(self.thread.shutdown)

    def start(self, snapshot: Snapshot, final: Path, then: Callable[[], None]) -> None:
        """Copy the snapshot to the host and write it in the background; waits for the one before.

        Args:
            snapshot: is copied before this returns.
            final: the checkpoint's name.
            then: called in the background once it is published.
        """
        self.finish()
        copied = Snapshot(
            copy_to_host(snapshot.model),
            copy_to_host(snapshot.optimizer),
            snapshot.state,
            snapshot.random,
            copy_to_host(snapshot.callbacks),
        )

        def work() -> None:
            write(copied, final, self.strategy, self.group)
            on_all_ranks(self.strategy, then, CheckpointError, self.group)

        self.under_way = self.thread.submit(work)

    def has_failed(self) -> bool:
        """Whether a write has failed, which ``finish`` then raises. It failed on all ranks; one may see it first."""
        return self.under_way is not None and self.under_way.done() and self.under_way.exception() is not None

    def finish(self) -> None:
        """Wait until nothing is under way, and raise what the write failed with."""
        if self.under_way is not None:
            written, self.under_way = self.under_way, None
            written.result()
