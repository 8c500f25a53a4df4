"""A program that test_signals.py starts: trains in one process, and may have handlers of its own."""

import argparse
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from stratagem import Callback, Fit
from tiny import Regressor, regression_rows


class Slow(Callback):
    """Takes its time for each update, and tells when the first one is over."""

    def __init__(self, seconds: float, started: Path) -> None:
        self.seconds, self.started = seconds, started

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.started.touch()
        if state.global_step >= 1:
            time.sleep(self.seconds)


def main() -> None:
    """Train 1000 slow updates; print what the program's own handler saw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--in-thread", action="store_true")
    parser.add_argument("--own-handler", action="store_true")
    parser.add_argument("--arguments", default="")
    options = parser.parse_args()
    if options.own_handler:
        signal.signal(signal.SIGTERM, lambda number, frame: print("the program's own handler", flush=True))
    own = dict(part.split("=") for part in options.arguments.split(";") if part)
    fit = Fit(
        Regressor(),
        regression_rows(8),
        callbacks=[Slow(options.seconds, options.output / "started")],
        output_dir=str(options.output),
        max_steps=1000,
        save_steps=10_000,
        per_device_train_batch_size=2,
        dataloader_num_workers=options.workers,
        progress=False,
        **{name: float(value) if value.replace(".", "").isdigit() else value for name, value in own.items()},
    )
    if options.in_thread:
        thread = threading.Thread(target=fit.train, name="trainer")
        thread.start()
        thread.join()
        return
    try:
        fit.train()
    finally:
        print(f"handler after: {signal.getsignal(signal.SIGTERM)!r}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
