"""A function on several ranks of this machine, sent to them by a pipe: ranks from a notebook, or from any program."""

import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .launch import range_of, run_on_ranks
from .statuses import INTERRUPTED

ANSWER = "STRATAGEM_ANSWER"  # environment variable: where rank 0 writes what the function returned, and after what
CODE = "import sys; sys.path[:] = {path!r}; from stratagem.strategies.sent import main; main()"


def launch(
    function: Callable[..., Any],
    *arguments: Any,
    devices: int | str = "auto",
    max_restarts: int = 0,
    signals: Iterable[str] = (),
) -> Any:
    """Call a function on several ranks of this machine, and return what it returned on rank 0.

    For notebooks, where ``Fit(devices=2)`` has no script to run again. The ranks are fresh processes, under the
    supervisor of ``Fit(devices=2)``; the function and its arguments are sent to each by a pipe (cloudpickle, the extra
    ``notebook``), with the classes and values of the notebook that it names. A ``Fit`` that the function makes finds
    the ranks by itself.

    Args:
        function: makes the Fit and trains it. Large data is better read in here than sent along.
        *arguments: of the function.
        devices: ranks; "auto" takes one for each accelerator, "1:2" goes on without one that was killed.
        max_restarts: how often the ranks are started again after one failed.
        signals: names of those that are passed on to the ranks, beside SIGTERM and SIGINT.

    Returns:
        What the function returned on rank 0, by the same way.

    Raises:
        TypeError: the function, or what it names, can't be sent.
        RuntimeError: a rank failed; what it wrote is above.
        KeyboardInterrupt: the ranks were interrupted, and have saved.

    Example:
        ``metrics = stratagem.launch(train, 3e-4, devices=2)``, with a function ``train(learning_rate)`` that makes a
        ``Fit(module, data, strategy="ddp")``, trains it, and returns ``fit.evaluate()``.
    """
    try:
        import cloudpickle
    except ImportError as error:
        raise ImportError("stratagem.launch needs cloudpickle: pip install 'stratagem[notebook]'") from error
    fewest, most = range_of(devices) or (None, None)
    try:
        sent = cloudpickle.dumps((function, arguments))
    except Exception as error:  # whatever an object's own way to be pickled raises
        name = getattr(function, "__name__", repr(function))
        raise TypeError(
            f"{name} can't be sent to the ranks: {error}. Make what it needs inside of it: a Fit, an open file, a lock."
        ) from error
    with Answer() as answer:
        command = [sys.executable, "-c", CODE.format(path=[str(Path.cwd()), *filter(None, sys.path)])]
        status = run_on_ranks(command, fewest, most, max_restarts, signals, sent, (answer.written,))
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status:
        raise RuntimeError(f"The ranks ended with status {status}. What they wrote stands above.")
    return answer.read()


class Answer:
    """The pipe by which rank 0 answers, entered while there are ranks."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex.encode()  # stands before each answer: an attempt that failed may have given one
        self.given = b""
        self.reading, self.written = os.pipe()

    def __enter__(self) -> "Answer":
        os.environ[ANSWER] = f"{self.written}:{self.mark.decode()}"
        self.thread = threading.Thread(target=self._collect, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        del os.environ[ANSWER]
        os.close(self.written)  # the ranks have ended: there is no other writer
        self.thread.join()

    def _collect(self) -> None:
        with os.fdopen(self.reading, "rb") as pipe:
            self.given = pipe.read()

    def read(self) -> Any:
        """Return the last answer."""
        import pickle

        return pickle.loads(self.given.rpartition(self.mark)[2])


def main() -> None:
    """Run one rank: call what it is sent."""
    import cloudpickle

    place = os.environ.pop(ANSWER)
    function, arguments = cloudpickle.loads(sys.stdin.buffer.read())
    found = function(*arguments)
    if os.environ["RANK"] == "0":
        file, _, mark = place.partition(":")
        with os.fdopen(int(file), "wb") as pipe:
            pipe.write(mark.encode() + cloudpickle.dumps(found))
