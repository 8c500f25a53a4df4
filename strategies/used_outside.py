"""Parameters that are used while they are sharded, outside of the forward that gathers them: told by name."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

IsSharded = Callable[[Tensor, torch.Size], bool]


class UsedOutside:
    """A context around forward and loss: an error in a layer whose parameters lie in shards says so.

    Only the forward of a unit (a block of ``shard_units()``, or the whole module) gathers its parameters. A layer that
    is called from elsewhere computes with a shard, and fails in whatever words the operator has for its shape.

    Args:
        strategy: its name, for the messages.
        module: the user's, with all its layers, not yet wrapped.
        units: those that gather for themselves.
        is_sharded: whether a layer's parameter, whose whole shape it is given too, lies in shards at the moment.
        said_by_torch: what an error says that can mean nothing else, where no layer is to be found in it.
    """

    def __init__(
        self,
        strategy: str,
        module: nn.Module,
        units: list[nn.Module],
        is_sharded: IsSharded,
        said_by_torch: str | None = None,
    ) -> None:
        self.strategy = strategy
        self.name = type(module).__name__
        self.is_sharded, self.said_by_torch = is_sharded, said_by_torch
        names = {id(layer): name for name, layer in module.named_modules()}
        self.units = [names[id(unit)] for unit in units]
        self.layers = {
            id(layer): (name, {key: parameter.shape for key, parameter in layer.named_parameters(recurse=False)})
            for name, layer in module.named_modules()
        }

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, torch.OutOfMemoryError):
            layer = self.sharded_layer(trace)
            if layer is not None:
                raise ValueError(self.message(layer)) from error
            if self.said_by_torch and self.said_by_torch in str(error) and self.units:
                raise ValueError(self.message(self.units[0], "a parameter of such a block as ")) from error

    def sharded_layer(self, trace: TracebackType | None) -> str | None:
        """The name of the innermost layer that was running and whose parameters lie in shards."""
        found = None
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            name, shapes = self.layers.get(id(owner), ("", {}))
            if any(self.is_sharded(getattr(owner, key), shape) for key, shape in shapes.items()):
                found = name
            trace = trace.tb_next
        return found

    def unit_of(self, name: str) -> str | None:
        """The unit that a layer or parameter belongs to; None for the whole module."""
        return next((unit for unit in self.units if f"{name}.".startswith(f"{unit}.")), None)

    def message(self, name: str, before: str = "") -> str:
        """Say what happened to a layer or a parameter, and what to write."""
        unit = self.unit_of(name)
        if unit is None:
            return (
                f"strategy={self.strategy!r}: {name!r} was used outside of the forward of {self.name}, which gathers "
                "its parameters. Compute with it in forward, or use strategy='ddp'."
            )
        return (
            f"strategy={self.strategy!r}: {before}{name!r} was used outside of the forward of {unit!r}, which alone "
            "gathers its parameters. Leave that block out of the units, so that the whole module gathers it: write "
            f"shard_units(self) on {self.name} with a list of the other blocks, e.g. [block for block in "
            f"super().shard_units() if block is not self.get_submodule({unit!r})]. For a penalty on weights, use "
            "weight_decay or strategy='ddp'."
        )

    def watch(self, parameters: dict[str, nn.Parameter]) -> None:
        """Have a gradient that reaches a shard by itself raise: it came of a use of the shard, as in a penalty over
        ``self.parameters()``, and would be added to this rank's rows alone.

        Args:
            parameters: the shards, by name.
        """
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                parameter.register_hook(self.refusal(name))

    def refusal(self, name: str) -> Callable[[Tensor], None]:
        """Make a hook for a parameter's gradient that raises and names the parameter."""

        def refuse(gradient: Tensor) -> None:
            raise ValueError(self.message(name))

        return refuse
