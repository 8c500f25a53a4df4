"""Writing of a snapshot: on all ranks or on none, at once or in the background."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...strategies.base import Strategy
from ..agreement import on_all_ranks
from . import directory
from .contents import Snapshot
from .directory import CheckpointError
from .kept_files import KeptFiles
from .log_history import HistoryPart
from .sharing import TensorFile, share_out
from .staging import HostCopies
from .streaming import write_file
from .tensors import SHARDING


@dataclass(frozen=True)
class Share:
    """What one rank writes of a checkpoint.

    Attributes:
        files: of tensors, to be written.
        kept_files: of tensors that an earlier checkpoint of the run has.
        frozen: names of those files, of both kinds, that later checkpoints are to have, too.
        kept: knows them.
        state: of the run, as JSON, which rank 0 writes.
        random: this rank's random state, as JSON.
        history: the logs so far, on the main process.
    """

    files: Sequence[TensorFile]
    state: str
    random: str
    history: HistoryPart | None = None
    kept_files: Sequence[TensorFile] = ()
    frozen: Sequence[str] = ()
    kept: KeptFiles = field(default_factory=KeptFiles)


def share_of(snapshot: Snapshot, strategy: Strategy, kept: KeptFiles | None = None) -> Share:
    """Find what this rank writes of a snapshot. Collective.

    Args:
        snapshot: of the run.
        strategy: its ranks write together.
        kept: the files of frozen tensors that earlier checkpoints have; None where there are no earlier ones.
    """
    kept = KeptFiles() if kept is None else kept
    files = share_out(snapshot.folders(), strategy)
    frozen = share_out({"model": snapshot.frozen}, strategy, kind="frozen") if snapshot.frozen else []
    new, held = kept.divide(frozen)
    names = [file.name for file in frozen]
    return Share([*files, *new], snapshot.state, snapshot.random, snapshot.history, held, names, kept)


def write(share: Share, final: Path, strategy: Strategy, group: Any = None) -> None:
    """Write a checkpoint and publish it. Collective. When this returns, the checkpoint is whole and in its place; where
    it fails, nothing of the checkpoint is left.

    Args:
        share: of this rank.
        final: the path of the checkpoint.
        strategy: its ranks write together.
        group: the process group to use, where this isn't called in the thread that trains.

    Raises:
        CheckpointError: on every rank, where one rank could not write.
    """
    try:
        _write(share, final, strategy, group)
    except BaseException:
        # Each rank removes what it sees, since no other rank could where they don't share the directory.
        shutil.rmtree(directory.partial_path(final), ignore_errors=True)
        raise


def _write(share: Share, final: Path, strategy: Strategy, group: Any) -> None:
    rank, partial = strategy.rank, directory.partial_path(final)
    headers: dict[str, str] = {}
    own: dict[str, dict[str, Any]] = {}
    kept = {file.name for file in share.kept_files}
    interrupted: list[BaseException] = []

    def write_part() -> dict[str, dict[str, Any]]:
        try:
            name = f"random-{rank:05d}.json"
            listed = {name: directory.write_text(partial / name, share.random)}
            if strategy.is_main:
                listed["state.json"] = directory.write_text(partial / "state.json", share.state)
            if share.history is not None:
                share.history.place(partial)
            for file in (*share.files, *share.kept_files):
                (partial / file.name).parent.mkdir(exist_ok=True)
                linked = share.kept.link(partial, file.name) if file.name in kept else None
                listed[file.name], headers[file.name] = linked or write_tensors(partial / file.name, file)
            own.update(listed)
            return listed
        except Exception:
            raise
        except BaseException as error:  # a signal's handler raised, and the other ranks wait for this one
            interrupted.append(error)
            raise CheckpointError(f"{partial}: interrupted by {type(error).__name__}") from error

    on_all_ranks(strategy, lambda: directory.begin(final) if strategy.is_main else None, CheckpointError, group)
    try:
        parts = on_all_ranks(strategy, write_part, CheckpointError, group)
    except CheckpointError:
        if interrupted:
            raise interrupted[0] from None
        raise
    everyones = strategy.gather_to_main(headers, group)

    def publish() -> None:
        check_parts_are_here(partial, parts)
        files = {name: entry for part in parts for name, entry in part.items()}
        lines = [f"{json.dumps(name)}:{text}" for held in everyones for name, text in held.items()]
        if lines:
            files[directory.TABLE] = directory.write_text(partial / directory.TABLE, "{" + ",\n".join(lines) + "}\n")
        directory.publish(final, files)

    on_all_ranks(strategy, lambda: publish() if strategy.is_main else None, CheckpointError, group)
    share.kept.note(final, share.frozen, own, headers)


def write_tensors(path: Path, file: TensorFile) -> tuple[dict[str, Any], str]:
    """Write a file of tensors, and return its entry in the manifest, and its header."""
    sharding = {name: {"saved_offsets": begin} for name, begin in file.begins.items()}
    metadata = {SHARDING: json.dumps(sharding), "DCP_VERSION": "1.0", "format": "pt"}
    written = write_file(path, file.forms, metadata, file.data)
    header = directory.hash_text(written.header)
    return {"bytes": written.bytes, "sha256": written.sha256, "header": header}, written.header


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
        self.copies = HostCopies()

    def start(self, snapshot: Snapshot, final: Path, then: Callable[[], None], kept: KeptFiles | None = None) -> None:
        """Copy what this rank writes of the snapshot to the host, and write it in the background, after the snapshot
        before it is written. Collective.

        Args:
            snapshot: the snapshot, which is copied before this returns.
            final: the path of the checkpoint.
            then: called in the background once the checkpoint is published.
            kept: see ``share_of``.
        """
        self.finish()
        share = share_of(snapshot, self.strategy, kept)
        copied = replace(share, files=self.copies.copy(share.files))

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
