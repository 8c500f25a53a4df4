"""Tokens/s and MFU of a GPT of 350 million parameters on one GPU: number formats by Fit beside a hand-written loop.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --layers 2 --width 64 --heads 2 --context 64 --vocabulary 256 --batch-size 4

Each format trains with and without ``torch_compile``, and so does the loop that one would write by hand: bfloat16 by
autocast, the same random tokens, fused AdamW, clipping and schedule. By hand the whole model is compiled, by Fit each
block. On a GPU, float32 products are TF32. A format that the machine can't compute in is listed with its reason;
``--emulate`` adds emulated ones.

* **Time**: in turns, each round trains every loop for a few updates, after a round that compiles and isn't timed. An
  update lasts from its beginning to the next one's; a GPU is waited for at a turn's ends only. What is printed is the
  median over rounds; "of by hand" is the tokens/s over those of the hand-written loop in the same round, compiled where
  this one is, with its quartiles.
* **MFU** (Chowdhery et al., 2022): the FLOP/s of 6 for each parameter and token, as in Fit's own "mfu", over the dense
  bfloat16 peak of the device, whatever the format; "-" where framework/measures/flops.py doesn't know it.
* **Loss**: mean of the last turn's updates, which says that all do the same.
"""

import argparse
import gc
import itertools
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from stratagem import Callback, Fit
from stratagem.framework.measures.flops import device_name, peak_flops
from stratagem.strategies import Single
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from formats import formats
from gpt import GPT
from turns import Clock, Timing, Tokens, in_turns, quartiles

LEARNING_RATE, MAX_NORM = 1e-4, 1.0
BY_HAND = "by hand, bf16"


class LargeGPT(GPT):
    """The example's, over as many tokens as one asks for."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options.context, options.layers, options.width, options.heads)
        self.embedding = nn.Embedding(options.vocabulary, options.width)
        self.head = nn.Linear(options.width, options.vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.initialize(options.layers)


class Loop:
    """A model that is trained for one turn after another.

    Attributes:
        loss: mean over the updates of the last turn.
    """

    optimizer: Optimizer
    loss: float

    def __init__(self, options: argparse.Namespace, tokens: Tokens) -> None:
        torch.manual_seed(0)
        self.options, self.tokens = options, tokens
        self.device = torch.device(options.device)
        self.module = LargeGPT(options)
        self.clock = Clock(self.device, options.updates)

    def train(self) -> None:
        raise NotImplementedError

    def turn(self) -> Timing:
        self.clock.start()
        self.train()
        # So that only one of the loops has gradients, moments and activations in memory.
        self.optimizer.zero_grad()
        self.optimizer.state.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.clock.timing()


class ByHand(Loop):
    """What a user writes who wants nothing but training in bfloat16."""

    def __init__(self, options: argparse.Namespace, tokens: Tokens, compiled: bool) -> None:
        super().__init__(options, tokens)
        self.module.to(self.device)
        self.model = torch.compile(self.module) if compiled else self.module
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def train(self) -> None:
        optimizer, device = self.optimizer, self.device
        loader = DataLoader(self.tokens, self.options.batch_size, shuffle=True, pin_memory=device.type == "cuda")
        schedule = LambdaLR(optimizer, lambda update: 1.0 - update / self.clock.updates_of_a_turn)
        self.module.train()
        losses = []
        for batch in loader:
            self.clock.tick()
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = self.module.loss(self.model(batch["tokens"]), batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), MAX_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        self.loss = torch.stack(losses).mean().item()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"]


class ByFit(Loop, Callback):
    """The same by Fit, in a precision."""

    def __init__(
        self, options: argparse.Namespace, tokens: Tokens, compiled: bool, precision: Any, directory: str
    ) -> None:
        super().__init__(options, tokens)
        self.fit = Fit(
            self.module,
            train_data=tokens,
            strategy=Single(device=options.device),
            precision=precision,
            callbacks=[self],
            loggers=(),
            report=False,
            output_dir=directory,
            max_steps=self.clock.updates_of_a_turn,
            per_device_train_batch_size=options.batch_size,
            learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_NORM,
            torch_compile=compiled,
            logging_steps=self.clock.updates_of_a_turn,
            save_strategy="no",
            progress=False,
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.clock.tick()

    def train(self) -> None:
        self.loss = self.fit.train().training_loss
        self.optimizer = self.fit.optimizer


Name = tuple[str, bool]  # of a loop: its format, and whether it is compiled


def measured(options: argparse.Namespace, directory: str) -> tuple[dict[Name, Loop], dict[Name, list[Timing]]]:
    """The loops that run here, and their turns; it says why others don't."""
    count = Clock(torch.device(options.device), options.updates).updates_of_a_turn * options.batch_size
    tokens = Tokens(count, options.context, options.vocabulary)
    wanted = formats(options.precisions, options.emulate)
    loops: dict[Name, Loop] = {}
    refused: dict[str, str] = {}
    for label, compiled in itertools.product([BY_HAND, *wanted], COMPILED[options.compile]):
        try:
            if label == BY_HAND:
                loop: Loop = ByHand(options, tokens, compiled)
            else:
                loop = ByFit(options, tokens, compiled, wanted[label](), directory)
            loop.turn()  # compiles, allocates
            loops[label, compiled] = loop
        except (ImportError, ValueError) as error:
            refused[label] = str(error)
    for label, why in refused.items():
        print(f"{label} doesn't run here: {why}")
    turns: dict[Name, list[Timing]] = {name: [] for name in loops}
    for number in range(options.rounds):
        for name, loop in in_turns(loops, number):
            turns[name].append(loop.turn())
        print(f"round {number + 1} of {options.rounds}", end="\r", file=sys.stderr, flush=True)
    return loops, turns


COMPILED = {"both": (False, True), "yes": (True,), "no": (False,)}
COLUMNS = {  # heading to width
    "precision": 14,
    "compiled": 8,
    "ms": 8,
    "tokens/s": 10,
    "MFU": 6,
    "of by hand": 10,
    "quartiles": 14,
    "loss": 7,
}


def row(name: Name, loop: Loop, turns: dict[Name, list[Timing]], flops: float, peak: float | None) -> list[str]:
    """The printed cells of a loop.

    Args:
        name, loop: of this row.
        turns: of all.
        flops: of an update.
        peak: FLOP/s of the device; None where it isn't known.
    """
    seconds = statistics.median(timing.wall for timing in turns[name])
    pairs = zip(turns[BY_HAND, name[1]], turns[name], strict=True)
    low, middle, high = quartiles([by_hand.wall / own.wall for by_hand, own in pairs])
    return [
        name[0],
        "yes" if name[1] else "no",
        f"{1000 * seconds:.1f}",
        f"{loop.options.batch_size * loop.options.context / seconds:,.0f}",
        "-" if peak is None else f"{flops / seconds / peak:.1%}",
        f"{middle:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{loop.loss:.3f}",
    ]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Tokens/s and MFU of a GPT on one GPU, by number format, beside a hand-written loop.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def option(flag: str, default: int, meaning: str) -> None:
        parser.add_argument(flag, type=int, default=default, help=meaning)

    option("--layers", 24, "transformer blocks")
    option("--width", 1024, "features per position")
    option("--heads", 16, "attention heads")
    option("--context", 1024, "tokens in a sequence")
    option("--vocabulary", 50_304, "tokens that there are; 256 are the bytes of examples/gpt.py")
    option("--batch-size", 8, "sequences in an update")
    option("--updates", 20, "timed updates in a turn")
    option("--rounds", 5, "turns of each loop")
    parser.add_argument(
        "--precisions", nargs="+", default=["32-true", "bf16-mixed", "bf16-true", "fp8"], help="names of formats"
    )
    parser.add_argument(
        "--compile", choices=COMPILED, default="both", help="loops with torch_compile, without, or both"
    )
    parser.add_argument("--emulate", action="store_true", help="also float8 formats by emulation, which is slow")
    parser.add_argument("--device", default="cuda:0", help="cpu, only to see that it runs")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    device = torch.device(options.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            sys.exit("There is no GPU here. Write --device cpu, and small sizes, to see this program run without one.")
        torch.set_float32_matmul_precision("high")  # TF32
    # Else a block that was compiled too often would go on uncompiled, with no more than a warning.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    with tempfile.TemporaryDirectory() as directory:
        loops, turns = measured(options, directory)
    module = next(iter(loops.values())).module
    parameters = sum(parameter.numel() for parameter in module.parameters())
    tokens = options.batch_size * options.context
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, {device_name(device)}, torch {torch.__version__}")
    print(
        f"{parameters:,} parameters, {tokens:,} tokens an update, {options.rounds} rounds of {options.updates} updates"
    )
    flops, peak = module.flops_per_token(parameters) * tokens, peak_flops(device_name(device))
    for cells in [list(COLUMNS), *(row(name, loop, turns, flops, peak) for name, loop in loops.items())]:
        print(" | ".join(cell.rjust(width) for cell, width in zip(cells, COLUMNS.values(), strict=True)))


if __name__ == "__main__":
    main()
