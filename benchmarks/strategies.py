"""What the framework costs on several ranks: step time and memory of "ddp" and "fsdp2" beside hand-written torch loops.

    python benchmarks/strategies.py
    python benchmarks/strategies.py --strategies=deepspeed_stage_0,deepspeed_stage_2,deepspeed_stage_3

Both train the GPT of ``examples/gpt.py`` on the same in-memory tokens with the same fused AdamW, clipping and schedule,
on ranks that torch's launcher starts on this machine, in turns: each round runs every loop for a few updates. An update
lasts from its beginning to the next one's, so that the start and the end of a run stay out. A round's number is the
median of its updates; what is printed is the median over rounds, with the quartiles of the ratio. "Computing" is the
ratio of the time in which the first rank computed: other programs on the machine change it less. There are two
hand-written loops, one made before ours and one after it, since what a process allocates later is slower to reach: ours
is compared with their mean, and "noise" is the second over the first.

Memory is that of parameters, gradients and optimizer state on one rank, when the optimizer has stepped; DeepSpeed's
engine keeps its own, which isn't looked into.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from stratagem import Callback, Fit
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from gpt import GPT, VOCABULARY
from turns import Clock, Timing, Tokens, in_turns, quartiles

LEARNING_RATE, MAX_NORM = 1e-3, 1.0


class Setting(NamedTuple):
    """What every loop trains on."""

    tokens: Tokens
    batch_size: int  # per rank
    updates: int  # timed ones in a turn

    def module(self) -> GPT:
        torch.manual_seed(0)
        return GPT(context=self.tokens[0]["tokens"].shape[0], layers=4, width=256, heads=4)


class Loop:
    """A placed module that is trained for one turn after another.

    Attributes:
        memory: bytes on this rank, as of the last turn.
    """

    memory = 0

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.module = setting.module()
        self.clock = Clock(torch.device("cpu"), setting.updates)

    def train(self) -> None:
        raise NotImplementedError

    def turn(self) -> Timing:
        self.clock.start()
        dist.barrier()
        self.train()
        return self.clock.timing()


class Bare(Loop):
    """What a user writes who wants nothing but training on these ranks."""

    def __init__(self, setting: Setting, place: Callable[[GPT], nn.Module]) -> None:
        super().__init__(setting)
        self.model = place(self.module)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def train(self) -> None:
        setting, optimizer = self.setting, self.optimizer
        sampler: DistributedSampler[Any] = DistributedSampler(setting.tokens)
        loader = DataLoader(setting.tokens, batch_size=setting.batch_size, sampler=sampler)
        schedule = LambdaLR(optimizer, lambda update: 1.0 - update / self.clock.updates_of_a_turn)
        self.model.train()
        for batch in loader:
            self.clock.tick()
            loss = self.module.loss(self.model(batch["tokens"]), batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
            optimizer.step()
            self.memory = memory_of(self.module, optimizer)
            schedule.step()
            optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"]


class Ours(Loop, Callback):
    """The same by Fit, with its log."""

    def __init__(self, setting: Setting, strategy: str, directory: str) -> None:
        super().__init__(setting)
        self.fit = Fit(
            self.module,
            train_data=setting.tokens,
            strategy=strategy,
            callbacks=[self],
            output_dir=directory,
            max_steps=self.clock.updates_of_a_turn,
            per_device_train_batch_size=setting.batch_size,
            learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_NORM,
            logging_steps=self.clock.updates_of_a_turn,
            save_strategy="no",
            progress=False,
        )

    def train(self) -> None:
        self.fit.train()

    def on_step_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.clock.tick()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if not self.fit.strategy.configuration():  # an engine keeps its own
            self.memory = memory_of(self.module, self.fit.optimizer)


class BareEngine(Loop):
    """What a user of DeepSpeed writes: the same optimizer and clipping, by the engine. It has the same two groups (what
    weight decay is for, and what not), for each of which the engine has collectives of its own.
    """

    def __init__(self, setting: Setting, stage: int) -> None:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, and isn't used
        super().__init__(setting)
        parameters = list(self.module.parameters())
        groups = [[p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]]
        self.optimizer = torch.optim.AdamW(
            [{"params": group} for group in groups], lr=LEARNING_RATE, weight_decay=0.0, fused=True
        )
        config = {
            "train_micro_batch_size_per_gpu": setting.batch_size,
            "gradient_clipping": MAX_NORM,
            "zero_optimization": {"stage": stage},
            "steps_per_print": 2**31,
        }
        self.engine = deepspeed.initialize(model=self.module, optimizer=self.optimizer, config=config)[0]

    def train(self) -> None:
        setting, engine, optimizer = self.setting, self.engine, self.optimizer
        sampler: DistributedSampler[Any] = DistributedSampler(setting.tokens)
        loader = DataLoader(setting.tokens, batch_size=setting.batch_size, sampler=sampler)
        schedule = LambdaLR(optimizer, lambda update: 1.0 - update / self.clock.updates_of_a_turn)
        engine.train()
        for batch in loader:
            self.clock.tick()
            engine.backward(self.module.loss(engine(batch["tokens"]), batch))
            engine.step()
            schedule.step()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"]


def memory_of(module: nn.Module, optimizer: Optimizer) -> int:
    """Bytes of this rank's parameters, gradients and optimizer state; what two tensors share counts once."""

    def tensors() -> Iterator[Any]:
        for parameter in module.parameters():
            yield parameter
            yield parameter.grad
        for state in optimizer.state.values():
            yield from state.values()

    storages = {}
    for tensor in tensors():
        if isinstance(tensor, Tensor):
            storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def replicate(module: GPT) -> nn.Module:
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


def shard(module: GPT) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in module.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


BARE: dict[str, Callable[[Setting], Loop]] = {
    "ddp": partial(Bare, place=replicate),
    "fsdp2": partial(Bare, place=shard),
    **{f"deepspeed_stage_{stage}": partial(BareEngine, stage=stage) for stage in range(4)},
}


def row(strategy: str, turns: dict[str, list[Timing]], memory: dict[str, int]) -> list[str]:
    """The printed cells of a strategy, from each loop's turns and bytes."""
    rounds = list(zip(turns["bare"], turns["ours"], turns["bare again"], strict=True))
    ratios = [2 * ours.wall / (bare.wall + again.wall) for bare, ours, again in rounds]
    low, middle, high = quartiles(ratios)
    noise = statistics.median(again.wall / bare.wall for bare, _, again in rounds)
    computed = [2 * ours.computing / (bare.computing + again.computing) for bare, ours, again in rounds]
    bare_median = statistics.median(timing.wall for timing in turns["bare"] + turns["bare again"])
    ours_median = statistics.median(timing.wall for timing in turns["ours"])
    return [
        strategy,
        f"{1000 * bare_median:.1f}",
        f"{1000 * ours_median:.1f}",
        f"{middle:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{noise:.3f}",
        f"{statistics.median(computed):.3f}",
        *(
            (
                f"{memory['bare'] / 2**20:.2f}",
                f"{memory['ours'] / 2**20:.2f}",
                f"{memory['ours'] / memory['bare']:.4f}",
            )
            if memory["bare"]
            else "---"
        ),
    ]


COLUMNS = {  # heading to width
    "strategy": 17,
    "bare, ms": 8,
    "ours, ms": 8,
    "time ratio": 10,
    "quartiles": 14,
    "noise": 6,
    "computing": 9,
    "bare, MiB": 9,
    "ours, MiB": 9,
    "ratio": 6,
}


def measure(options: argparse.Namespace) -> None:
    """One rank of the measurement."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)  # a core for each rank is steadiest
    ranks, is_main = dist.get_world_size(), dist.get_rank() == 0
    updates = Clock(torch.device("cpu"), options.updates).updates_of_a_turn
    tokens = Tokens(updates * options.batch_size * ranks, options.length, VOCABULARY)
    setting = Setting(tokens, options.batch_size, options.updates)
    loops: dict[tuple[str, str], Loop] = {}
    strategies: list[str] = options.strategies.split(",")
    for strategy in strategies:
        loops[strategy, "bare"] = BARE[strategy](setting)
        loops[strategy, "ours"] = Ours(setting, strategy, options.directory)
        loops[strategy, "bare again"] = BARE[strategy](setting)
    times: dict[str, dict[str, list[Timing]]] = {s: {"bare": [], "ours": [], "bare again": []} for s in strategies}
    for number in range(options.rounds + 1):
        for (strategy, name), loop in in_turns(loops, number):
            timing = loop.turn()
            if number:  # the first round allocates and compiles
                times[strategy][name].append(timing)
        if is_main:
            print(f"round {number} of {options.rounds}", end="\r", file=sys.stderr, flush=True)
    memory: dict[str, dict[str, int]] = {strategy: {} for strategy in strategies}
    for (strategy, name), loop in loops.items():
        memory[strategy][name] = loop.memory
    if is_main:
        parameters = sum(parameter.numel() for parameter in setting.module().parameters())
        print(
            f"\nPython {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} CPUs, {ranks} gloo "
            f"ranks of one thread; {parameters:,} parameters, {options.batch_size} x {options.length} tokens a rank; "
            f"{options.rounds} rounds of {options.updates} updates"
        )
        for cells in [list(COLUMNS), *(row(strategy, times[strategy], memory[strategy]) for strategy in strategies)]:
            print("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True)))
        if {"ddp", "fsdp2"} <= {*strategies}:
            part = memory["fsdp2"]["ours"] / memory["ddp"]["ours"]
            print(f"fsdp2 holds {part:.4f} of a whole replica on each of {ranks} ranks")
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.2)  # gloo's threads end a little later (pytorch #190489)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--strategies", default="ddp,fsdp2", help=f"comma-separated: {', '.join(BARE)}")
    parser.add_argument("--ranks", type=int, default=2, help="processes; no more than cores")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each loop")
    parser.add_argument("--updates", type=int, default=8, help="timed updates in a turn")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences on a rank")
    parser.add_argument("--length", type=int, default=64, help="tokens in a sequence")
    parser.add_argument("--directory", help=argparse.SUPPRESS)  # the same on all ranks, for logs
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure(options)
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
        with tempfile.TemporaryDirectory() as directory:
            arguments = [*sys.argv[1:], f"--directory={directory}"]
            # DeepSpeed would warn that it found no accelerator.
            environment = {"DS_ACCELERATOR": "cpu", **os.environ}
            sys.exit(subprocess.call([sys.executable, *launcher, __file__, *arguments], env=environment))


if __name__ == "__main__":
    main()
