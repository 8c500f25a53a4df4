"""One process on one device."""

from typing import ClassVar

import torch

from .base import Strategy, default_device


class Single(Strategy):
    """``strategy="single"``: the module on one device, no process group.

    Args:
        device: "cpu", "cuda:1", ...; "auto" takes the machine's accelerator, else the CPU.

    Example:
        ``Fit(module, data, strategy=Single(device="cpu"))``
    """

    name: ClassVar[str] = "single"

    def __init__(self, device: str | torch.device = "auto") -> None:
        try:
            self.requested = None if device == "auto" else torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"Single(device=...) takes 'auto', 'cpu', 'cuda:0', ... Received: {device!r}") from error

    def choose_device(self) -> torch.device:
        """The device that was asked for, else the accelerator this machine has, else the CPU."""
        return self.requested or default_device()

    def __repr__(self) -> str:
        return f"Single(device={str(self.requested or 'auto')!r})"
