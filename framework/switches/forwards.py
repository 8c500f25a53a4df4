"""Wrapping of a layer's forward in place: parameters keep their names, and copies of the layer their own forward."""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

Forward = Callable[..., Any]
"""A function of (layer, *args, **kwargs) to outputs."""


def wrap_forward(layer: nn.Module, wrap: Callable[[Forward], Forward]) -> None:
    """Replace the forward of a layer.

    The new forward is a method of the layer and not a function that refers to it, since ``copy.deepcopy`` binds methods
    to the copy.

    Args:
        layer: it is changed in place.
        wrap: takes the forward as a function of the layer and its inputs, and returns another such function.
    """
    before = layer.forward
    if isinstance(before, MethodType) and before.__self__ is layer:
        function: Forward = before.__func__
    else:  # the user has put a plain function there

        def function(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return before(*args, **kwargs)

    layer.forward = MethodType(wrap(function), layer)
