"""Optimizers of packages, with what they remember where a checkpoint finds it: tensors in state, numbers in groups."""

import logging
from collections.abc import Callable
from typing import Any

import torch


def count_in_numbers(optimizer: Any) -> None:
    """Make numbers of the counters that a checkpoint gave back as tensors, on the host: bias corrections are computed
    from them, in float32 where they are tensors.
    """
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].item()


def grok_adamw() -> Callable[..., Any]:
    """The class of the package grokadamw, whose moments are inside the parameter groups, with them in ``state``.

    Raises:
        ImportError: the package isn't installed.
    """
    level = logging.getLogger().level
    from grokadamw import GrokAdamW as Original

    logging.getLogger().setLevel(level)  # the package has just lowered it for the whole process

    class GrokAdamW(Original):
        """Lends the moments to the groups for a step."""

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> None:
            """Step."""
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
    """The class of the package torch-optimi, which counts updates in a tensor of each group, with a number there.

    Raises:
        ImportError: the package isn't installed.
    """
    from optimi import StableAdamW as Original

    class StableAdamW(Original):
        """Makes tensors of the groups' counters for a step."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.counters_as(int)

        def step(self, closure: Callable[[], float] | None = None, param: Any = None) -> None:
            """Step."""
            assert closure is None and param is None, "nothing here calls a closure"
            self.counters_as(lambda count: torch.tensor(count, dtype=torch.int32))
            super().step()
            self.counters_as(int)

        def counters_as(self, kind: Callable[[Any], Any]) -> None:
            """Change what the groups count with; the tensor is the host's, so that nothing waits."""
            for group in self.param_groups:
                if "step" in group:
                    group["step"] = kind(group["step"])

    return StableAdamW
