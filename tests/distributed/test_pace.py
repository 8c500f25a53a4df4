"""The log names the slowest rank, by times that ride in a message that the ranks exchange anyway."""

import os
import time
from typing import Any

import pytest
from ranks import Ranks
from stratagem import Callback
from torch import Tensor
from torch.utils.data import Dataset
from training import Tagger, make_fit, token_rows

SLOW = 2
SECONDS = 0.15  # an update's other work takes a few milliseconds


class SlowCallback(Callback):
    """Sleeps on one rank."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if int(os.environ["RANK"]) == SLOW:
            time.sleep(SECONDS)


class SlowForward(Tagger):
    """Computes for long on one rank."""

    def forward(self, tokens: Tensor) -> Tensor:
        if int(os.environ["RANK"]) == SLOW:
            time.sleep(SECONDS / 2)
        return super().forward(tokens)


class SlowRows(Dataset):
    """Reads slowly on one rank."""

    def __init__(self) -> None:
        self.rows = token_rows(400)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        if int(os.environ["RANK"]) == SLOW:
            time.sleep(SECONDS / 8)
        return self.rows[index]


def run(where: str, **arguments: Any) -> list[dict[str, Any]]:
    data = SlowRows() if where == "data" else token_rows(400)
    module = SlowForward() if where == "forward" else Tagger()
    callbacks = [SlowCallback()] if where == "callback" else []
    fit = make_fit(
        module, data, callbacks=callbacks, max_steps=8, logging_steps=4, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, **arguments,
    )  # fmt: skip
    fit.train()
    return [log for log in fit.state.log_history if "loss" in log]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "strategy"),
    [
        ("callback", "ddp"),
        ("callback", "fsdp2"),
        ("callback", "tp"),
        ("data", "ddp"),
        ("data", "fsdp2"),
        ("forward", "ddp"),
    ],
)
def test_the_slowest_of_three_ranks_is_named(ranks: dict[int, Ranks], where: str, strategy: str) -> None:
    logs = ranks[3].run(run, where=where, strategy=strategy)
    assert logs[0] == logs[1] == logs[2]
    for log in logs[0]:
        assert log["slowest_rank"] == SLOW
        assert 1.1 < log["slowest_rank_ratio"] < 1000
        assert (log["data_wait_seconds"] > 0.8 * SECONDS) == (where == "data")


def test_one_rank_has_no_slowest() -> None:
    assert all("slowest_rank" not in log for log in run("nowhere", strategy="single"))
