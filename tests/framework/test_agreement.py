"""The comparison of what the ranks were given: a digest each, and all of it only where it differs."""

import pickle
from typing import Any

import pytest
from stratagem.framework.agreement import check_ranks_agree
from stratagem.strategies import Strategy


class Two(Strategy):
    """The first of two ranks, whose other one gives what this one does, but for one change."""

    name = "two"

    def __init__(self, change: Any = None) -> None:
        super().__init__()
        self.change = change
        self.sent: list[int] = []

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        self.sent.append(len(pickle.dumps(value)))
        if self.change is None:
            return [value, value]
        other = {**value, "parameter": {**value["parameter"], **self.change}} if isinstance(value, dict) else "other"
        return [value, other]


PARAMETERS = {f"layers.{number}.weight": "(8, 8) torch.float32" for number in range(10_000)}


def test_ranks_that_agree_exchange_a_digest() -> None:
    strategy = Two()
    check_ranks_agree(strategy, {"parameter": PARAMETERS})
    assert len(strategy.sent) == 1 and strategy.sent[0] < 100


def test_a_difference_is_named_though_digests_say_only_that_there_is_one() -> None:
    strategy = Two(change={"layers.77.weight": "(9, 8) torch.float32"})
    with pytest.raises(
        ValueError, match=r"rank 1: parameter layers\.77\.weight is '\(9, 8\) torch\.float32', on rank 0"
    ):
        check_ranks_agree(strategy, {"parameter": PARAMETERS})
    assert len(strategy.sent) == 2
    check_ranks_agree(Two(change={}), {"parameter": PARAMETERS})  # equal, and written otherwise: no difference
