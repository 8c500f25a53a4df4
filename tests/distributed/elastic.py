"""A program that test_elastic.py starts: trains on as many ranks as there are, of which some are lost on the way."""

import argparse
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from stratagem import Callback, Fit
from stratagem.testing import faults as kit
from stratagem.testing.faults import Kill
from training import Tagger, token_rows


class KillAgent(Kill):
    """Kills the agent of torchrun that started this rank, and the rank, as where a machine is gone."""

    def strike(self, fit: Any) -> None:
        if "IS_TO_BE_LOST" in os.environ:
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


class NoteProcesses(Callback):
    """Writes down the processes of this rank, its workers included, in the first update."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def on_step_end(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
        if state.global_step == 1:
            found = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            (self.output / f"processes-{fit.strategy.rank}.json").write_text(json.dumps(found))


class WaitFor(Callback):
    """Waits after an update, on rank 0, until a file is there: for an agent that returns."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_step_end(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
        if state.global_step == self.step and fit.strategy.world_size == 1:
            deadline = time.monotonic() + 90.0
            (self.path.parent / "alone").touch()
            while not self.path.exists() and time.monotonic() < deadline:
                time.sleep(0.05)


def main() -> None:
    """Train 12 updates of 16 samples, and leave the losses of this attempt's updates in a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--max-restarts", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--kill", type=json.loads, default=[], help="[[attempt, rank, update], ...]")
    parser.add_argument("--kill-agent", type=int, help="in this update, the one that is to be lost")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--fault", help="of the kit, as it is written in Python")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(0)
    faults: list[Callback] = [
        Kill(rank=rank, update=update, phase="forward", attempt=attempt) for attempt, rank, update in options.kill
    ]
    if options.fault:
        faults += [eval(options.fault, vars(kit))]  # what the test has written
    if options.workers:
        faults += [NoteProcesses(options.output)]
    if options.kill_agent:
        faults += [KillAgent(rank=None, update=options.kill_agent, once_file=options.output / "killed")]
        faults += [WaitFor(options.kill_agent, options.output / "returned")]
    fit = Fit(
        Tagger(1),
        token_rows(),
        strategy=options.strategy,
        devices=int(options.devices) if options.devices.isdigit() else options.devices,
        max_restarts=options.max_restarts,
        callbacks=faults,
        output_dir=str(options.output),
        num_train_epochs=1,
        logging_steps=1,
        save_steps=2,
        per_device_train_batch_size=options.batch,
        learning_rate=0.01,
        max_grad_norm=0.5,
        progress=False,
        loggers=(),
        dataloader_num_workers=options.workers,
    )
    try:
        fit.train(resume_from_checkpoint=True if options.resume else None)
    finally:
        if fit.strategy.is_main:
            note(fit, options.output)
    fit.export(options.output / "end.safetensors")


def note(fit: Fit, output: Path) -> None:
    """Write down the run so far, on how many ranks it went, and how it was cut."""
    logs = [log for log in fit.state.log_history if "loss" in log]
    found = {
        "world": fit.strategy.world_size,
        "accumulation": fit.args.gradient_accumulation_steps,
        "updates": fit.state.global_step,
        "max_steps": fit.state.max_steps,
        "curve": [[log["step"], log["loss"], log["learning_rate"]] for log in logs],
    }
    number = len(list(output.glob("attempt-*.json")))
    (output / f"attempt-{number}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
