"""GrokAdamW with its moments where a checkpoint finds them."""

import logging
from collections.abc import Callable
from typing import Any

import torch


def grok_adamw() -> Callable[..., Any]:
    """The class of the package grokadamw, which keeps its moments inside the parameter groups, with them in ``state``.

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
            for group in self.param_groups:
                group["state"] = {p: self.state[p] for p in group["params"] if self.state.get(p)}
            try:
                super().step()
            finally:
                for group in self.param_groups:
                    self.state.update(group.pop("state"))

    return GrokAdamW
