"""A program that test_ray.py starts: trains 12 updates on Ray's workers, and writes what Ray's Result holds."""

import argparse
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from stratagem import Callback, Fit
from stratagem.framework.ray import fit_on_ray
from training import Tagger, token_rows


class Killer(Callback):
    """Kills rank 1's process after the 7th update, once."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def on_step_begin(self, args: Any, state: Any, control: Any, *, fit: Fit, **_: Any) -> None:
        if state.global_step == 7 and fit.strategy.rank == 1 and not self.mark.exists():
            self.mark.write_text(str(fit.strategy.world_size))
            os.kill(os.getpid(), signal.SIGKILL)


class MachineKiller(Callback):
    """Asks for the death of the machine that isn't the head's after the 7th update, and waits for it."""

    def __init__(self, mark: Path, head: str) -> None:
        self.mark, self.head = mark, head

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        is_head = ray.get_runtime_context().get_node_id() == self.head
        if state.global_step == 7 and not is_head and not self.mark.exists():
            self.mark.touch()
            time.sleep(60.0)


def kill_machine_when_asked(mark: Path, cluster: Cluster, machine: Any) -> None:
    while not mark.exists():
        time.sleep(0.1)
    cluster.remove_node(machine, allow_graceful=False)


class Reports(UserCallback):
    """Writes each report down, in Ray's controller."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        line = {"metrics": metrics[0], "ranks": len(metrics), "checkpoint": checkpoint and checkpoint.path}
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")


def make_fit(options: argparse.Namespace, output_dir: Path, callbacks: Sequence[Callback] = ()) -> Fit:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return Fit(
        Tagger(),
        token_rows(80),
        token_rows(16),
        strategy=options.strategy,
        devices=2 if options.launcher else "auto",
        callbacks=callbacks,
        output_dir=str(output_dir),
        max_steps=12,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=6,
        save_steps=3,
        save_total_limit=2,
        async_save=options.async_save,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        progress=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--kill", choices=["worker", "machine"])
    parser.add_argument("--own-directory", action="store_true")
    parser.add_argument("--async-save", action="store_true")
    parser.add_argument("--launcher", action="store_true", help="ours, without Ray")
    options = parser.parse_args()
    if options.launcher:
        make_fit(options, options.output).train()
        return
    cluster, mark = None, options.output / "killed"
    callbacks: list[Callback] = [Killer(mark)] if options.kill == "worker" else []
    if options.kill == "machine":
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        machine = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address)
        callbacks = [MachineKiller(mark, ray.get_runtime_context().get_node_id())]
        threading.Thread(target=kill_machine_when_asked, args=(mark, cluster, machine), daemon=True).start()
    else:
        ray.init(num_cpus=2, include_dashboard=False)

    def build_there(directory: str) -> Fit:
        return make_fit(options, Path(directory), callbacks)

    def build_here() -> Fit:
        return make_fit(options, options.output / "own", callbacks)

    try:
        result = fit_on_ray(
            build_here if options.own_directory else build_there,
            ScalingConfig(num_workers=(1, 2) if options.kill == "machine" else 2),
            RunConfig(
                name="run",
                storage_path=str(options.output),
                failure_config=FailureConfig(max_failures=1),
                callbacks=[Reports(options.output / "reports.jsonl")],
            ),
        )
        found = {
            "metrics": result.metrics,
            "checkpoint": result.checkpoint and result.checkpoint.path,
            "return_value": result.return_value,
            "path": result.path,
        }
        (options.output / "result.json").write_text(json.dumps(found))
    finally:
        ray.shutdown()
        if cluster is not None:
            cluster.shutdown()


if __name__ == "__main__":
    main()
