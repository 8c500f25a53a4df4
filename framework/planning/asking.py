"""Asking for a plan: ranks are played in processes of their own, one for each that may differ."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..configuration.configuration import Configuration
from ..configuration.writing import text_of
from .account import Account
from .devices import Device, find_device
from .plan import RunPlan, accounts_that_differ

MARGIN = 0.1
RANKS_OF_NODE = 8  # where nobody says how many
FIT = "stratagem.framework.fit:Fit"
CHILD = "stratagem.framework.planning.child"


def plan_of_words(
    words: Sequence[str], world_size: int, device: str, nodes: int | None = None, margin: float = MARGIN
) -> RunPlan:
    """Plan what a command line configures, as ``stratagem fit`` takes it.

    Args:
        words: of the command line, the target among them.
        world_size, device, nodes, margin: see ``plan_of``.
    """
    return ask({"words": list(words), "config": None, "fit": FIT}, world_size, device, nodes, margin)


def plan_of(
    configuration: Configuration,
    world_size: int,
    device: str,
    nodes: int | None = None,
    margin: float = MARGIN,
    fit: str = FIT,
) -> RunPlan:
    """Plan a run.

    Args:
        configuration: of the run; its target makes the module and the data.
        world_size: ranks.
        device: that each has, see ``find_device``.
        nodes: that the ranks lie on, equally many on each; None puts eight on each.
        margin: the part of the device's memory that is to stay free.
        fit: the class, as "module:Class".

    Raises:
        ValueError: the run can't be planned; says why and what to write instead.
    """
    if configuration.target is None or not configuration.target.name:
        raise ValueError(
            "A plan is made in a process of its own, which must find what makes the module by a name: give it "
            '"train.py:build" or "package.module:build".'
        )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.yaml"
        path.write_text(text_of(dict(configuration.values), configuration.target.name), encoding="utf-8")
        return ask({"words": None, "config": str(path), "fit": fit}, world_size, device, nodes, margin)


def ask(request: Mapping[str, Any], world_size: int, device: str, nodes: int | None, margin: float) -> RunPlan:
    """Play the ranks that may differ, and put their accounts together."""
    began = time.monotonic()
    found = find_device(device)
    nodes = check(world_size, nodes, margin)
    per_node = world_size // nodes
    request = {**request, "ranks_per_node": per_node}
    # Shards are cut as torch.chunk cuts: the first rank has the largest, the last one the smallest.
    ranks = sorted({0, world_size - 1})
    accounts = play_ranks(request, ranks, world_size, per_node)
    return RunPlan(accounts_that_differ(accounts), world_size, nodes, found, margin, time.monotonic() - began)


def check(world_size: int, nodes: int | None, margin: float) -> int:
    """Refuse worlds that there can't be, and return the number of nodes.

    Raises:
        ValueError: says what works.
    """
    if world_size < 1:
        raise ValueError(f"world counts ranks, and is at least 1. Received: {world_size}")
    if nodes is None:
        nodes = max(1, world_size // RANKS_OF_NODE)
        nodes = next(count for count in range(nodes, 0, -1) if world_size % count == 0)
    if nodes < 1 or world_size % nodes:
        works = [str(count) for count in range(1, world_size + 1) if world_size % count == 0][:12]
        raise ValueError(
            f"nodes={nodes} can't hold {world_size} ranks, equally many on each. nodes may be {', '.join(works)}."
        )
    if not 0 <= margin < 1:
        raise ValueError(f"margin is the part of the memory that stays free, from 0 to below 1. Received: {margin}")
    return nodes


def play_ranks(request: Mapping[str, Any], ranks: Sequence[int], world_size: int, per_node: int) -> list[Account]:
    """Play ranks, at the same time, each in a process.

    Raises:
        ValueError: what a rank says can't work.
        RuntimeError: a process ended without an answer; the message has the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as directory:
        asked = Path(directory) / "request.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        processes = []
        try:
            for rank in ranks:
                answer, printed = Path(directory) / f"{rank}.json", Path(directory) / f"{rank}.txt"
                with printed.open("w") as stream:
                    process = subprocess.Popen(
                        [sys.executable, "-m", CHILD, str(asked), str(answer)],
                        env=environment(rank, world_size, per_node),
                        stdin=subprocess.DEVNULL,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                    )
                processes.append((rank, process, answer, printed))
            found = []
            for rank, process, answer, printed in processes:
                process.wait()
                if not answer.exists():
                    end = "\n".join(printed.read_text(errors="replace").splitlines()[-30:])
                    raise PlanningError(process.returncode, f"Rank {rank} could not be played:\n{end}")
                said = json.loads(answer.read_text(encoding="utf-8"))
                if "problem" in said:
                    raise ValueError(said["problem"])
                found.append(Account.from_dict(said["account"]))
            return found
        finally:
            for _, process, _, _ in processes:
                process.kill()
                process.wait()


class PlanningError(RuntimeError):
    """A process that played a rank ended without an account.

    Attributes:
        status: that it ended with.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def environment(rank: int, world_size: int, per_node: int) -> dict[str, str]:
    """The environment variables of a process that plays a rank: a launcher's, and no device to be seen."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "PMI_"))}
    return {
        **own,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank % per_node),
        "LOCAL_WORLD_SIZE": str(per_node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


__all__ = ["MARGIN", "Device", "PlanningError", "RunPlan", "plan_of", "plan_of_words"]
