"""What each number format costs and changes: step time, loss and memory beside float32, for every one that runs here.

    python benchmarks/precision.py

All train the GPT of ``examples/gpt.py`` from the same weights on the same windows of the standard library, with fused
AdamW. Formats come from the registry; one that this machine can't compute in is listed with its reason. ``--emulate``
adds those that can be emulated, whose rounding is the real one's and whose time isn't.

* **Time**: in turns, each round trains every format for a few updates. An update lasts from its beginning to the next
  one's, so that the start and the end of a run stay out. A turn's number is the median of its updates, on a GPU their
  mean; the ratio is that of one round's turns, and what is printed is the median over rounds, with its quartiles.
  "Computing" is the same ratio in the time in which this process computed: other programs on the machine change it
  less. It says nothing about a GPU.
* **Loss**: on held-out windows after ``--loss-updates`` updates, less that of 32-true.
* **Memory**: bytes of weights, of gradients and of optimizer state (with master weights) when the optimizer steps.
"""

import argparse
import itertools
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from stratagem import Callback, Fit
from stratagem.precision import PRECISIONS
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from formats import formats
from gpt import GPT
from gpt import data as windows
from turns import Clock, Timing, in_turns, quartiles

REFERENCE = "32-true"


class Format(Callback):
    """One precision's model, trained again and again.

    Attributes:
        sizes: bytes of weights, gradients and optimizer state, as of the first update.
    """

    def __init__(
        self, name: str, precision: Any, options: argparse.Namespace, data: tuple[Any, Any], directory: str
    ) -> None:
        torch.manual_seed(0)
        self.sizes: list[int] = []
        self.module = GPT(options.context, options.layers, options.width, heads=options.width // 64 or 1)
        self.loss_updates = options.loss_updates
        self.fit = Fit(
            self.module,
            *data,
            precision=precision,
            callbacks=[self],
            loggers=(),
            report=False,
            output_dir=f"{directory}/{name}",
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            max_steps=self.loss_updates,
            learning_rate=1e-3,
            adam_beta2=0.95,
            warmup_steps=min(20, self.loss_updates),
            logging_steps=self.loss_updates,
            save_strategy="no",
            progress=False,
        )
        self.clock = Clock(self.fit.strategy.device, options.updates)

    def on_step_begin(self, *context: Any, **_: Any) -> None:
        self.clock.tick()

    def on_pre_optimizer_step(self, *context: Any, **_: Any) -> None:
        self.gradients = bytes_of(p.grad for p in self.module.parameters())

    def on_optimizer_step(self, *context: Any, **_: Any) -> None:
        if not self.sizes and self.fit.optimizer.state:
            states = itertools.chain.from_iterable(state.values() for state in self.fit.optimizer.state.values())
            self.sizes = [bytes_of(self.module.parameters()), self.gradients, bytes_of(states)]

    def loss(self) -> float:
        """Held-out loss after a run of its own."""
        self.fit.train()
        return self.fit.evaluate()["eval_loss"]

    def turn(self) -> Timing:
        self.clock.start()
        updates = self.clock.updates_of_a_turn
        self.fit.train(trial={"max_steps": updates, "warmup_steps": 0, "logging_steps": updates})
        return self.clock.timing()


def bytes_of(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors among some values; those that share memory count once."""
    storages = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def row(
    name: str, loss: float, losses: dict[str, float], turns: dict[str, list[Timing]], sizes: list[int]
) -> list[str]:
    """The printed cells of a precision."""
    rounds = list(zip(turns[name], turns[REFERENCE], strict=True))
    ratios = [own.wall / reference.wall for own, reference in rounds]
    low, middle, high = quartiles(ratios)
    return [
        name,
        f"{1000 * statistics.median(own.wall for own, _ in rounds):.1f}",
        f"{middle:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{statistics.median(own.computing / reference.computing for own, reference in rounds):.2f}",
        f"{1 / middle:.2f}",
        f"{loss - losses[REFERENCE]:+.4f}",
        *(f"{size / 2**20:.1f}" for size in sizes),
    ]


COLUMNS = {  # heading to width
    "precision": 14,
    "ms": 7,
    "time ratio": 10,
    "quartiles": 12,
    "computing": 9,
    "times as fast": 13,
    "loss": 8,
    "weights, MiB": 12,
    "gradients": 9,
    "optimizer": 9,
}


def printed(cells: Iterable[str]) -> str:
    return " | ".join(cell.rjust(width) for cell, width in zip(cells, COLUMNS.values(), strict=True))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Step time, loss and memory of every number format that this machine computes in.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def option(flag: str, default: int, meaning: str) -> None:
        parser.add_argument(flag, type=int, default=default, help=meaning)

    option("--rounds", 5, "turns of each format, whose ratios the median is taken of")
    option("--updates", 8, "timed updates in a turn")
    option("--loss-updates", 200, "updates before the loss is compared")
    option("--batch-size", 8, "windows in an update")
    option("--context", 256, "bytes in a window")
    option("--layers", 4, "transformer blocks")
    option("--width", 256, "features per position")
    option("--eval-windows", 64, "held-out windows that the loss is taken on")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), help="names, beside 32-true")
    parser.add_argument("--emulate", action="store_true", help="also float8 formats by emulation, which is slow")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    wanted = formats(dict.fromkeys([REFERENCE, *options.precisions]), options.emulate)
    data = windows(options.context, options.eval_windows)
    with tempfile.TemporaryDirectory() as directory:
        trained: dict[str, Format] = {}
        losses: dict[str, float] = {}
        refused: dict[str, str] = {}
        for name, make in wanted.items():
            try:
                made = Format(name, make(), options, data, directory)
                losses[name] = made.loss()
                trained[name] = made
            except (ImportError, ValueError) as error:
                refused[name] = str(error)
        turns: dict[str, list[Timing]] = {name: [] for name in trained}
        for number in range(options.rounds):
            for name, timed in in_turns(trained, number):
                turns[name].append(timed.turn())
    parameters = sum(parameter.numel() for parameter in trained[REFERENCE].module.parameters())
    device = trained[REFERENCE].fit.strategy.device
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, {device}, torch {torch.__version__}")
    print(
        f"{parameters:,} parameters, {options.batch_size * options.context:,} tokens an update, {options.rounds} rounds"
    )
    heading = list(COLUMNS)
    heading[6] = f"loss@{options.loss_updates}"
    print(printed(heading))
    for name in trained:
        print(printed(row(name, losses[name], losses, turns, trained[name].sizes)))
    for name, why in refused.items():
        print(f"{name} doesn't run here: {why}")


if __name__ == "__main__":
    main()
