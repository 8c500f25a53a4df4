"""Makes the table of docs/faults.md: ``python tests/distributed/tabulate_faults.py`` strikes each fault under each
strategy on two ranks without a launcher, and prints what became of them.
"""

import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from mortal_ranks import End, run_mortal  # noqa: E402 (found by the path above)
from test_watch import STRATEGIES, fit_and_train, same_bits  # noqa: E402

AT_3 = {"rank": 1, "update": 3, "phase": "forward"}
HANG = {"hang_timeout": 5.0}
# What is done to rank 1: the fault, its arguments, where, and arguments of the run.
FAULTS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
    "SIGTERM": ("SignalSelf", (signal.SIGTERM,), AT_3, {}),
    "SIGINT in backward": ("SignalSelf", (signal.SIGINT,), {**AT_3, "phase": "backward"}, {}),
    "SIGKILL": ("Kill", (), {**AT_3, "phase": "backward"}, {}),
    "SIGKILL while it saves": ("Kill", (), {**AT_3, "phase": "save"}, {"save_steps": 1}),
    "os._exit(3)": ("Exit", (3,), AT_3, {}),
    "an exception": ("Raise", (ValueError("the accident"),), AT_3, {}),
    "out of memory": ("OutOfMemory", (), {**AT_3, "phase": "step"}, {}),
    "SIGSTOP": ("Stop", (), {**AT_3, "update": 5}, HANG),
    "stands still": ("Delay", (60.0,), {**AT_3, "update": 5}, HANG),
    "saves alone": ("MismatchedCollective", ("save",), {**AT_3, "update": 5, "phase": "end"}, HANG),
    "NaN in a gradient": ("NonfiniteGradient", ("head.bias",), {**AT_3, "phase": "backward"}, {}),
    "its store is cut off": ("DeadStore", (), AT_3, {}),
    "late by 1 s": ("Delay", (1.0,), AT_3, {}),
}


def first_line(ends: list[End]) -> str:
    """The first line that tells of the accident: of the rank that said it first, as far as files can tell."""
    marks = "Failed first", "No update for", "The run was interrupted", "Error:", "was not made"
    lines = [line for end in ends for line in end.printed.splitlines() if any(mark in line for mark in marks)]
    return next((line for mark in marks for line in lines if mark in line), "")


def tabulate(directory: Path) -> None:
    """Print the table."""
    print("| rank 1 | strategy | seconds until all had ended | statuses of ranks 0, 1 | said | resume |")
    print("| --- | --- | --- | --- | --- | --- |")
    for strategy in STRATEGIES:
        whole = directory / f"{strategy}-undisturbed"
        run_mortal(fit_and_train, 2, whole, strategy=strategy)
        for name, (fault, arguments, where, options) in FAULTS.items():
            run = directory / f"{strategy}-{len(list(directory.iterdir()))}"
            saving = {"save_steps": 2, **options}
            ends = run_mortal(
                fit_and_train, 2, run, strategy=strategy, fault=fault, fault_arguments=arguments, where=where, **saving
            )
            seconds = max(end.seconds for end in ends if end.status != -signal.SIGKILL)
            statuses = ", ".join(str(end.status) for end in ends)
            if all(end.status == 0 for end in ends):
                resumed = "not needed"
            else:
                run_mortal(fit_and_train, 2, run, strategy=strategy, resume=True, **saving)
                end = run / "end.safetensors"
                resumed = "to the bit" if end.exists() and same_bits(end, whole / "end.safetensors") else "differs"
            said = first_line(ends).replace(str(directory), "").replace("|", "/")
            print(f"| {name} | {strategy} | {seconds:.1f} | {statuses} | {said} | {resumed} |", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        tabulate(Path(folder))
