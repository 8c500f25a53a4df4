"""Writing of a snapshot: on all ranks or on none, at once or in the background."""

import shutil
from collections.abc import Callable, Mapping, Sequence
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
    """Write a snapshot and publish it. Collective. When this returns, the checkpoint is whole and in its place; where
    it fails, nothing of the checkpoint is left.

    Args:
        snapshot: the snapshot of this rank.
        final: the path of the checkpoint.
        strategy: its ranks write together.
        group: the process group to use, where this isn't called in the thread that trains.

    Raises:
        CheckpointError: on every rank, where one rank could not write.
    """
    try:
        _write(snapshot, final, strategy, group)
    except BaseException:
        # Each rank removes what it sees, since no other rank could where they don't share the directory.
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
        if snapshot.history is not None:
            snapshot.history.place(partial)
        for folder in snapshot.folders():
            written += rank_files(partial / folder, rank)
        return {str(file.relative_to(partial)): directory.hash_file(file) for file in written}

    on_all_ranks(strategy, lambda: directory.begin(final) if strategy.is_main else None, CheckpointError, group)
    for folder, tensors in snapshot.folders().items():
        if any(strategy.gather(bool(tensors), group)):  # a callback, and so its tensors, may be on one rank alone
            save_tensors(
                partial / folder, tensors, group
            )  # this is collective, and raises the error of one rank on all
    parts = on_all_ranks(strategy, write_part, CheckpointError, group)

    def publish() -> None:
        check_parts_are_here(partial, parts)
        directory.publish(final, {name: entry for part in parts for name, entry in part.items()})

    on_all_ranks(strategy, lambda: publish() if strategy.is_main else None, CheckpointError, group)


def check_parts_are_here(partial: Path, parts: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
    """Check that every file that a rank has written is here, before the checkpoint is published.

    Args:
        partial: the folder, as rank 0 sees it.
        parts: for each rank, the names of its files to their sizes and hashes.

    Raises:
        CheckpointError: the message names the rank whose file is missing.
    """
    for rank, part in enumerate(parts):
        for name, entry in part.items():
            try:
                size = (partial / name).stat().st_size
            except FileNotFoundError:
                size = None
            if size != entry["bytes"]:
                raise CheckpointError(
                    f"rank {rank} wrote {name} to a directory that rank 0 doesn't see: it isn't in "
                    f"{partial.absolute()}. All ranks save into one directory: write an output_dir on a filesystem "
                    "that all machines share, as an absolute path."
                )


def copy_to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to host memory, sharded as they are. Training may change the originals from here on."""
    staged = BlockingAsyncStager().stage(dict(tensors))
    return {name: t.clone() if tensors[name].device.type == "cpu" else t for name, t in staged.items()}


class BackgroundWriter:
    """Writes one snapshot at a time while training goes on.

    Args:
        strategy: it makes the thread's own process group, since the collectives of two threads in one group would mix.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.group = strategy.new_group()
        # Python waits for the thread of an executor when the process ends.
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.under_way: Future[None] | None = None

    def start(self, snapshot: Snapshot, final: Path, then: Callable[[], None]) -> None:
        """Copy the snapshot to the host and write it in the background, after the snapshot before it is written.

        Args:
            snapshot: the snapshot, which is copied before this returns.
            final: the path of the checkpoint.
            then: called in the background once the checkpoint is published.
        """
        self.finish()
        copied = Snapshot(
            copy_to_host(snapshot.model),
            copy_to_host(snapshot.optimizer),
            snapshot.state,
            snapshot.random,
            copy_to_host(snapshot.callbacks),
            snapshot.history,
        )

        def work() -> None:
            write(copied, final, self.strategy, self.group)
            on_all_ranks(self.strategy, then, CheckpointError, self.group)

        self.under_way = self.thread.submit(work)

    def has_failed(self) -> bool:
        """Return whether a write has failed, whose error ``finish`` raises. It failed on all ranks; one may see it
        first.
        """
        return self.under_way is not None and self.under_way.done() and self.under_way.exception() is not None

    def finish(self) -> None:
        """Wait for the write that is under way, and raise its error where it failed."""
        if self.under_way is not None:
            written, self.under_way = self.under_way, None
            written.result()

    def close(self) -> None:
        """Finish, and end the thread and its process group. Collective."""
        try:
            self.finish()
        finally:
            self.thread.shutdown()
        self.strategy.drop_group(self.group)

    def abandon(self) -> None:
        """Have the thread end once the write that is under way has ended: training has failed, perhaps on this rank
        alone. Nothing can be started after this.
        """
        self.thread.shutdown(wait=False)
