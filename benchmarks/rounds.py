"""What a round of turns costs beside the loop that one writes by hand: a critic and a generator, on this device.

    python benchmarks/rounds.py

Both loops train the same pair (WGAN-GP: a gradient penalty, the critic ``--every`` times a round) on the same batches,
with the same fused Adam, clipping and schedules, in one process. They take turns within each of many short repetitions,
so that a machine with other work to do disturbs both alike; "over" is the median of the ratios within a repetition.
What a round computes is large (some 10 ms a turn), as in a run: what is added to it are microseconds.
"""

import argparse
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from stratagem import Callback, Fit, TrainModule, Turn
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR
from turns import Clock, Timing, in_turns, quartiles

FEATURES, NOISE = 256, 64
RATE, MAX_NORM = 1e-4, 1.0


class Pair(TrainModule):
    """Two networks of three layers.

    Args:
        width: of hidden layers.
        every: how often the critic is trained for one time of the generator.
    """

    def __init__(self, width: int, every: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.every = every
        self.critic, self.generator = layers(FEATURES, width, 1), layers(NOISE, width, FEATURES)

    def turns(self) -> list[Turn]:
        adam: dict[str, Any] = {"optim": "adam", "learning_rate": RATE}
        return [
            Turn("critic", self.critic_loss, "critic", **adam),
            Turn("generator", self.generator_loss, "generator", self.every, **adam),
        ]

    def critic_loss(self, batch: dict[str, Tensor]) -> Tensor:
        real, fake = batch["real"], self.generator(batch["noise"]).detach()
        between = (batch["share"] * real + (1 - batch["share"]) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        return self.critic(fake).mean() - self.critic(real).mean() + 10 * penalty

    def generator_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return -self.critic(self.generator(batch["noise"])).mean()


def layers(takes: int, width: int, gives: int) -> nn.Sequential:
    """Three linear layers."""
    return nn.Sequential(
        nn.Linear(takes, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, gives)
    )


def samples(count: int) -> dict[str, Tensor]:
    """Random points, by column."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"real": FEATURES, "noise": NOISE, "share": 1}
    return {name: torch.rand(count, size, generator=generator) for name, size in sizes.items()}


class Rounds:
    """A loop over rounds, and the clock of one repetition.

    Args:
        options: of the command line.
        device: that computes.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self.clock = Clock(device, options.updates)
        self.data = samples(options.batch_size * options.every * self.clock.updates_of_a_turn)

    def repetition(self) -> Timing:
        """Train a fresh pair for some rounds, and time all but the first."""
        self.clock.start()
        self.train(Pair(self.options.width, self.options.every))
        return self.clock.timing()

    def train(self, module: Pair) -> None:
        """Train it."""
        raise NotImplementedError


class ByHand(Rounds):
    """The loop that one writes: networks that aren't trained are frozen meanwhile, numbers are kept on the device."""

    def train(self, module: Pair) -> None:
        """See Rounds."""
        module.to(self.device)
        networks = {"critic": module.critic, "generator": module.generator}
        losses = {"critic": module.critic_loss, "generator": module.generator_loss}
        optimizers = {turn: Adam(layers.parameters(), lr=RATE, fused=True) for turn, layers in networks.items()}
        schedules = [LambdaLR(optimizer, lambda update: 1.0) for optimizer in optimizers.values()]
        size, kept = self.options.batch_size, []
        for number in range(self.clock.updates_of_a_turn * self.options.every):
            if number % self.options.every == 0:
                self.clock.tick()
            part = slice(number * size, (number + 1) * size)
            batch = {name: column[part].to(self.device, non_blocking=True) for name, column in self.data.items()}
            is_last = number % self.options.every == self.options.every - 1
            for turn in ("critic", "generator") if is_last else ("critic",):
                for name, layers in networks.items():
                    layers.requires_grad_(name == turn)
                loss = losses[turn](batch)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(networks[turn].parameters(), MAX_NORM)
                optimizers[turn].step()
                optimizers[turn].zero_grad()
                kept.append((loss.detach(), norm))
            if is_last:
                for schedule in schedules:
                    schedule.step()


class Ours(Rounds):
    """The same by ``turns()``."""

    def train(self, module: Pair) -> None:
        """See Rounds."""
        clock = self.clock

        class Ticks(Callback):
            def on_step_begin(self, *arguments: Any, **context: Any) -> None:
                clock.tick()

        with tempfile.TemporaryDirectory() as directory:
            Fit(
                module, self.data, callbacks=[Ticks()], per_device_train_batch_size=self.options.batch_size,
                max_steps=clock.updates_of_a_turn, max_grad_norm=MAX_NORM, lr_scheduler_type="constant",
                weight_decay=0.0, shuffle=False, logging_steps=10_000, save_strategy="no", progress=False, report=False,
                loggers=(), output_dir=str(Path(directory)),
            ).train()  # fmt: skip


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, value, what in (
        ("--width", 512, "of hidden layers"),
        ("--batch-size", 64, "samples in a batch"),
        ("--every", 5, "times of the critic for one of the generator"),
        ("--updates", 6, "timed rounds in a repetition"),
        ("--repetitions", 15, "of each loop"),
        ("--threads", 1, "of torch on the CPU"),
    ):
        parser.add_argument(name, type=int, default=value, help=what)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    loops = {"by hand": ByHand(options, device), "stratagem": Ours(options, device)}
    timings: dict[str, list[Timing]] = {name: [] for name in loops}
    for loop in loops.values():  # imports, caches
        loop.repetition()
    for number in range(options.repetitions):
        for name, loop in in_turns(loops, number):
            timings[name].append(loop.repetition())
    turns = options.every + 1
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {device}, {os.cpu_count()} CPUs; ", end="")
    print(f"rounds of {turns} turns, {options.repetitions} repetitions of {options.updates} rounds")
    for kind in Timing._fields:
        for name, found in timings.items():
            middle = statistics.median(getattr(timing, kind) for timing in found)
            print(f"{name:<10} {kind:<10} {1e3 * middle / turns:8.3f} ms a turn")
        ratios = [
            100 * (getattr(ours, kind) / getattr(hand, kind) - 1)
            for hand, ours in zip(timings["by hand"], timings["stratagem"], strict=True)
        ]
        low, middle, high = quartiles(ratios)
        print(f"over       {kind:<10} {middle:+8.2f} % (quartiles {low:+.2f} to {high:+.2f})")


if __name__ == "__main__":
    main()
