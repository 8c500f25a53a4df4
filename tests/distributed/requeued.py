"""A program that test_requeue.py starts: trains with requeue=True, and gets a signal in update 5 of its first life."""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from stratagem import Callback, Fit
from training import Tagger, token_rows


class Sender(Callback):
    """Sends a rank a signal once, after the 4th update."""

    def __init__(self, rank: int, name: str) -> None:
        self.rank, self.name = rank, name

    def on_step_begin(self, args: Any, state: Any, control: Any, *, fit: Fit, **_: Any) -> None:
        is_first_life = "SLURM_RESTART_COUNT" not in os.environ
        if state.global_step == 4 and is_first_life and fit.strategy.rank == self.rank:
            os.kill(os.getpid(), getattr(signal, self.name))


def main() -> None:
    """Train 8 updates."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--sent", default="SIGTERM")
    options = parser.parse_args()
    torch.manual_seed(0)
    fit = Fit(
        Tagger(),
        token_rows(80),
        strategy=options.strategy,
        callbacks=[Sender(options.rank, options.sent)],
        output_dir=str(options.output),
        max_steps=8,
        logging_steps=1,
        save_steps=100,
        per_device_train_batch_size=8,
        learning_rate=0.01,
        requeue=True,
        preemption_signals="SIGTERM,SIGUSR1",
    )
    fit.train(resume_from_checkpoint=True)
    fit.export(options.output / "end.safetensors")
    (options.output / f"rank-{fit.strategy.rank}.txt").write_text("8 updates, attempt 0")


if __name__ == "__main__":
    main()
