"""Two ranks over gloo, each in a process of its own, for what a benchmark measures of one of them."""

import json
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from typing import Any

Measured = Callable[[], dict[str, float]]


def on_two_ranks(measured: Measured) -> dict[str, float]:
    """Call a function on two ranks, in a directory that is theirs, and return the larger of their figures.

    Args:
        measured: at the top of a file. Where it needs a process group it joins one, by the environment of torchrun.

    Raises:
        RuntimeError: a rank failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    directory = tempfile.TemporaryDirectory()
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(2):
        ours, theirs = context.Pipe()
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **{k: str(v) for k, v in places.items()}}
        processes.append(context.Process(target=serve, args=(measured, environment, directory.name, theirs)))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        told: list[dict[str, float]] = [json.loads(pipe.recv()) for pipe in pipes]
    except EOFError as error:
        raise RuntimeError(f"{measured.__name__} failed on a rank") from error
    finally:
        for process in processes:
            process.join()
        directory.cleanup()
    return {name: max(figures[name] for figures in told) for name in told[0]}


def serve(measured: Measured, environment: dict[str, str], directory: str, pipe: Any) -> None:
    """Be one rank."""
    import torch

    os.environ.update(environment)
    os.chdir(directory)
    torch.set_num_threads(1)
    pipe.send(json.dumps(measured()))
