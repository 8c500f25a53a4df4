"""Gradients reach a ZeRO engine in one order on every rank, whatever order backward makes them in.

DeepSpeed lays gradients end to end in a bucket as backward makes them, and sums the ranks' buckets. That order may
differ from rank to rank: a packed LSTM makes its weights' gradients in another order for a batch of one row, and a
branch that only one rank takes makes gradients that others have none of. At stages 1 and 2 one parameter's gradient is
then added to another's, without an error; at stage 3 the engine sorts each bucket, which is right as long as all ranks
fill a bucket with the same parameters.

The names with an underscore are DeepSpeed's own, of the 0.19 releases.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class GradientOrder:
    """Hands gradients to a ZeRO engine in the order of registration, from the end: that of most backwards, block by
    block. A gradient that comes early waits for its turn.

    At stages 1 and 2 a parameter without a gradient, which another rank may have one of, takes part with zeros; at
    stage 3 all ranks call the same layers, and it is left out. Others don't wait for it until the end of backward where
    it had no gradient in the backward before, either.

    Args:
        zero: the optimizer of an engine at stages 1 to 3.
        stage: of the engine.
        parameters: all of the module's, in the order of registration.
    """

    def __init__(self, zero: Any, stage: int, parameters: Iterable[nn.Parameter]) -> None:
        self.zero = zero
        self.fills = stage < 3
        groups = zero.bit16_groups if self.fills else zero.fp16_groups
        group_of = {id(parameter): number for number, group in enumerate(groups) for parameter in group}
        # What the engine calls `reduce` with: at stage 3 without the number of the group.
        self.calls: list[tuple[Any, ...]] = [
            (parameter, group_of[id(parameter)]) if self.fills else (parameter,)
            for parameter in reversed(list(parameters))
            if parameter.requires_grad and id(parameter) in group_of
        ]
        self.turn_of = {id(call[0]): turn for turn, call in enumerate(self.calls)}
        self.turn = 0
        self.waiting: set[int] = set()  # the turns of gradients that have come early
        self.came: set[int] = set()
        # Those that came in the backward before. In the first one at stages 1 and 2, all are taken to come: what a
        # backward inside of backward (reentrant checkpointing) reaches can't be known beforehand.
        self.expected: set[int] = set(range(len(self.calls))) if self.fills else set()
        self.reduce = zero.reduce_independent_p_g_buckets_and_remove_grads
        self.end_backward = zero.independent_gradient_partition_epilogue
        zero.reduce_independent_p_g_buckets_and_remove_grads = self.take
        zero.independent_gradient_partition_epilogue = self.take_rest

    def take(self, parameter: nn.Parameter, *group: int) -> None:
        """Take a parameter whose gradient is ready, and hand on all whose turn it is."""
        if not getattr(parameter, "ds_grad_is_ready", True):  # a part of it, of DeepSpeed's tiled layers
            return
        turn = self.turn_of[id(parameter)]
        self.came.add(turn)
        if turn < self.turn:  # stage 3 didn't wait for it; or it comes twice, which the engine judges
            self.reduce(parameter, *group)
            return
        self.waiting.add(turn)
        while self.waiting and (self.turn in self.waiting or self.stays_away(self.turn)):
            self.end_turn()

    def stays_away(self, turn: int) -> bool:
        """Whether this backward doesn't reach a parameter. Those that came in the last one aren't looked up: it costs
        some microseconds each.
        """
        from deepspeed.runtime.utils import count_used_parameters_in_backward

        if turn in self.expected or torch._C._current_graph_task_id() == -1:
            return False
        if count_used_parameters_in_backward(self.calls[turn][:1]):
            self.expected.add(turn)
            return False
        return True

    def end_turn(self) -> None:
        """Give the engine the parameter whose turn it is."""
        turn = self.turn
        self.turn += 1
        if self.fills:
            self.fill(self.calls[turn][0])
        if self.fills or turn in self.waiting:
            self.waiting.discard(turn)
            self.reduce(*self.calls[turn])

    def take_rest(self) -> None:
        """Hand on what waits at the end of a backward, and end the engine's backward."""
        if self.fills:
            self.zero.setup_buckets()  # there are none yet where this rank made no gradient
        while self.turn < len(self.calls):
            self.end_turn()
        self.expected, self.came, self.turn = self.came, set(), 0
        self.end_backward()

    def fill(self, parameter: nn.Parameter) -> None:
        """Give a parameter that has no gradient one of zeros."""
        if self.zero.get_gradient_for_reduction(parameter) is None:
            parameter.grad = torch.zeros_like(parameter)
            if self.zero.use_grad_accum_attribute:
                self.zero._fill_param_grad_accum_attribute(parameter)
