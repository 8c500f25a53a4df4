"""Dynamic loss scaling, for formats whose gradients are float16."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .base import MaxReduce, Precision
from .scaler import RankAwareGradScaler


class LossScaling(Precision):
    """The part of a float16 format that scales: to be inherited from first.

    The scale doubles after ``growth_interval`` updates without overflow and halves when a gradient overflows; such an
    update is skipped and the learning-rate schedule does not move for it (Micikevicius et al., 2018). Each turn of a
    module that is trained in turns has a scale of its own, which the others' overflows leave alone.

    Args:
        initial_scale: first factor on the loss.
        growth_interval: updates without overflow before the scale doubles.
    """

    scales_loss = True
    judges_gradients = True
    computes_by_itself = True

    def __init__(self, initial_scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        if initial_scale <= 0:
            raise ValueError(f"initial_scale is a factor on the loss and must be positive. Received: {initial_scale}")
        if growth_interval < 1:
            raise ValueError(f"growth_interval counts updates and must be at least 1. Received: {growth_interval}")
        self.initial_scale = initial_scale
        self.growth_interval = growth_interval

    def set_up(self, device: torch.device, max_over_ranks: MaxReduce) -> None:
        """Create the scaler on the run's device."""
        super().set_up(device, max_over_ranks)
        self.device = device
        self.make_scaler = partial(
            RankAwareGradScaler,
            device,
            max_over_ranks,
            init_scale=self.initial_scale,
            growth_interval=self.growth_interval,
        )
        self.scaler = self.scaler_outside = self.make_scaler()
        self.scalers: dict[str, RankAwareGradScaler] = {}  # of the turns

    def begin_turn(self, turn: str | None) -> None:
        """Scale by the turn's own scale from here on."""
        if turn is not None and turn not in self.scalers:
            self.scalers[turn] = self.make_scaler()
        self.scaler = self.scaler_outside if turn is None else self.scalers[turn]

    def scale(self, loss: Tensor) -> Tensor:
        """Multiply the loss by the current scale."""
        return self.scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, and note on the device whether any is inf or NaN."""
        super().unscale(optimizer)
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> None:
        """Step unless a gradient overflowed, then adapt the scale."""
        self.scaler.step(optimizer)
        self.scaler.update()

    def step_unless(self, optimizer: Optimizer, refused: Tensor) -> None:
        """Step unless a gradient overflowed or the flag is up, then adapt the scale to the overflow alone."""
        self.scaler.refuse_where(refused)
        self.step(optimizer)

    def skip_step(self, optimizer: Optimizer) -> None:
        """Adapt the scale as a step would."""
        self.scaler.update()

    def is_at_floor(self) -> bool:
        """Whether the scale has fallen below 1, or below its first value where that is smaller."""
        return self.scaler.get_scale() < min(1.0, self.initial_scale)

    def skip_is_known(self) -> bool:
        """True on the CPU; on an accelerator the flag is still on its way right after a step."""
        return self.device.type == "cpu"

    def step_was_skipped(self) -> bool:
        """Whether the last step found an overflow."""
        return self.scaler.step_was_skipped()

    def state_dict(self) -> dict[str, Any]:
        """Return scale and growth counter, of each turn where there are turns."""
        if self.scalers:
            return {"turns": {turn: scaler.state_dict() for turn, scaler in self.scalers.items()}}
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore scale and growth counter; the state of a format without a scale leaves both as they are."""
        for turn, saved in state.get("turns", {}).items():
            self.scalers.setdefault(turn, self.make_scaler()).load_state_dict(saved)
        if state and "turns" not in state:
            self.scaler.load_state_dict(state)

    def log_values(self) -> dict[str, float]:
        """The current loss scale; in and around turns, that of each by its name."""
        if self.scalers:
            return {f"loss_scale_{turn}": scaler.get_scale() for turn, scaler in self.scalers.items()}
        return {"loss_scale": self.scaler.get_scale()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(initial_scale={self.initial_scale}, growth_interval={self.growth_interval})"
