"""What ``stratagem plan`` says beside what a GPU says, and what planning large models costs.

    python benchmarks/plan.py            # all of it
    python benchmarks/plan.py large      # the cost alone, of Llama 8B and 70B on 1,024 and 4,096 ranks
    python benchmarks/plan.py peaks      # the peaks alone

* **Peaks**: each row trains three updates on this machine's GPUs, in processes of its own, and is planned for as many
  ranks. "allocated" is the first rank's ``torch.cuda.max_memory_allocated`` in the last two updates, and "error" is how
  far the plan is from it. Without a GPU there is no such row, and a line says so.
* **Cost**: of the command as users call it. CPU seconds are of all of its processes (it has one for each rank that is
  played, and its own), so they don't hang on what else the machine does; memory is of the largest of them.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from stratagem import Callback, Fit, TrainModule
from stratagem.framework.configuration.command_line import Command
from torch import Tensor

HERE = Path(__file__).resolve()
GPT = HERE.parents[1] / "examples" / "gpt.py"
STEM = [sys.executable, "-m", "stratagem", "plan"]
LLAMAS = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "small": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16},
}
LARGE = {"8b": 1024, "70b": 4096}  # size to ranks
MIB = 2**20


class Rows:
    """Tokens, made when they are asked for."""

    def __init__(self, count: int, length: int) -> None:
        self.count, self.length = count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.full((self.length,), index % 1000)
        return {"input_ids": tokens, "labels": tokens}


def build_llama(size: str = "small", context: int = 1024) -> dict[str, Any]:
    """A Llama 3 of transformers, of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {**LLAMAS[size], "num_key_value_heads": 8, "vocab_size": 128256}
    config = LlamaConfig(**sizes, max_position_embeddings=8192, use_cache=False)
    return {"module": TrainModule.wrap(lambda: LlamaForCausalLM(config)), "train_data": Rows(8192, context)}


def build_vit() -> dict[str, Any]:
    """A ViT-B/16 of transformers."""
    from transformers import ViTConfig, ViTForImageClassification

    rows = [{"pixel_values": torch.ones(3, 224, 224), "labels": torch.tensor(number)} for number in range(64)]
    return {"module": TrainModule.wrap(lambda: ViTForImageClassification(ViTConfig())), "train_data": rows}


TARGETS = {"gpt": f"{GPT}:build", "llama": f"{HERE}:build_llama", "vit": f"{HERE}:build_vit"}
OPTIONS = {"gpt": {"context": 512, "layers": 12, "width": 768, "heads": 12}, "llama": {}, "vit": {}}
ROWS: list[dict[str, Any]] = [
    {},
    {"precision": "bf16-mixed"},
    {"precision": "bf16-mixed", "gradient_checkpointing": True},
    {"precision": "bf16-true", "gradient_accumulation_steps": 2},
]


class Allocated(Callback):
    """The most that torch's allocator of the GPU gave out at once, in the updates after the first."""

    bytes = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if state.global_step == 1:
            torch.cuda.reset_peak_memory_stats()
        self.bytes = torch.cuda.max_memory_allocated()


def train(words: Sequence[str]) -> None:
    """Train what a command line configures for real, as one of its ranks; the first prints its bytes."""
    allocated = Allocated()
    with tempfile.TemporaryDirectory() as directory:
        given = {
            "callbacks": [allocated], "loggers": (), "progress": False, "save_strategy": "no", "max_steps": 3,
            "output_dir": directory,
        }  # fmt: skip
        Fit(**Command("benchmarks/plan.py train", "", names_target=True).read(words).fit_arguments(given)).train()
    if os.environ.get("RANK", "0") == "0":
        print("allocated", allocated.bytes)


def words_of(values: dict[str, Any]) -> list[str]:
    """Options as a command line has them."""
    return [word for name, value in values.items() for word in (f"--{name}", json.dumps(value).strip('"'))]


def planned(words: Sequence[str]) -> dict[str, Any]:
    """Plan by the command.

    Raises:
        RuntimeError: it failed; the message is what it printed.
    """
    finished = subprocess.run([*STEM, *words, "--json"], capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(finished.stderr)
    plan: dict[str, Any] = json.loads(finished.stdout)
    return plan


def peaks(samples: int) -> None:
    """Print planned and allocated peaks."""
    gpus = torch.cuda.device_count()
    if not gpus:
        print("peaks: this machine has no GPU, so no plan is compared with torch.cuda.max_memory_allocated here.")
        return
    print(f"peaks: {gpus} x {torch.cuda.get_device_name(0)}, torch {torch.__version__}, {samples} samples a rank\n")
    print("| model | strategy | arguments | planned MiB | allocated MiB | error |\n|---|---|---|---|---|---|")
    strategies = {"single": 1, **({"ddp": gpus, "fsdp2": gpus} if gpus > 1 else {})}
    for model in TARGETS:
        for strategy, ranks in strategies.items():
            for arguments in ROWS:
                print(row_of(model, strategy, ranks, samples, arguments), flush=True)


def row_of(model: str, strategy: str, ranks: int, samples: int, arguments: dict[str, Any]) -> str:
    """Plan and train a row of the table."""
    options = {f"build.{name}": value for name, value in OPTIONS[model].items()}
    values = {"strategy": strategy, "per_device_train_batch_size": samples, **options, **arguments}
    words = [TARGETS[model], *words_of(values)]
    peak = planned([*words, "--world", str(ranks)])["peak_bytes"]
    launched = [sys.executable]
    if ranks > 1:
        launched += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    finished = subprocess.run([*launched, str(HERE), "train", *words], capture_output=True, text=True, check=False)
    said = [line.split()[1] for line in finished.stdout.splitlines() if line.startswith("allocated ")]
    name = f"| {model} | {strategy} | {' '.join(f'{k}={v}' for k, v in arguments.items())} | {peak / MIB:.1f} |"
    if finished.returncode or not said:
        return f"{name} failed: {finished.stderr.strip().splitlines()[-1:]} | |"
    return f"{name} {int(said[0]) / MIB:.1f} | {peak / int(said[0]) - 1:+.1%} |"


def large() -> None:
    """Print what planning large models takes."""
    print("large: fsdp2, bf16-mixed, gradient checkpointing, 1 sample of 4,096 tokens a rank\n")
    print("| model | ranks | CPU s | wall s | largest process MiB | planned peak GiB |\n|---|---|---|---|---|---|")
    for size, ranks in LARGE.items():
        values = {"strategy": "fsdp2", "precision": "bf16-mixed", "gradient_checkpointing": True}
        options = {"build.size": size, "build.context": 4096, "per_device_train_batch_size": 1}
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        plan = planned([TARGETS["llama"], "--world", str(ranks), *words_of({**values, **options})])
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(
            f"| Llama 3 {size.upper()} | {ranks:,} | {seconds:.0f} | {wall:.0f} | {after.ru_maxrss / 1024:.0f} | "
            f"{plan['peak_bytes'] / 2**30:.2f} |",
            flush=True,
        )
    print(f"\nThe machine's load was {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores at the end.")


def main() -> None:
    """Run what was asked for."""
    if sys.argv[1:2] == ["train"]:
        train(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["large", "peaks", []], metavar="large|peaks", help="default: both")
    parser.add_argument("--samples", type=int, default=4, help="of a micro-batch, for the peaks (default: 4)")
    options = parser.parse_args()
    for part in options.parts or ["peaks", "large"]:
        print()
        large() if part == "large" else peaks(options.samples)


if __name__ == "__main__":
    main()
