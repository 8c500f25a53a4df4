"""How often ranks talk: counted as the operations that reach torch's process groups, under real training."""

from collections import Counter
from typing import Any

import pytest
import torch
from ranks import Ranks
from stratagem import Callback
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import Tagger, make_fit, token_rows

pytestmark = pytest.mark.slow

BLOCK = 6 + 6 + 24 * 6 + 24 + 24 * 6 + 6  # numbers in a Tagger's block
ROOT = 11 * 6 + 11  # trainable ones outside of the blocks: the tied weight once, and the head's bias

Message = tuple[str, str, int]  # operation, dtype, numbers


class Traffic(TorchDispatchMode):
    """Notes every operation of a process group, by where the run stands."""

    def __init__(self) -> None:
        super().__init__()
        self.where = "start"
        self.messages: dict[str, list[Message]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            sent = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
            name = function._schema.name.partition("::")[2].strip("_")
            message = (name, str(sent.dtype).removeprefix("torch."), sent.numel())
            self.messages.setdefault(self.where, []).append(message)
        return function(*args, **(kwargs or {}))


class Marker(Callback):
    """Tells the traffic where the run stands: "update 3", "log 4"."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def on_step_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.traffic.where = f"update {state.global_step + 1}"

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.traffic.where = f"after {state.global_step}"

    def on_log(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.traffic.where = f"logged {state.global_step}"


class Reporting(Tagger):
    """Logs three numbers beside its loss."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = super().loss(outputs, batch)
        return {"loss": loss, "largest": outputs.max(), "smallest": outputs.min(), "spread": outputs.std()}


def listen(module: type[Tagger] = Tagger, **arguments: Any) -> dict[str, list[Message]]:
    """Train 8 updates of 4 micro-batches with a log after the 4th and the 8th; the messages by where they were sent."""
    traffic = Traffic()
    fit = make_fit(
        module(),
        token_rows(),
        max_steps=8,
        logging_steps=4,
        per_device_train_batch_size=2,
        callbacks=[Marker(traffic)],
        **{"gradient_accumulation_steps": 4, **arguments},
    )
    with traffic:
        fit.train()
    return traffic.messages


def count(messages: list[Message], *operations: str, dtype: str | None = None) -> int:
    return sum(name in operations and dtype in (None, kind) for name, kind, _ in messages)


# The names that torch gives its operations; several for one purpose, by version.
ALL_REDUCE = ("allreduce", "all_reduce")
GATHER = ("_allgather_base", "allgather_base", "all_gather_into_tensor", "allgather_into_tensor_coalesced")
SCATTER = ("_reduce_scatter_base", "reduce_scatter_base", "reduce_scatter_tensor")


def test_dump(ranks: dict[int, Ranks]) -> None:
    for strategy in ("ddp", "fsdp1", "fsdp2", "tp"):
        messages = ranks[2].run(listen, strategy=strategy)[0]
        print(strategy)
        for where, sent in messages.items():
            print("  ", where, Counter(sent).most_common())
