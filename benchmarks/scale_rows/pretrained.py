"""Row: a transformers model placed from its files on two ranks."""

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ... import Fit, TrainModule
from .measuring import measuring

TITLE = "A Llama of 0.25 G parameters in bfloat16 files, placed in float32 on two ranks under fsdp2: rank 0"
ROUNDS = 3
LIMIT = "by hand: get_slice"
SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
}
READ, SHARD = "read MiB", "shard MiB"


def on_two_ranks(place: Callable[[Path], tuple[dict[str, float], nn.Module]]) -> dict[str, float]:
    """Write the model, and have two fresh processes place it; rank 0's figures."""
    import transformers

    with tempfile.TemporaryDirectory() as directory, socket.socket() as free:
        config = transformers.LlamaConfig(**SIZES, dtype="bfloat16")
        transformers.LlamaForCausalLM._from_config(config).save_pretrained(directory)
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        ranks = [context.Process(target=rank, args=(place, number, port, directory, theirs)) for number in range(2)]
        for process in ranks:
            process.start()
        figures: dict[str, float] = ours.recv()
        for process in ranks:
            process.join()
    return figures


def rank(
    place: Callable[[Path], tuple[dict[str, float], nn.Module]],
    number: int,
    port: str,
    directory: str,
    told: Connection,
) -> None:
    """One rank."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    figures, module = place(Path(directory))
    shards: list[Any] = list(module.parameters())
    if number == 0:
        told.send({**figures, SHARD: sum(shard.to_local().nbytes for shard in shards) / 2**20})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def placed(module: TrainModule, directory: Path) -> Fit:
    """A Fit that places and does nothing else."""
    return Fit(
        module, strategy="fsdp2", precision="32-true", progress=False, loggers=(), report=False,
        output_dir=str(directory / "output"),
    )  # fmt: skip


class Tiny(TrainModule):
    """Placed before anything is measured, so that nothing is imported then."""

    def build(self) -> None:
        self.layer = nn.Linear(4, 4)


def warm_up(directory: Path) -> None:
    """Import what placing needs."""
    from transformers.models.llama import modeling_llama  # noqa: F401

    placed(Tiny(), directory).place()


def by_directory(directory: Path) -> tuple[dict[str, float], nn.Module]:
    """TrainModule.wrap with the model's directory."""
    count, preadv = 0, os.preadv

    def counted(file: int, into: Any, offset: int) -> int:
        nonlocal count
        count += len(into[0])
        return preadv(file, into, offset)

    os.preadv = counted  # type: ignore[assignment]
    warm_up(directory)
    with measuring() as figures:
        fit = placed(TrainModule.wrap(directory), directory)
        fit.place()
    return {**figures, READ: count / 2**20}, fit.module


def loaded_first(directory: Path) -> tuple[dict[str, float], nn.Module]:
    """The model made whole by from_pretrained on each rank, then wrapped."""
    import transformers

    warm_up(directory)
    with measuring() as figures:
        model = transformers.LlamaForCausalLM.from_pretrained(directory)
        fit = placed(TrainModule.wrap(model), directory)
        fit.place()
    return figures, fit.module


def by_slices(directory: Path) -> tuple[dict[str, float], nn.Module]:
    """fully_shard over a model without memory, and each shard from its slice of the file."""
    import transformers
    from torch.distributed.fsdp import fully_shard
    from transformers.models.llama import modeling_llama  # noqa: F401

    torch.distributed.init_process_group("gloo")
    config = transformers.LlamaConfig.from_pretrained(directory)
    with measuring() as figures:
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config).float()
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        model.to_empty(device="cpu")
        with safe_open(directory / "model.safetensors", "pt") as file, torch.no_grad():
            for name, parameter in model.named_parameters():
                local = parameter.to_local()
                first = torch.distributed.get_rank() * -(-parameter.shape[0] // 2)
                local.copy_(file.get_slice(name)[first : first + len(local)])
    return figures, model


CONTESTANTS = {
    "stratagem: wrap(directory)": lambda: on_two_ranks(by_directory),
    "stratagem: from_pretrained, then wrap": lambda: on_two_ranks(loaded_first),
    "by hand: get_slice": lambda: on_two_ranks(by_slices),
}
