"""What a module is made of: its layers, and how many parameters each of them trains and freezes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ...precision.quantized import is_quantized


@dataclass(frozen=True)
class ParameterCounts:
    """The numbers of a module's parameters. A parameter that several layers share counts once.

    Attributes:
        trainable: numbers that training changes.
        frozen: numbers that it doesn't.
        children: the same of each child of the module, by name; empty for a child.

    Example:
        >>> count_parameters(nn.Sequential(nn.Linear(2, 3), nn.ReLU())).children["0"].trainable
        9
    """

    trainable: int
    frozen: int
    children: Mapping[str, "ParameterCounts"] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All of them."""
        return self.trainable + self.frozen


@dataclass(frozen=True)
class Layer:
    """One layer of a module, as the module's author sees it.

    Attributes:
        name: as ``named_modules`` gives it; "" for the module itself.
        kind: the name of its class.
        trainable, frozen: the numbers of its parameters, those of the layers below it included.
    """

    name: str
    kind: str
    trainable: int
    frozen: int

    @property
    def depth(self) -> int:
        """How many layers it is inside of: 0 for the module itself."""
        return self.name.count(".") + 1 if self.name else 0


def layers_of(module: nn.Module) -> tuple[Layer, ...]:
    """List the layers of a module, itself first. It isn't placed yet: what a rank holds of a placed one may be a part.

    Nothing is read from a device: parameters on the meta device count, too.
    """
    return tuple(
        Layer(name, type(layer).__name__, *numbers_of(layer.parameters())) for name, layer in module.named_modules()
    )


def count_parameters(module: nn.Module) -> ParameterCounts:
    """Count the parameters of a module that isn't placed yet; ``fit.placement.parameters`` has those of one that is."""
    return counts_of(layers_of(module))


def counts_of(layers: tuple[Layer, ...]) -> ParameterCounts:
    """The counts of a module whose layers were listed."""
    whole, *below = layers
    children = {layer.name: ParameterCounts(layer.trainable, layer.frozen) for layer in below if layer.depth == 1}
    return ParameterCounts(whole.trainable, whole.frozen, children)


def numbers_of(parameters: Iterable[Tensor]) -> tuple[int, int]:
    """How many numbers some parameters train, and how many they freeze."""
    numbers = [0, 0]
    for parameter in parameters:
        numbers[not parameter.requires_grad] += size_of(parameter)
    return numbers[0], numbers[1]


def size_of(parameter: Tensor) -> int:
    """The numbers in a parameter; of a quantized one, those that its packed codes stand for."""
    if is_quantized(parameter):
        return int(parameter.quant_state.shape.numel())  # type: ignore[attr-defined]
    return parameter.numel()
