"""Writing a snapshot: on all ranks or on none, at once or in the background."""

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
        # Each rank what it sees: where ranks don't share the directory, no other could.
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
    parts = on_all_ranks(strategy, write_part, CheckpointError, group)

    def publish() -> None:
        check_parts_are_here(partial, parts)
        directory.publish(final, {name: entry for part in parts for name, entry in part.items()})

    on_all_ranks(strategy, lambda: publish() if strategy.is_main else None, CheckpointError, group)


def check_parts_are_here(partial: Path, parts: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
    """Look for each file that a rank says it wrote, before a checkpoint is published that lacks some.

    Args:
        partial: where rank 0 sees them.
        parts: of each rank, names to sizes and hashes.

    Raises:
        CheckpointError: names the rank whose file isn't there.
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
        # Python itself waits for its thread when the process ends.
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.under_way: Future[None] | None = None

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

    def close(self) -> None:
        """Finish, and end the thread and its process group. Collective."""
        try:
            self.finish()
        finally:
            self.thread.shutdown()
        self.strategy.drop_group(self.group)

    def abandon(self) -> None:
        """Training has failed, perhaps on this rank alone: the thread ends once what is under way has been written, or
        has failed too. Nothing can be started any more.
        """
        self.thread.shutdown(wait=False)
