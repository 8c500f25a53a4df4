"""Whether a module says how its layers, or its sequences, are cut over ranks."""

import inspect
from typing import Any

from torch import nn

from ..plans.plan import plan_of

POSITIONS = "positions"  # the parameter of forward by which a rank learns which tokens it holds


def cuts_of(module: nn.Module) -> list[str]:
    """The options of FSDP2 for which a module says all that they need: "tensor_parallel", where it has a plan of its
    own or is a model with a ready one; "context_parallel", where its forward takes ``positions``.

    Args:
        module: placed or not; its layers aren't sharded.
    """
    found = []
    forward: Any = module.forward
    try:
        plan_of(module, 1)
        found.append("tensor_parallel")
    except ValueError:
        pass  # there is none
    if POSITIONS in inspect.signature(forward).parameters:
        found.append("context_parallel")
    return found
