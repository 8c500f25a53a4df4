"""One process on one device."""

from dataclasses import dataclass

import torch

from .base import Strategy
from .devices import default_device


@dataclass(frozen=True)
class SingleOptions:
    """Options of Single.

    Args:
        device: "cpu", "cuda:1", ...; "auto" takes the machine's accelerator, else the CPU.
    """

    device: str = "auto"

    def __post_init__(self) -> None:
        try:
            torch.device("cpu" if self.device == "auto" else self.device)
        except RuntimeError as error:
            raise ValueError(
                f"Single(device=...) takes 'auto', 'cpu', 'cuda:0', ... Received: {self.device!r}"
            ) from error


class Single(Strategy):
    """``strategy="single"``: the module on one device, no process group. See SingleOptions.

    Example:
        ``Fit(module, data, strategy=Single(device="cpu"))``
    """

    name = "single"
    Options = SingleOptions
    options: SingleOptions
    gradients_are_final_in_backward = True
    takes_program = True

    def choose_device(self) -> torch.device:
        """The device that was asked for, else the accelerator this machine has, else the CPU."""
        return default_device() if self.options.device == "auto" else torch.device(self.options.device)
