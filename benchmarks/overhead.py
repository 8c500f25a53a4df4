"""What a training framework costs per update, beside a bare PyTorch loop: stratagem and the peers that are installed.

    python benchmarks/overhead.py

Everyone trains the same small network on the same in-memory samples with the same fused AdamW, the same clipping and
the same schedule, in one process, in turns. The network is so small that the loop around it dominates, so the numbers
are what a loop adds to an update, not what share of a real update it is: that falls with the size of the model.

The clock is in the network: it notes the time of two of its forward passes, and the updates between them count. Thus
construction, the end of a run and every framework's own idea of when a step begins stay out, and nobody needs a hook.
"Over bare" is the median of the differences within a round; where a machine has other work to do, each loop's fastest
run shows better what is left. The second bare row shows how much of a difference is noise.

Peers: ``pip install -e . --group peers``.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, default_collate

FEATURES, HIDDEN, BATCH_SIZE = 32, 32, 32
LEARNING_RATE, MAX_NORM, LOGGING_STEPS = 1e-2, 1.0, 50


class Samples(Dataset):
    """Samples of a linear map with noise, cut up beforehand: fetching one costs next to nothing."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(count, FEATURES, generator=generator)
        labels = x @ torch.randn(FEATURES, 1, generator=generator) + 0.1 * torch.randn(count, 1, generator=generator)
        self.x, self.labels = x.unbind(), labels.unbind()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.labels[index]}


class Clock:
    """Notes when forward pass ``first`` begins, and when ``last`` does."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.passes = 0
        self.readings: list[int] = []

    def tick(self) -> None:
        self.passes += 1
        if self.passes in (self.first, self.last):
            self.readings.append(time.perf_counter_ns())

    def microseconds(self) -> float:
        """Per update, over the timed updates."""
        began, ended = self.readings
        return (ended - began) / (self.last - self.first) / 1000


class Job:
    """One run: its samples, its network, and the optimizer and schedule that every loop uses.

    Every loop has a module of its own kind around ``layers``, whose forward ticks the clock.
    """

    def __init__(self, samples: Samples, updates: int, warm_up: int, directory: Path) -> None:
        self.samples = samples
        self.updates = updates
        self.directory = directory
        torch.manual_seed(0)
        self.clock = Clock(warm_up, updates)
        self.layers = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def loader(self) -> DataLoader[Any]:
        return DataLoader(self.samples, batch_size=BATCH_SIZE, shuffle=True)

    def optimizer(self) -> Optimizer:
        return torch.optim.AdamW(self.layers.parameters(), lr=LEARNING_RATE, fused=True)

    def schedule(self, optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, lambda update: 1.0 - update / self.updates)

    def json_lines(self) -> "JsonLines":
        return JsonLines(self.directory / "log.jsonl")

    def error(self) -> float:
        """Mean squared error on the first samples."""
        x, labels = torch.stack(self.samples.x[:1000]), torch.stack(self.samples.labels[:1000])
        with torch.no_grad():
            return nn.functional.mse_loss(self.layers(x), labels).item()


class Network(nn.Module):
    """The plain module, for loops that want no class of their own."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.layers, self.clock = job.layers, job.clock

    def forward(self, x: Tensor) -> Tensor:
        self.clock.tick()
        return self.layers(x)


class JsonLines:
    """A log like stratagem's, for the peers that have none: one JSON object a line, flushed."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")

    def __call__(self, **row: Any) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


# The loops. Each runs job.updates updates on job.loader()'s batches.


def bare(job: Job) -> None:
    """What a user writes who wants nothing but training: no log, no display."""
    network, optimizer = Network(job), job.optimizer()
    schedule = job.schedule(optimizer)
    network.train()
    for batch in job.loader():
        loss = nn.functional.mse_loss(network(batch["x"]), batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def stratagem(job: Job) -> None:
    """With everything on: a callback on every update, a log every 50, the progress bar, the JSON-lines log."""
    from stratagem import Callback, Fit, TrainModule

    class Module(TrainModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.clock = job.layers, job.clock

        def forward(self, x: Tensor) -> Tensor:
            self.clock.tick()
            return self.layers(x)

        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
            return nn.functional.mse_loss(outputs, batch["labels"])

        def configure_optimizer(self, args: Any) -> Optimizer:
            return job.optimizer()

        def configure_scheduler(self, optimizer: Optimizer, args: Any) -> LambdaLR:
            return job.schedule(optimizer)

    class Listener(Callback):
        updates = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            self.updates += 1

    fit = Fit(
        Module(),
        train_data=job.samples,
        callbacks=[Listener()],
        output_dir=str(job.directory),
        max_steps=job.updates,
        per_device_train_batch_size=BATCH_SIZE,
        max_grad_norm=MAX_NORM,
        logging_steps=LOGGING_STEPS,
        save_strategy="no",
    )
    fit.train()


def ignite(job: Job) -> None:
    """An Engine with a listener on every update, its progress bar, and a log every 50."""
    from ignite.engine import Engine, Events
    from ignite.handlers import ProgressBar

    network, optimizer, write = Network(job), job.optimizer(), job.json_lines()
    schedule = job.schedule(optimizer)
    network.train()

    def update(engine: Engine, batch: dict[str, Tensor]) -> Tensor:
        loss = nn.functional.mse_loss(network(batch["x"]), batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.detach()

    trainer, heard = Engine(update), [0]

    @trainer.on(Events.ITERATION_COMPLETED)
    def listen(engine: Engine) -> None:
        heard[0] += 1

    @trainer.on(Events.ITERATION_COMPLETED(every=LOGGING_STEPS))
    def log(engine: Engine) -> None:
        write(step=engine.state.iteration, loss=engine.state.output.item(), learning_rate=schedule.get_last_lr()[0])

    ProgressBar().attach(
        trainer,
        event_name=Events.ITERATION_COMPLETED(every=LOGGING_STEPS),
        output_transform=lambda loss: {"loss": loss},
    )
    trainer.run(job.loader(), max_epochs=1)


def fabric(job: Job) -> None:
    """A hand-written loop over Fabric's wrappers, with a log every 50; it has no display."""
    from lightning.fabric import Fabric

    fabric, optimizer, write = Fabric(accelerator="cpu", devices=1), job.optimizer(), job.json_lines()
    network, optimizer = fabric.setup(Network(job), optimizer)
    schedule = job.schedule(optimizer)
    network.train()
    for number, batch in enumerate(fabric.setup_dataloaders(job.loader()), start=1):
        loss = nn.functional.mse_loss(network(batch["x"]), batch["labels"])
        fabric.backward(loss)
        fabric.clip_gradients(network, optimizer, max_norm=MAX_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if number % LOGGING_STEPS == 0:
            write(step=number, loss=loss.item(), learning_rate=schedule.get_last_lr()[0])


def lightning(job: Job, logs_loss: bool = True) -> None:
    """Its Trainer with a callback on every batch, its progress bar, and its CSV log every 50."""
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.clock = job.layers, job.clock

        def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
            self.clock.tick()
            loss = nn.functional.mse_loss(self.layers(batch["x"]), batch["labels"])
            if logs_loss:
                self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = job.optimizer()
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": job.schedule(optimizer), "interval": "step"},
            }

    class Listener(pl.Callback):
        updates = 0

        def on_train_batch_end(self, *arguments: Any) -> None:
            self.updates += 1

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=job.updates,
        gradient_clip_val=MAX_NORM,
        log_every_n_steps=LOGGING_STEPS,
        logger=CSVLogger(str(job.directory), flush_logs_every_n_steps=LOGGING_STEPS),
        callbacks=[Listener()],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), job.loader())


def lightning_silent(job: Job) -> None:
    """The same without ``self.log``: the loss is shown and logged nowhere."""
    lightning(job, logs_loss=False)


def transformers(job: Job) -> None:
    """Its Trainer with a callback on every update, its progress bar, and a log every 50."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.clock = job.layers, job.clock

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            self.clock.tick()
            return {"loss": nn.functional.mse_loss(self.layers(x), labels)}

    class Listener(TrainerCallback):
        updates = 0

        def __init__(self) -> None:
            self.write = job.json_lines()

        def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            self.updates += 1

        def on_log(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            self.write(step=state.global_step, **context["logs"])

    optimizer = job.optimizer()
    trainer = Trainer(
        Module(),
        TrainingArguments(
            output_dir=str(job.directory),
            max_steps=job.updates,
            per_device_train_batch_size=BATCH_SIZE,
            max_grad_norm=MAX_NORM,
            logging_steps=LOGGING_STEPS,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            remove_unused_columns=False,
            disable_tqdm=False,
        ),
        data_collator=default_collate,
        train_dataset=job.samples,
        optimizers=(optimizer, job.schedule(optimizer)),
        callbacks=[Listener()],
    )
    trainer.train()


BARE = "bare PyTorch"

# row -> (package it needs, its distribution, loop)
LOOPS: dict[str, tuple[str, str, Callable[[Job], None]]] = {
    BARE: ("torch", "torch", bare),
    "bare PyTorch again": ("torch", "torch", bare),
    "stratagem": ("stratagem", "stratagem", stratagem),
    "Ignite": ("ignite", "pytorch-ignite", ignite),
    "Lightning Fabric": ("lightning", "lightning", fabric),
    "Lightning Trainer, nothing logged": ("lightning", "lightning", lightning_silent),
    "Lightning Trainer": ("lightning", "lightning", lightning),
    "transformers Trainer": ("transformers", "transformers", transformers),
}


class Terminal(io.TextIOBase):
    """Looks like a terminal and throws away what it is given, so that progress bars do their work."""

    def isatty(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Bars go to a terminal that nobody sees; remarks on worker counts and on loggers go nowhere."""
    terminal = Terminal()
    with warnings.catch_warnings(), contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        warnings.simplefilter("ignore")
        for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield


def measure(loop: Callable[[Job], None], samples: Samples, updates: int, warm_up: int) -> float:
    """Microseconds per update of one run.

    Raises:
        RuntimeError: the loop did something other than train the network for that many updates.
    """
    with tempfile.TemporaryDirectory() as directory:
        job = Job(samples, updates, warm_up, Path(directory))
        before = job.error()
        gc.collect()
        with quiet():
            loop(job)
        if job.clock.passes != updates or not job.error() < before / 2:
            raise RuntimeError(
                f"{loop.__name__} made {job.clock.passes} forward passes for {updates} updates, and brought the error "
                f"from {before:.3f} to {job.error():.3f}: it isn't doing the same work."
            )
        return job.clock.microseconds()


def table(rounds: dict[str, list[float]], missing: list[str]) -> list[str]:
    """The printed rows, in microseconds per update."""
    lines = [
        f"{'':<34} {'':<12} {'':>8} {'over bare, same round':>29}",
        f"{'loop':<34} {'version':<12} {'median':>8} {'median':>10} {'quartiles':>18} {'fastest':>8} {'over bare':>10}",
    ]
    for name, (_, distribution, _) in LOOPS.items():
        if name in missing:
            lines.append(f"{name:<34} not installed")
        elif name in rounds:
            lines.append(f"{name:<34} {importlib.metadata.version(distribution):<12} {figures(rounds, name)}")
    return lines


def figures(rounds: dict[str, list[float]], name: str) -> str:
    """The numbers of one row."""
    mine, bare = rounds[name], rounds[BARE]
    low, middle, high = statistics.quantiles([a - b for a, b in zip(mine, bare, strict=True)], n=4, method="inclusive")
    return (
        f"{statistics.median(mine):>8.1f} {middle:>+10.1f} {f'{low:+.1f} to {high:+.1f}':>18} "
        f"{min(mine):>8.1f} {min(mine) - min(bare):>+10.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=2000, help="timed updates in a run")
    parser.add_argument("--warm-up", type=int, default=200, help="updates before them")
    parser.add_argument("--rounds", type=int, default=9, help="runs of each loop, in turns")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; one is steadiest at this size")
    parser.add_argument(
        "--only", nargs="+", default=[], help="parts of the names of loops to measure beside the bare one"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    wanted = [n for n in LOOPS if n.startswith("bare") or not options.only or any(o in n for o in options.only)]
    missing = [name for name in wanted if importlib.util.find_spec(LOOPS[name][0]) is None]
    loops = {name: LOOPS[name][2] for name in wanted if name not in missing}
    updates = options.warm_up + options.updates
    samples = Samples(updates * BATCH_SIZE)  # one epoch: what happens between epochs isn't timed
    few = Samples(4 * LOGGING_STEPS * BATCH_SIZE)
    for loop in loops.values():  # imports, caches
        measure(loop, few, 4 * LOGGING_STEPS, LOGGING_STEPS)
    # What the peers' imports left behind would otherwise be searched for garbage during somebody's timed updates.
    gc.collect()
    gc.freeze()

    rounds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(options.rounds):
        for name, loop in list(loops.items())[:: 1 if number % 2 == 0 else -1]:
            rounds[name].append(measure(loop, samples, updates, options.warm_up))
        print(f"round {number + 1} of {options.rounds}", end="\r", file=sys.stderr, flush=True)

    print(
        f"\nPython {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} CPUs, "
        f"{options.threads} thread(s); {options.rounds} rounds of {options.updates} updates, "
        f"batch {BATCH_SIZE}; µs per update"
    )
    print("\n".join(table(rounds, missing)))


if __name__ == "__main__":
    main()
