"""Float32 master weights for 16-bit parameters: an optimizer steps on them without knowing of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

MASTER_WEIGHT = "master_weight"
"""The entry of an optimizer's state that holds a parameter in float32."""


def groups_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The groups that ``step`` reads: an optimizer made of several has theirs."""
    return [group for part in getattr(optimizer, "parts", [optimizer]) for group in part.param_groups]


def widen_gradients(optimizer: Optimizer) -> None:
    """Replace 16-bit gradients by float32 ones: dividing by a loss scale, or a norm, would underflow in float16."""
    for group in groups_of(optimizer):
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None and gradient.dtype != torch.float32:
                parameter.grad = None
                parameter.grad_dtype = None  # a gradient may have another dtype than its parameter
                parameter.grad = gradient.float()


@contextmanager
def on_master_weights(optimizer: Optimizer) -> Iterator[None]:
    """In here, the optimizer's parameters are float32 master weights; afterwards the 16-bit ones are rounded from them.

    Moments are therefore float32, too: in float16 the squares of gradients underflow, and in bfloat16 a running mean
    with a weight of 0.999 stands still (Micikevicius et al., 2018). A master weight is made at the first step and kept
    in the optimizer's state under its parameter, so that it is sharded, saved and restored as the moments are.

    Args:
        optimizer: any whose ``step`` works on the parameters of its groups; gradients are float32.
    """
    groups, state = groups_of(optimizer), optimizer.state
    originals = [group["params"] for group in groups]
    masters: dict[Tensor, Tensor] = {}
    for group in groups:
        for parameter in group["params"]:
            entries = state.pop(parameter, {})
            master = entries.pop(MASTER_WEIGHT, None)
            if master is None:
                master = parameter.detach().to(torch.float32, copy=True)
            master.grad = parameter.grad
            masters[parameter] = master
            if entries:
                state[master] = entries
        group["params"] = [masters[parameter] for parameter in group["params"]]
    try:
        yield
    finally:
        for group, parameters in zip(groups, originals, strict=True):
            group["params"] = parameters
        for parameter, master in masters.items():
            master.grad = None
            state[parameter] = {**state.pop(master, {}), MASTER_WEIGHT: master}
    with torch.no_grad():  # without no_grad, to_local() would record itself for autograd
        pairs = [(local(parameter), local(master)) for parameter, master in masters.items()]
        if pairs:
            torch._foreach_copy_([to for to, _ in pairs], [from_ for _, from_ in pairs])


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is spread over ranks; any other as it is."""
    from torch.distributed.tensor import DTensor  # importing DTensor costs as much as importing torch

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
