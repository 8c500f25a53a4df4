"""nn.DataParallel: one process, several GPUs, the model copied to them in every forward."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from ..precision.frozen import frozen_parts
from .base import ConfigureOptimizer, Prepare, Strategy, nothing_to_prepare


class DP(Strategy):
    """``strategy="dp"``: a micro-batch is scattered over this machine's GPUs and the outputs are gathered on the first.

    "ddp" does the same work faster; this is for programs that can't be started more than once. With one device or none
    it is plain single-device training. The outputs must be tensors whose first dimension is the batch, or scalars,
    which are averaged.

    Example:
        ``Fit(module, data, strategy="dp", per_device_train_batch_size=32)``
    """

    name = "dp"
    runs_copies = True
    unplayed = "copies the module to the GPUs of this machine in every forward. Plan strategy='ddp' instead."
    refused_arguments: ClassVar[Mapping[str, str]] = {
        "contrastive_chunks": "can't be had under strategy='dp', whose copies draw random numbers on devices of their "
        "own, which nobody could draw again. Use strategy='ddp'",
    }
    refused_turns = (
        "it cuts up what forward is given, and the loss of a turn has its batch without forward. Use strategy='ddp', "
        "or 'single'"
    )

    def choose_device(self) -> torch.device:
        """Choose the first GPU, else the CPU."""
        device = super().choose_device()
        self.devices_per_rank = max(1, torch.cuda.device_count()) if device.type == "cuda" else 1
        return device

    def check_module(self, module: nn.Module) -> None:
        """Refuse frozen parts: a copy's would compute with the weights of the first device."""
        if parts := frozen_parts(module):
            raise ValueError(
                f"strategy='dp' copies the module in every forward, which parts that frozen() was called with can't "
                f"follow: {', '.join(map(repr, parts))}. Use strategy='ddp', or requires_grad_(False) in the place of "
                "frozen()."
            )

    def place(
        self, module: nn.Module, configure_optimizer: ConfigureOptimizer | None, prepare: Prepare = nothing_to_prepare
    ) -> None:
        """Wrap the module where there are several GPUs."""
        self.check_module(module)
        super().place(module, configure_optimizer, prepare)
        if self.devices_per_rank > 1:
            self.model = nn.DataParallel(module)

    def local_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Average the devices' losses."""
        return loss.mean()
