"""Batches that are copied ahead: which stream each tensor is copied on, in which order, and how far ahead at most.

A CPU has streams and events in name only, so these tests write down what they are told; tests/gpu has the real ones.
"""

from typing import Any

import pytest
import torch
from stratagem.strategies.copies_ahead import CopiesAhead
from torch import Tensor

CPU = torch.device("cpu")


class Noted(CopiesAhead):
    """Takes all tensors of float64 as page-locked, and writes down what happens; ``done`` works are over."""

    def __init__(self, most: int) -> None:
        super().__init__(CPU, most)
        self.events: list[Any] = []
        self.copied: list[Tensor] = []
        self.works, self.done = 0, 0
        noted = self

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def wait_stream(self, other: "Stream") -> None:
                noted.events.append(f"{self.name} waits for {other.name}")

        class Event:
            def record(self, stream: Stream) -> None:
                assert stream.name == "computing"
                noted.works += 1
                self.number = noted.works

            def query(self) -> bool:
                return self.number <= noted.done

        class Backend:
            def current_stream(self, device: torch.device) -> Stream:
                return computing

            def stream(self, stream: Stream) -> Any:
                noted.events.append(f"on {stream.name}")
                return torch.cpu.stream(None)

        computing = Stream("computing")
        self.backend = Backend()
        self.backend.Event = Event  # type: ignore[attr-defined]
        self.stream = Stream("copies")

    def is_pinned(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dtype == torch.float64

    def keep(self, copy: Tensor, computing: Any) -> None:
        self.events.append(f"kept for {computing.name}")

    def given(self, batch: Any) -> Any:
        self.events.clear()
        return self.move(batch, lambda value: self.events.append("in its turn") or value)


def pinned(count: int = 1) -> Tensor:
    return torch.arange(count, dtype=torch.float64)


def test_page_locked_tensors_come_by_the_other_stream_and_the_rest_as_before() -> None:
    batch = {"x": pinned(3), "y": (torch.ones(2), pinned(1)), "name": "a"}
    copies = Noted(most=1000)
    moved = copies.given(batch)
    assert copies.events == [
        "on copies", "kept for computing", "in its turn", "on copies", "kept for computing",
        "computing waits for copies",
    ]  # fmt: skip
    assert moved.keys() == batch.keys() and moved["name"] == "a"
    assert moved["x"].equal(batch["x"]) and moved["y"][0].equal(torch.ones(2)) and moved["y"][1].equal(pinned(1))
    copies.given({"y": torch.ones(1)})
    assert copies.events == ["in its turn"]


def test_no_more_lies_ahead_than_may() -> None:
    copies = Noted(most=3 * 8)
    kinds = []
    for number in range(8):
        copies.done = max(0, number - 5)  # the first work is over when the seventh batch comes
        copies.given(pinned())
        kinds.append("copies" if "on copies" in copies.events else "turn")
    assert kinds == ["copies", "copies", "copies", "turn", "turn", "turn", "copies", "copies"]


@pytest.mark.parametrize("most", [0, 8, 10_000])
def test_order_and_values_are_those_of_the_batches(most: int) -> None:
    copies = Noted(most)
    batches = [{"x": pinned(number + 1) + number} for number in range(6)]
    assert all(copies.given(batch)["x"].equal(batch["x"]) for batch in batches)
