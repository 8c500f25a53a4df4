"""What loggers have in common whose package keeps runs by an id: a run that is resumed goes on in the same one."""

import json
import os
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from .base import LoggedRun, Logger

FILE = "trackers.json"  # in output_dir: the id of the tracker's run, by the tracker's word


class Tracker(Logger):
    """A logger over a package that keeps runs by an id.

    The id is kept in ``<output_dir>/trackers.json``. Where training is resumed there, the run with that id is gone on
    with; otherwise another one is begun.

    Attributes:
        word: the name of the logger.
        id: of the tracker's run, once it is open.
    """

    word: ClassVar[str]
    id: str = ""

    @abstractmethod
    def start(self, fit: LoggedRun, kept: str | None) -> str:
        """Begin a run of the tracker, or go on with a kept one, and return its id."""

    def open(self, fit: LoggedRun) -> None:
        """Begin a run of the tracker, or go on with the one that belongs to the training that is resumed."""
        self.id = self.start(fit, self.kept(fit))

    def begin(self, fit: LoggedRun) -> None:
        """Keep the id. Where something else was logged before a training is resumed, change to the run of that."""
        kept = self.kept(fit)
        if kept is not None and kept != self.id:
            self.close()
            self.id = self.start(fit, kept)
        path = Path(fit.args.output_dir, FILE)
        if read_ids(path).get(self.word) != self.id:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{self.word}")
            partial.write_text(json.dumps({**read_ids(path), self.word: self.id}) + "\n", encoding="utf-8")
            os.replace(partial, path)

    def kept(self, fit: LoggedRun) -> str | None:
        """Return the id of the tracker's run that holds what came before; None where training begins anew."""
        return read_ids(Path(fit.args.output_dir, FILE)).get(self.word) if fit.is_resumed else None


def read_ids(path: Path) -> dict[str, str]:
    """Read the ids that were kept; none where the file isn't there, or isn't whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {word: name for word, name in found.items() if isinstance(name, str)} if isinstance(found, dict) else {}
