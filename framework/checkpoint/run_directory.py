"""The directory that a run saves into: which run its checkpoints belong to, and that one process alone works there.

This happens, in this order::

    lock the directory            where the run will save; else at its first save
    find                          tidy up; find the checkpoint to resume from, which decides the line of the run
    claim                         where the run will save; else at its first save:
        write the marker          from here on, a run that is killed is recognized, and its next start finishes the rest
        rename damaged checkpoints, and those of other lines
    train: save, rotate           along the run's own line
    unlock

A run that saves nothing changes nothing in the directory, and needs no lock.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ...strategies.base import Strategy
from ..agreement import on_all_ranks
from ..arguments import FitArguments
from ..printing import say
from .directory import (
    DAMAGED,
    NAME,
    PARTIAL,
    REPLACED,
    SET_ASIDE,
    CheckpointError,
    leftovers,
    published,
    rename_aside,
    rotate,
    tidy,
)
from .finding import candidates_in, check_is_whole, newest_whole
from .line import (
    BEFORE_IDS,
    MARKER,
    Launch,
    Line,
    Marker,
    checkpoints_of,
    of_checkpoint,
    of_first_attempt,
    origin_of,
    read_marker,
    write_marker,
)
from .locking import DirectoryLock
from .naming import find_place, renamed_checkpoints, without_names
from .remote import download

Result = TypeVar("Result")

CONFIGURATION = "config.yaml"  # what repeats the run: it says nothing where nothing else is left


class RunDirectory:
    """The directory that one run saves into. Every rank makes this object; the main process alone changes the
    directory.

    Args:
        strategy: set up.
        args: the arguments of the run.

    Attributes:
        path: ``output_dir``.
        line: the line of the run, once ``find`` was called.
        is_at_work: whether a run is under way in the directory.
        launch: the run as its launcher knows it.
    """

    def __init__(self, strategy: Strategy, args: FitArguments) -> None:
        self.strategy = strategy
        self.path = Path(args.output_dir)
        self.refuses_others = args.other_checkpoints == "refuse"
        self.saves = args.save_strategy != "no"
        self.lock = DirectoryLock(self.path)
        self.line = Line(BEFORE_IDS)
        self.resumed_from: str | None = None
        self.damaged: list[Path] = []
        self.newest: Path | None = (
            None  # the newest checkpoint of the line: the one resumed from, later the one published last
        )
        self.made: list[Path] = []  # the directories that this run has made, the innermost first
        self.may_leave_nothing = (
            False  # whether directories that were made may be removed, where no checkpoint is saved
        )
        self.is_locked = self.is_claimed = self.is_at_work = False
        self.launch = Launch()

    @contextmanager
    def at_work(self, wanted: bool | str | Path | None, launch: Launch | None = None) -> Iterator[Path | None]:
        """Entered around a run; yields the checkpoint that the run resumes from. Collective.

        Args:
            wanted: True takes the newest whole checkpoint of the line of the directory's last run. A path takes the
                checkpoint there, and so does a URL, from which it is first copied into the directory. A name takes the
                checkpoint in the directory that has it. None and False take none. A run that its launcher has started
                again takes its own newest, whatever it began with.
            launch: the run as its launcher knows it; None where nobody starts it again.

        Raises:
            CheckpointError: the checkpoint that was asked for is damaged, or all are; another process works in the
                directory; or it holds checkpoints of other runs, which are not to be set aside.
        """
        if self.saves:
            self.take_lock()
        try:
            if launch is not None:
                self.launch = self.on_main(lambda: of_first_attempt(launch, self.path))
                wanted = True if self.launch.is_restart and self.launch.was_here else wanted
            path = self.find(wanted)
            self.launch = of_checkpoint(self.launch, path)
            if self.saves:
                self.on_main(self.claim)
                self.check_ranks_share_it()
            self.is_at_work = True
            yield path
        finally:
            self.is_at_work = False
            self.release_lock()

    @contextmanager
    def saving(self, update: int) -> Iterator[Path]:
        """Entered around a save; yields the path of the checkpoint. Collective.

        Args:
            update: the last update of the run.

        Raises:
            CheckpointError: see ``at_work``.
        """
        final = self.path / f"checkpoint-{update}"
        if not self.is_locked:
            self.take_lock()
        try:
            if not self.is_claimed or not self.is_at_work:  # another process may have worked here between two runs
                self.on_main(self.claim)
                self.check_ranks_share_it()
            self.on_main(lambda: self.make_way(final))
            yield final
        finally:
            if not self.is_at_work:
                self.release_lock()

    def follow(self, strategy: Strategy) -> None:
        """Have the ranks agree as another strategy says."""
        self.strategy = strategy

    def checkpoints(self) -> list[Path]:
        """List the checkpoints of the run's line, oldest first. Call it on the main process."""
        return checkpoints_of(self.line, self.path)

    def rotate(self, limit: int | None, keep: Iterable[Path] = (), spare: Iterable[Path] = ()) -> list[Path]:
        """Remove the oldest checkpoints of the run's line beyond ``limit``, but not the newest whole one, nor those
        with a name, which don't count, nor those that ``directory.rotate`` is told to leave. Call it on the main
        process.
        """
        if limit is None:
            return []
        newest = [self.newest] if self.newest is not None else []
        return self.plainly(lambda: rotate(without_names(self.checkpoints()), limit, [*keep, *newest], spare))

    def note_published(self, path: Path) -> None:
        """Note that a checkpoint of the run is published: rotation leaves it until the next one is published."""
        self.newest = path

    # Finding the checkpoint to resume from.

    def find(self, wanted: bool | str | Path | None) -> Path | None:
        """Find the checkpoint that the run resumes from, or None, and set the line of the run by it. Collective."""
        path: Path | None = None
        if wanted is True:
            candidates = self.on_main(self.look)
            path, self.damaged = newest_whole(self.strategy, candidates, self.path)
        elif isinstance(wanted, str) and "://" in wanted:
            path = self.on_main(lambda: download(wanted, self.path))
            check_is_whole(self.strategy, path)
        elif wanted is not None and wanted is not False:
            path = self.on_main(lambda: find_place(wanted, self.path))
            check_is_whole(self.strategy, path)
        found = path
        self.line, self.resumed_from = self.on_main(lambda: self.line_from(found, by_path=wanted is not True))
        is_here = path is not None and NAME.match(path.name) and path.parent.resolve() == self.path.resolve()
        self.newest = self.path / path.name if path is not None and is_here else None
        return path

    def look(self) -> list[Path]:
        """Tidy the directory unless another process works there, and list the checkpoints to choose from."""
        if self.lock.place:
            tidy(self.path)
        elif leftovers(self.path, PARTIAL) or leftovers(self.path, REPLACED):
            self.tidy_if_free()
        candidates = candidates_in(self.path, read_marker(self.path))
        if not candidates:
            aside = renamed_checkpoints(self.path)
            if others := [*aside, *published(self.path)]:
                how = f" To go on from {aside[-1].name}, pass its path: {format_argument(aside[-1])}." if aside else ""
                none = f"{self.path} holds no checkpoint of its last run, but {format_names(others)}"
                say(f"{none}: this run begins anew.{how}", sys.stderr)
        return candidates

    def tidy_if_free(self) -> None:
        """Tidy for a run that saves nothing, as far as it can: a kill may have left the newest checkpoint without its
        name.
        """
        try:
            if self.lock.try_to_take():
                try:
                    tidy(self.path)
                finally:
                    self.lock.release()
        except OSError:
            return

    def line_from(self, path: Path | None, by_path: bool) -> tuple[Line, str | None]:
        """Return the line of a run that resumes from a checkpoint, and what its marker says the run was resumed from.

        Args:
            path: the checkpoint, which is whole; None where the run begins anew.
            by_path: whether the user named the checkpoint; else it is the newest of the directory's own line.
        """
        if path is None:
            return Line.begin(), None
        origin = origin_of(path)
        if origin is None:
            raise CheckpointError(f"{path / 'state.json'} can't be read as the state of a run.")
        is_here = NAME.match(path.name) and path.parent.resolve() == self.path.resolve()
        try:
            marker = read_marker(self.path)
        except CheckpointError:
            if not by_path:
                raise
            marker = None  # the unreadable marker is replaced
        current = marker.line if marker is not None else origin.line
        if not by_path:
            goes_on = True
        else:
            line = [p.name for p in candidates_in(self.path, Marker(current))]
            goes_on = bool(is_here) and origin.is_of(current) and line[-1:] == [path.name]
        if goes_on and current.id != BEFORE_IDS:
            return current, marker.resumed_from if marker is not None else None
        return origin.line.branch(origin.update), None if is_here else os.path.abspath(path)

    # Claiming the directory.

    def claim(self) -> None:
        """Write the marker, and rename damaged checkpoints and those of other lines. Call it on the main process.

        Raises:
            CheckpointError: there are checkpoints of other lines, and ``other_checkpoints`` is "refuse".
        """
        mine = set(self.checkpoints())
        others = [path for path in published(self.path) if path not in mine and path not in self.damaged]
        if others and self.refuses_others:
            raise CheckpointError(
                f"{self.path} holds checkpoints that this run doesn't go on from: {format_names(others)}. Pass "
                "resume_from_checkpoint=True to go on from the newest, write another output_dir, move them away, or "
                "leave other_checkpoints='set_aside' to have them renamed."
            )
        marker = Marker(self.line, self.resumed_from, self.launch.name, self.launch.global_batch)
        if not self.is_marked(marker):
            self.may_leave_nothing = not (self.line.ancestors or others or (self.path / MARKER).exists())
            write_marker(self.path, marker)
        self.lock.name(self.line.id)
        self.is_claimed = True
        for path in self.damaged:
            if path.parent == self.path and NAME.match(path.name) and path.is_dir():
                aside = rename_aside(path, DAMAGED)
                say(f"Renamed the damaged {path} to {aside.name}.", sys.stderr)
        self.damaged = []
        renamed = [rename_aside(path, SET_ASIDE) for path in others]
        if renamed:
            say(
                f"Set aside what this run doesn't go on from in {self.path}: {format_names(renamed)}. To go on from "
                f"one of them, pass its path: {format_argument(renamed[-1])}.",
                sys.stderr,
            )

    def is_marked(self, marker: Marker) -> bool:
        """Return whether the directory has this marker already."""
        try:
            return read_marker(self.path) == marker
        except CheckpointError:
            return False

    def make_way(self, final: Path) -> None:
        """Set aside what has the name of the checkpoint that is about to be written, and isn't a checkpoint of this
        run: a file, a broken link, or what was copied there while the run was under way.
        """
        if not os.path.lexists(final):
            return
        origin = origin_of(final)
        if origin is None or not origin.is_of(self.line):
            aside = rename_aside(final, SET_ASIDE)
            say(f"{final} is not of this run: renamed it to {aside.name}.", sys.stderr)

    def check_ranks_share_it(self) -> None:
        """Check that every rank sees the marker: a rank that doesn't would write its part of each checkpoint elsewhere.
        Collective.

        Raises:
            CheckpointError: on every rank; the message names the first rank that doesn't see it.
        """
        self.is_claimed = True

        def check() -> None:
            try:
                marker = read_marker(self.path)
            except CheckpointError:
                marker = None
            if marker is None or marker.line != self.line:
                raise CheckpointError(
                    f"{os.path.abspath(self.path)} isn't the directory that rank 0 writes to: {MARKER}, which rank 0 "
                    f"has written to its {self.path}, isn't there. All ranks save into one directory: write an "
                    "output_dir on a filesystem that all machines share, as an absolute path."
                )

        on_all_ranks(self.strategy, check, CheckpointError)

    # The lock, and what the main process does under it.

    def take_lock(self) -> None:
        """Make the directory where it is missing, and lock it. Collective."""

        def take() -> None:
            self.made += [path for path in (self.path, *self.path.parents) if not path.exists()]
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise CheckpointError(
                    f"Can't write checkpoints to {self.path}: it is a file, or lies below one."
                ) from error
            self.lock.take()

        self.on_main(take)
        self.is_locked = True

    def release_lock(self) -> None:
        """Unlock the directory. Directories that were made for checkpoints are removed where there is no checkpoint, so
        that a run that fails at once leaves nothing.
        """
        self.is_locked = False
        if not self.lock.place:
            return
        if self.may_leave_nothing and self.newest is None and not self.launch.may_come_again:
            (self.path / MARKER).unlink(missing_ok=True)
            self.is_claimed = False
        self.lock.release()
        if self.newest is None:
            with contextlib.suppress(OSError):  # the directory isn't empty
                if self.made and {path.name for path in self.path.iterdir()} <= {CONFIGURATION}:
                    (self.path / CONFIGURATION).unlink(missing_ok=True)
                for path in self.made:
                    path.rmdir()

    def on_main(self, action: Callable[[], Result]) -> Result:
        """Do something on the main process alone, and return its result on every rank. Collective.

        Raises:
            CheckpointError: on every rank, where the action fails.
        """
        is_main = self.strategy.is_main
        results = on_all_ranks(self.strategy, lambda: self.plainly(action) if is_main else None, CheckpointError)
        result = results[0]
        return result  # type: ignore[return-value]

    def plainly(self, action: Callable[[], Result]) -> Result:
        """Do something with files, and turn a failure of the system into an error that names the file.

        Raises:
            CheckpointError: the system refused.
        """
        try:
            return action()
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror} ({error.filename or 'no file'})") from error


def format_names(paths: Iterable[Path]) -> str:
    """Write the names of checkpoints in a row, the last ten where there are more."""
    names = [path.name for path in paths]
    return (f"{len(names) - 10} more and " if len(names) > 10 else "") + ", ".join(names[-10:])


def format_argument(checkpoint: Path) -> str:
    """Write the argument that resumes from a checkpoint, for a message."""
    return f"resume_from_checkpoint={str(checkpoint)!r}"
