"""Wrapping a layer's forward in place: its parameters keep their names, and a copy of the layer calls its own."""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

Forward = Callable[..., Any]
"""(layer, *args, **kwargs) to outputs."""


def wrap_forward(layer: nn.Module, wrap: Callable[[Forward], Forward]) -> None:
    """Replace a layer's forward.

    It becomes a method of this layer, not a function that knows it: ``copy.deepcopy`` binds methods to the copy.

    Args:
        layer: changed in place.
        wrap: takes the forward as a function of the layer and its inputs, and returns another one.
    """
    before = layer.forward
    if isinstance(before, MethodType) and before.__self__ is layer:
        function: Forward = before.__func__
    else:  # somebody put a function of their own there

        def function(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return before(*args, **kwargs)

    layer.forward = MethodType(wrap(function), layer)
