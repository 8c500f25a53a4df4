"""NVIDIA Apex's automatic mixed precision (apex.amp), for models that were tuned under it."""

from collections.abc import Mapping
from importlib import import_module
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .base import MaxReduce, Precision
from .full import cast_floating

LAST = "25.05"


class Apex(Precision):
    """``precision="apex-O1"`` or ``"apex-O2"``: float16 with dynamic loss scaling by apex.amp, on GPUs.

    O1 casts at the borders of functions, as torch.autocast does ("16-mixed" is its successor). O2 casts the model to
    float16 but for batch norms, and the optimizer steps float32 copies of its parameters; checkpoints hold those.

    Raises:
        ValueError: apex.amp isn't there; the last tag of NVIDIA's apex that has it is 25.05.

    Example:
        ``Fit(module, data, strategy="ddp", precision="apex-O1")``
    """

    parameter_dtype = torch.float32
    compute_dtype = torch.float16
    reduce_dtype = torch.float32
    scales_loss = True
    judges_gradients = True
    computes_by_itself = True
    refused_arguments: Mapping[str, str] = {
        "spike_updates": "apex.amp alone decides whether its optimizer steps. Use precision='16-mixed'",
        "contrastive_chunks": "apex.amp alone scales the loss, and needs it to be what backward begins with. Use "
        "precision='16-mixed'",
    }

    refused_turns = (
        "apex.amp has one loss scale and changes one optimizer's methods, and each turn has its own. Use "
        "precision='16-mixed', which does the same natively"
    )

    level: ClassVar[str]

    def __init__(self) -> None:
        try:
            self.amp: Any = import_module("apex.amp")
        except ImportError as error:
            raise ValueError(
                f"precision={self.name!r} needs apex.amp, which isn't here ({error}). NVIDIA removed it from apex: "
                f"{LAST} is the last tag that has it, to be built from github.com/NVIDIA/apex on a machine with CUDA "
                "(PyPI's 'apex' is another package). precision='16-mixed' does the same natively, under every strategy."
            ) from error
        self.scale_before, self.last = 0.0, True
        self.optimizer: Optimizer | None = None

    def set_up(self, device: torch.device, max_over_ranks: MaxReduce) -> None:
        """Refuse devices other than CUDA's."""
        if device.type != "cuda":
            raise ValueError(
                f"precision={self.name!r} runs on CUDA GPUs, and this run's device is {device}. "
                "Use precision='16-mixed' or 'bf16-mixed'."
            )

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast the module to float32, from where apex.amp casts."""
        return cast_floating(module, torch.float32)

    def initialize(self, module: nn.Module, optimizer: Optimizer | None) -> None:
        """Have apex.amp change the module's forward and the optimizer's methods, in place."""
        self.optimizer = optimizer
        options = {"opt_level": self.level, "verbosity": 0}
        if optimizer is None:
            self.amp.initialize(module, **options)
        else:
            self.amp.initialize(module, optimizer, **options)
            # O1 leaves a function there; torch's schedulers, which count steps, take methods.
            step = optimizer.step
            if not isinstance(step, MethodType):
                optimizer.step = MethodType(lambda _, *inputs: step(*inputs), optimizer)  # type: ignore[method-assign]
            if self.level == "O2":
                optimizer._amp_lazy_init()  # type: ignore[attr-defined]  # else done in the first backward

    def begin_micro_batch(self, last: bool) -> None:
        """Note whether this is the last backward of the update, after which gradients are unscaled."""
        self.last = last

    def backward(self, loss: Tensor) -> None:
        """Backward of the scaled loss; after the last, gradients are unscaled, and an overflow lowers the scale."""
        self.scale_before = self.loss_scale()
        with self.amp.scale_loss(loss, self.optimizer, delay_unscale=not self.last) as scaled:
            scaled.backward()

    def masters(self, parameters: Mapping[str, nn.Parameter]) -> Mapping[str, nn.Parameter]:
        """What the optimizer steps: with O2 the float32 copies, in the places that their originals had."""
        if self.level == "O1" or self.optimizer is None:
            return parameters
        stash = self.optimizer._amp_stash  # type: ignore[attr-defined]
        copies = dict(zip(map(id, stash.all_fp16_params), stash.all_fp32_from_fp16_params, strict=True))
        return {name: copies.get(id(parameter), parameter) for name, parameter in parameters.items()}

    def clipped(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Return the float32 master weights, which hold the unscaled gradients."""
        return list(self.amp.master_params(self.optimizer))

    def step_was_skipped(self) -> bool:
        """Whether the scale dropped: apex.amp has read the overflow already, so this waits for nothing."""
        return self.loss_scale() < self.scale_before

    def is_at_floor(self) -> bool:
        """Whether the scale has fallen below 1."""
        return self.loss_scale() < 1.0

    def loss_scale(self) -> float:
        """Read the current loss scale."""
        return float(self.amp.state_dict()["loss_scaler0"]["loss_scale"])

    def saved_weights(self, module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace weights by O2's float32 masters; apex.amp's own hook gives the float16 weights in float32."""
        masters = self.masters(dict(module.named_parameters()))
        return {name: masters[name].detach() if name in masters else tensor for name, tensor in state.items()}

    def take_weights(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Copy the master weights of O2, which a checkpoint was read into, to the float16 weights."""
        if self.level == "O2":
            module.load_state_dict(state, strict=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scaler's state."""
        state: dict[str, Any] = self.amp.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the loss scaler; the state of a format without one leaves it as it is."""
        if state:
            self.amp.load_state_dict(state)

    def log_values(self) -> dict[str, float]:
        """The current loss scale."""
        return {"loss_scale": self.loss_scale()}


class ApexO1(Apex):
    """``precision="apex-O1"``: see Apex."""

    name = "apex-O1"
    level = "O1"


class ApexO2(Apex):
    """``precision="apex-O2"``: see Apex."""

    name = "apex-O2"
    level = "O2"
