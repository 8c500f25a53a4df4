"""A gradient with one number in it that isn't finite, on one rank, before the ranks add up theirs."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import Unpack

from .fault import Fault, Where


class NonfiniteGradient(Fault):
    """Puts NaN, or another number, into one parameter's gradient, inside the backward and before ranks average it.

    Args:
        parameter: its name in the module: "head.weight". None takes the first that is trained.
        value: the number.
        **where: see Fault; the phase is "backward".

    Raises:
        ValueError: another phase is asked for.

    Example:
        >>> fault = NonfiniteGradient("head.bias", update=2)
        >>> fit = Fit(Regressor(), dataset, callbacks=[fault], max_steps=2, logging_steps=1, loggers=(),
        ...     max_grad_norm=1.0, save_strategy="no", progress=False)
        >>> _ = fit.train()
        >>> fault.struck
        {2}
    """

    def __init__(self, parameter: str | None = None, value: float = math.nan, **where: Unpack[Where]) -> None:
        if where.get("phase", "backward") != "backward":
            raise ValueError(f"A gradient is made in phase 'backward'. Received: phase={where['phase']!r}")
        where["phase"] = "backward"
        super().__init__(**where)
        self.parameter, self.value = parameter, value

    def listen_to_layers(self, fit: Any, update: int) -> None:
        """Have the parameter's gradient come by here, wherever the strategy keeps the parameter in this update.

        Raises:
            ValueError: the module has no such parameter.
        """
        module: nn.Module = fit.module
        named = dict(module.named_parameters())
        name = self.parameter or next(name for name, each in named.items() if each.requires_grad)
        if name not in named:
            raise ValueError(f"{type(module).__name__} has no parameter {name!r}. It has: {', '.join(named)}")

        def arrived(gradient: Tensor) -> Tensor | None:
            if not self.is_due(fit, update):
                return None
            self.reach("backward", fit, update)
            return with_number(gradient, self.value)

        owner, _, attribute = name.rpartition(".")
        self.keep_hook(named[name].register_hook(arrived))

        # A sharding strategy gives the layer, while it computes, another tensor in the parameter's place.
        def entered(layer: nn.Module, inputs: Any) -> None:
            used = getattr(layer, attribute)
            if used is not named[name] and used.requires_grad:
                self.keep_hook(used.register_hook(arrived))

        self.keep_hook(module.get_submodule(owner).register_forward_pre_hook(entered))

    def strike(self, fit: Any) -> None:
        """Do nothing more: the gradient is changed on its way."""


def with_number(gradient: Tensor, value: float) -> Tensor:
    """Return a copy of a gradient with another first number; of a sharded one, the first that this rank holds."""
    changed = gradient.clone()
    local = changed.to_local() if isinstance(changed, DTensor) else changed
    with torch.no_grad():
        local.view(-1)[:1].fill_(value)
    return changed
