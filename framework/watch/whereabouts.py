"""Where a rank is: its place in the run, in the user's code and among the collectives, seen from another thread."""

import json
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch

PACKAGE = Path(__file__).parents[2]

# What a rank is doing while one of these functions of ours is on its stack; the innermost of them counts. A test holds
# that they exist.
PHASES: Mapping[tuple[str, str], str] = {
    ("framework/runs.py", "_begin"): "beginning the run",
    ("framework/run/micro_batches.py", "read_update"): "reading its data",
    ("framework/run/exchange.py", "send"): "the exchange before the update",
    ("framework/steps.py", "training_step"): "a micro-batch",
    ("framework/steps.py", "turn_step"): "a micro-batch",
    ("framework/steps.py", "compute_loss"): "your forward",
    ("framework/objective.py", "loss"): "your loss",
    ("precision/base.py", "backward"): "backward",
    ("precision/apex.py", "backward"): "backward",
    ("strategies/deepspeed/strategy.py", "backward"): "backward",
    ("strategies/updating.py", "prepare_gradients"): "preparing the gradients",
    ("framework/run/stepping.py", "clip"): "clipping the gradients",
    ("framework/run/stepping.py", "step"): "the optimizer's step",
    ("framework/callbacks.py", "emit"): "a callback",
    ("framework/steps.py", "log_training"): "logging",
    ("framework/steps.py", "log"): "logging",
    ("framework/runs.py", "export"): "exporting weights",
    ("framework/runs.py", "save_pretrained"): "exporting weights",
    ("framework/steps.py", "evaluate"): "an evaluation",
    ("framework/steps.py", "predict"): "a prediction",
    ("framework/steps.py", "save_checkpoint"): "saving a checkpoint",
    ("framework/loop.py", "agree_at_once"): "agreeing on what to log, evaluate and save",
    ("framework/loop.py", "end_training"): "ending the run",
    ("framework/checkpoint/contents.py", "load_weights"): "loading the best weights",
}
OUTERMOST = "framework/runs.py", "train_from"
MESSAGE = "strategies/tree.py", "sum_along_tree"
"""Where the ranks' hosts wait for one another in messages that torch doesn't record."""
LONG = ("beginning the run", "saving a checkpoint", "exporting weights", "ending the run", "loading the best weights")
# Other files of torch's compiler stay on the stack of what is compiled already.
COMPILERS = ("/torch/_dynamo/convert_frame.py", "/torch/_inductor/")
DEBUGGERS = ("/bdb.py", "/pdb.py", "/debugpy/")


@dataclass(frozen=True)
class Whereabouts:
    """Where one rank is.

    Attributes:
        rank, host: this rank, and its machine's name.
        update: that is under way; the first is 1.
        phase: what of it, in words; empty outside of what Fit does.
        place: file and line of the innermost line outside of stratagem, torch and other packages; empty where the rank
            is in none.
        function: that the line is in.
        seconds: since the last progress.
        collective: the last one of this rank, as "all_reduce number 412 of group default_pg"; empty where it isn't
            recorded (alone, or before torch 2.13).
        number: its number among the rank's collectives of that group; 0 where it isn't recorded.
        waits: whether the rank waits in a collective for others.
    """

    rank: int
    host: str
    update: int
    phase: str
    place: str
    function: str
    seconds: float
    collective: str = ""
    number: int = 0
    waits: bool = False

    def to_words(self) -> str:
        """The same as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_words(cls, words: str | bytes) -> "Whereabouts":
        """What ``to_words`` made."""
        return cls(**json.loads(words))


def frame_of(thread: int) -> FrameType | None:
    """Return the innermost frame of a thread, by its identifier; None where it has ended."""
    return sys._current_frames().get(thread)


def frames_of(innermost: FrameType | None) -> Iterator[FrameType]:
    """Go from a thread's innermost frame outward."""
    while innermost is not None:
        yield innermost
        innermost = innermost.f_back


def is_long(innermost: FrameType | None) -> bool:
    """Whether the thread is in what may take long without a step that could be seen: saving, or compilation."""
    return any(
        PHASES.get(of_package(frame.f_code.co_filename, frame.f_code.co_name)) in LONG
        or any(part in frame.f_code.co_filename for part in COMPILERS)
        for frame in frames_of(innermost)
    )


def is_debugged(innermost: FrameType | None) -> bool:
    """Whether a debugger holds the thread."""
    return any(frame.f_code.co_filename.endswith(DEBUGGERS) for frame in frames_of(innermost))


def find(innermost: FrameType | None, rank: int, update: int, seconds: float) -> Whereabouts:
    """Look where a thread is.

    Args:
        innermost: its frame.
        rank: this one.
        update: that is under way.
        seconds: since the last progress.
    """
    phase = place = function = ""
    in_collective = in_message = False
    for depth, frame in enumerate(frames_of(innermost)):
        code = frame.f_code
        function_here = of_package(code.co_filename, code.co_name)
        if function_here == OUTERMOST:
            break  # who called fit.train is no news
        phase = phase or PHASES.get(function_here, "")
        in_message = in_message or function_here == MESSAGE
        if not place and is_users(code.co_filename):
            place, function = f"{Path(code.co_filename).name}:{frame.f_lineno}", code.co_name
        in_collective = in_collective or (depth < 3 and "/torch/distributed/distributed_c10d.py" in code.co_filename)
    collective, number, is_pending = last_collective()
    if in_message and not is_pending:
        collective = "message"
    return Whereabouts(
        rank, socket.gethostname(), update, phase, place, function, seconds, collective, number,
        in_collective or in_message or is_pending,
    )  # fmt: skip


def of_package(filename: str, name: str) -> tuple[str, str]:
    """A function of ours as PHASES names it."""
    return (filename[len(str(PACKAGE)) + 1 :] if filename.startswith(str(PACKAGE)) else "", name)


@cache
def is_users(filename: str) -> bool:
    """Whether a file is a program's own: not ours, not a package's, not Python's."""
    if filename.startswith("<") or "site-packages" in filename or "dist-packages" in filename:
        return False
    own = [str(PACKAGE / folder) for folder in ("framework", "strategies", "precision", "testing")]
    return not filename.startswith((*own, str(Path(threading.__file__).parent)))


def last_collective() -> tuple[str, int, bool]:
    """The last collective of this process from torch's flight recorder, which is there from torch 2.13 on.

    Returns:
        (name, number, is_pending): see Whereabouts; whether it isn't over.
    """
    dump = getattr(torch._C, "_distributed_c10d", None)
    dump = getattr(dump, "_dump_fr_trace_json", None)
    if dump is None:
        return "", 0, False
    try:
        entries: list[dict[str, Any]] = json.loads(dump()).get("entries", [])
    except (RuntimeError, ValueError):
        return "", 0, False
    if not entries:
        return "", 0, False
    pending = [entry for entry in entries if not is_over(entry)]
    shown = pending[0] if pending else entries[-1]
    operation = shown["profiling_name"].partition(":")[2] or shown["profiling_name"]
    number = int(shown["collective_seq_id"])
    return f"{operation} number {number} of group {shown['process_group'][1]}", number, bool(pending)


def is_over(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of the flight recorder is of a collective that has ended."""
    return bool(entry.get("retired")) or entry.get("state") == "completed"


def stacks() -> str:
    """The Python stack of every thread, for a file."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
