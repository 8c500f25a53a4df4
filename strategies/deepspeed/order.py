"""Gradients reach a ZeRO engine in one order on every rank, whatever order backward makes them in.

DeepSpeed lays gradients end to end in a bucket as backward makes them, and sums the ranks' buckets. That order may
differ from rank to rank: a packed LSTM makes its weights' gradients in another order for a batch of one row, and a
branch that only one rank takes makes gradients that others have none of. At stages 1 and 2 one parameter's gradient is
then added to another's, without an error; at stage 3 the engine sorts each bucket, which is right as long as all ranks
fill a bucket with the same parameters.

The names with an underscore are DeepSpeed's own, of the 0.19 releases.
"""

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class GradientOrder:
    """Hands gradients to a ZeRO engine in an order that all ranks share: one that comes early waits for its turn.

    In the first backward the order is that of registration, from the end. From the second update on it is the one in
    which rank 0 made its first gradients, so that next to none wait. At stages 1 and 2 a parameter without a gradient,
    which another rank may have one of, takes part with zeros; at stage 3 all ranks call the same layers, and what the
    first backward doesn't reach has no turn in it, lest everything wait for it.

    Args:
        zero: the optimizer of an engine at stages 1 to 3.
        stage: of the engine.
        store: of the process group.
        rank: this one.
    """

    def __init__(self, zero: Any, stage: int, store: dist.Store, rank: int) -> None:
        self.zero = zero
        self.fills = stage < 3
        # Ranks make as many engines as one another.
        self.store = dist.PrefixStore(f"gradient-order-{store.add(f'gradient-orders/{rank}', 1)}", store)
        self.rank = rank
        groups = zero.bit16_groups if self.fills else zero.fp16_groups
        # What the engine calls `reduce` with: at stage 3 without the number of the group.
        self.calls: list[tuple[Any, ...]] = [
            (parameter, number) if self.fills else (parameter,)
            for number, group in enumerate(groups)
            for parameter in group
            if parameter.requires_grad
        ]
        self.number_of = {id(call[0]): number for number, call in enumerate(self.calls)}
        self.settle(list(reversed(range(len(self.calls)))))
        self.turn = 0
        self.waiting: set[int] = set()
        self.made: list[int] | None = []  # in the first backward
        self.agreed = False
        self.reduce = zero.reduce_independent_p_g_buckets_and_remove_grads
        self.end_backward = zero.independent_gradient_partition_epilogue
        zero.reduce_independent_p_g_buckets_and_remove_grads = self.take
        zero.independent_gradient_partition_epilogue = self.take_rest

    def settle(self, turns: list[int]) -> None:
        """Begin to use an order: the numbers of parameters. One that isn't in there never waits."""
        self.turns, self.turn_of = turns, {number: turn for turn, number in enumerate(turns)}

    def take(self, parameter: nn.Parameter, *group: int) -> None:
        """Take a parameter whose gradient is ready, and hand on all whose turn it is."""
        if not getattr(parameter, "ds_grad_is_ready", True):  # a part of it, of DeepSpeed's tiled layers
            return
        from deepspeed.runtime.utils import count_used_parameters_in_backward

        number = self.number_of[id(parameter)]
        if self.made is not None:
            if not self.made and not self.fills:
                self.settle([turn for turn in self.turns if count_used_parameters_in_backward(self.calls[turn][:1])])
            self.made.append(number)
        if self.turn_of.get(number, -1) < self.turn:  # or it comes twice, which the engine judges
            self.reduce(parameter, *group)
            return
        self.waiting.add(number)
        while self.turn < len(self.turns) and self.turns[self.turn] in self.waiting:
            self.hand_on()

    def hand_on(self) -> None:
        """Give the engine the parameter whose turn it is."""
        number = self.turns[self.turn]
        self.turn += 1
        self.waiting.discard(number)
        self.reduce(*self.calls[number])

    def take_rest(self) -> None:
        """Hand on what waits at the end of a backward, and end the engine's backward."""
        if self.made is not None and self.rank == 0:
            self.store.set("order", json.dumps(self.made))
        self.made = None
        if self.fills:
            self.zero.setup_buckets()  # there are none yet where this rank made no gradient
        while self.turn < len(self.turns):
            number = self.turns[self.turn]
            if self.fills:
                self.fill(self.calls[number][0])
                self.hand_on()
            elif number in self.waiting:
                self.hand_on()
            else:
                self.turn += 1
        self.turn = 0
        self.end_backward()

    def fill(self, parameter: nn.Parameter) -> None:
        """Give a parameter that has no gradient one of zeros."""
        if self.zero.get_gradient_for_reduction(parameter) is None:
            parameter.grad = torch.zeros_like(parameter)
            if self.zero.use_grad_accum_attribute:
                self.zero._fill_param_grad_accum_attribute(parameter)

    def agree(self) -> None:
        """Take over rank 0's order after the first step, whose collectives every rank has met rank 0 in since it wrote
        that down: no rank waits here.
        """
        if self.agreed:
            return
        self.agreed = True
        made: list[int] = json.loads(self.store.get("order"))
        self.settle(list(dict.fromkeys([*made, *reversed(range(len(self.calls)))])))
