"""A program that test_launching.py starts: trains on several ranks, on one of which something happens in update 6."""

import argparse
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from stratagem import Callback, Fit
from training import Tagger, token_rows


class Accident(Callback):
    """On rank 1, after the 5th update, in the first attempt."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_step_begin(self, args: Any, state: Any, control: Any, *, fit: Fit, **_: Any) -> None:
        happens = fit.strategy.rank == 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if state.global_step == 5 and happens:
            if self.kind == "raise":
                raise RuntimeError("the accident on rank 1")
            if self.kind == "memory" and args.per_device_train_batch_size > 4:
                raise torch.OutOfMemoryError("the accident on rank 1")
            if self.kind == "kill the launcher":
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(60.0)
            if self.kind == "signal the launcher":
                os.kill(os.getppid(), signal.SIGTERM)
                time.sleep(1.0)  # a signal that comes after the last message of all would find the run done
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Train 8 updates, and leave a file for each rank that came to the end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--devices", type=int)
    parser.add_argument("--max-restarts", type=int, default=0)
    parser.add_argument("--accident", default="none")
    parser.add_argument("--save-on-exception", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    # Workers have inherited the connections that the other rank waits on.
    memory = {"auto_find_batch_size": True, "dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    starting = {"devices": options.devices, "max_restarts": options.max_restarts} if options.devices else {}
    fit = Fit(
        Tagger(),
        token_rows(80),
        strategy=options.strategy,
        callbacks=[Accident(options.accident)],
        output_dir=str(options.output),
        max_steps=8,
        logging_steps=1,
        save_steps=4,
        save_on_exception=options.save_on_exception,
        per_device_train_batch_size=8,
        learning_rate=0.01,
        max_grad_norm=0.5,
        **starting,
        **(memory if options.accident == "memory" else {}),
    )
    result = fit.train(resume_from_checkpoint=True)
    fit.export(options.output / "end.safetensors")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    (options.output / f"rank-{fit.strategy.rank}.txt").write_text(f"{result.global_step} updates, attempt {attempt}")


if __name__ == "__main__":
    main()
