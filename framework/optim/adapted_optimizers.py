"""Optimizers of packages, changed so that a checkpoint finds their memory: tensors in state, numbers in groups."""

import logging
from collections.abc import Callable
from typing import Any

import torch


def count_in_numbers(optimizer: Any) -> None:
    """Turn the step counters that a checkpoint gave back as tensors on the host into numbers: bias corrections are
    computed from them, and would be in float32 where the counters are tensors.
    """
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].item()


def grok_adamw() -> Callable[..., Any]:
    """Return the optimizer of the package grokadamw, with its moments in ``state`` and not inside the parameter groups.

    Raises:
        ImportError: the package isn't installed.
    """
    level = logging.getLogger().level
    from grokadamw import GrokAdamW as Original

    logging.getLogger().setLevel(level)  # importing the package lowers it for the whole process

    class GrokAdamW(Original):
        """Keeps the moments in ``state``, and puts them into the groups for the time of a step."""

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> None:
            """Step the optimizer."""
            assert closure is None, "nothing here calls a closure"
            count_in_numbers(self)
            for group in self.param_groups:
                group["state"] = {p: self.state[p] for p in group["params"] if self.state.get(p)}
            try:
                super().step()
            finally:
                for group in self.param_groups:
                    self.state.update(group.pop("state"))

    return GrokAdamW


def stable_adamw() -> Callable[..., Any]:
    """Return StableAdamW of the package torch-optimi, with a number in each group, and no tensor, that counts updates.

    Raises:
        ImportError: the package isn't installed.
    """
    from optimi import StableAdamW as Original

    class StableAdamW(Original):
        """Counts updates in numbers, which are tensors for the time of a step."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.counters_as(int)

        def step(self, closure: Callable[[], float] | None = None, param: Any = None) -> None:
            """Step the optimizer."""
            assert closure is None and param is None, "nothing here calls a closure"
            self.counters_as(lambda count: torch.tensor(count, dtype=torch.int32))
            super().step()
            self.counters_as(int)

        def counters_as(self, kind: Callable[[Any], Any]) -> None:
            """Convert the counter of each group. A tensor is on the host, so that nothing waits for the device."""
            for group in self.param_groups:
                if "step" in group:
                    group["step"] = kind(group["step"])

    return StableAdamW
