"""Hybrid sharding over two nodes: weights are cut over the ranks of a node, and each node has all of them (HSDP).

    python examples/several_nodes.py    # starts both "nodes" on this machine; needs scikit-learn and torchmetrics
    python examples/several_nodes.py --max_steps 40 --learning_rate 1e-3    # options of the run, for all ranks

On real nodes you start the second half of this file alone, with the same command on each of them:

    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=$HEAD:29400 train.py

It trains twice, with one torchrun for four ranks and with two torchruns for two each, as on two machines, and ends with
two tables: what each rank holds, and the losses of both runs, which are equal.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from digits import build, data
from stratagem import Fit, configure
from stratagem.strategies import FSDP2

NODES, RANKS = 2, 4
ARGUMENTS = {
    "strategy": FSDP2(replicas=NODES), "output_dir": "output/several_nodes", "max_steps": 20, "seed": 0,
    "per_device_train_batch_size": 16, "per_device_eval_batch_size": 256, "learning_rate": 3e-3,
    "logging_steps": 4, "save_strategy": "no",
}  # fmt: skip


def train() -> None:
    """Train, on each rank."""
    run = configure(build, data, ARGUMENTS)
    fit = Fit.from_config(run)
    fit.train()
    assert isinstance(fit.strategy, FSDP2)
    held = sum(weight.numel() for weight in fit.strategy.held_weights().values())
    places = fit.strategy.gather((os.environ["GROUP_RANK"], fit.strategy.mesh.get_coordinate(), held))
    if fit.strategy.is_main:
        Path(fit.args.output_dir, "places.json").write_text(json.dumps(places))


def launch(nodes: int, output: Path) -> dict[int, float]:
    """Start all ranks, by a launcher for each node, wait for them, and return the logged losses by update."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    words = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={RANKS // nodes}"]
    words += ["--rdzv-backend=c10d", f"--rdzv-endpoint={address}", __file__, *sys.argv[1:], f"--output_dir={output}"]
    # On the CPU: two nodes on one machine would take the same GPUs.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    launchers = [subprocess.Popen(words, env=environment) for _ in range(nodes)]
    if max(abs(launcher.wait()) for launcher in launchers):
        sys.exit(f"a rank of {output} failed; what it wrote stands above")
    entries = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def main() -> None:
    """Train with one launcher and with two, and compare."""
    output = Path(configure(build, data, ARGUMENTS).values["output_dir"])
    one, two = launch(1, output / "one"), launch(2, output / "two")
    print("rank   node   replica   shard   weights held")
    for rank, (node, (replica, shard, *_), held) in enumerate(json.loads((output / "two/places.json").read_text())):
        print(f"{rank:4} {node:>6} {replica:9} {shard:7} {held:14,}")
    print("  update   loss with one launcher   with two")
    for update, loss in one.items():
        print(f"{update:8} {loss:24.6f} {two[update]:10.6f}")


if __name__ == "__main__":
    train() if "RANK" in os.environ else main()
