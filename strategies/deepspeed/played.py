"""DeepSpeed as a played rank has it: its own engine, around tensors that have no memory and so no addresses."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ...precision.base import Precision
from ..base import ConfigureOptimizer, Prepare, nothing_to_prepare
from ..played import PlayedRank, exchanged
from .state import ZeroState

REDUCING = "reduce_independent_p_g_buckets_and_remove_grads", "independent_gradient_partition_epilogue"


class PlayedDeepSpeed(PlayedRank):
    """Makes the engine, which steps, gathers and sends as in a run."""

    zero_state: ZeroState | None
    asks: AbstractContextManager[None] = nullcontext()

    def set_up(self, precision: Precision) -> None:
        """Have the engine take the other ranks to compute what this one does."""
        super().set_up(precision)
        from deepspeed.runtime.zero import partitioned_param_coordinator

        self.asks = exchanged(partitioned_param_coordinator, assert_ints_same_as_other_ranks=lambda numbers: None)
        self.asks.__enter__()

    def tear_down(self) -> None:
        """Have the engine ask the other ranks again."""
        self.asks.__exit__(None, None, None)
        super().tear_down()

    def place(
        self, module: nn.Module, configure_optimizer: ConfigureOptimizer | None, prepare: Prepare = nothing_to_prepare
    ) -> None:
        """Have the engine leave the module where it is."""
        with exchanged(nn.Module, to=lambda layer, *where, **how: layer):
            super().place(module, configure_optimizer, prepare)
        if self.zero_state is not None:
            zero = self.zero_state.zero
            for name in REDUCING:
                setattr(zero, name, self.aside(getattr(zero, name)))

    def make_zero_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give this rank's shards gradients; stage 3 has memory for them from the beginning."""
        if self.zero_state is None:
            super().make_zero_gradients(parameters)
        elif self.zero_state.stage < 3:
            self.make_gradients_of_shards()

    def step_by_zeros(self) -> None:
        """Have the engine's optimizer step its shards."""
        if self.zero_state is None:
            super().step_by_zeros()
            return
        self.make_gradients_of_shards()
        if self.zero_state.stage < 3:
            self.zero_state.base.step()
        for number, (_, shard) in enumerate(self.zero_state.flat_shards()):
            if self.zero_state.stage == 3:  # whose optimizer has shards only while it steps
                self.zero_state.zero._optimizer_step(number)
            shard.grad = None

    def make_gradients_of_shards(self) -> None:
        """Give the engine's flat shards gradients of zeros."""
        assert self.zero_state is not None
        for _, shard in self.zero_state.flat_shards():
            shard.grad = torch.zeros_like(shard)

    def aside(self, function: Any) -> Any:
        """A function of the engine's, which may ask numbers that nobody has while the user's backward runs."""

        def call(*given: Any) -> Any:
            with self.fake_stage.in_module(False):
                return function(*given)

        return call
