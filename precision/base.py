"""What every number format promises: dtypes, a forward context, loss scaling, state."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .device_flag import takes_flag
from .names import near_names

MaxReduce = Callable[[Tensor], None]  # replaces a tensor by its largest value over all ranks, in place
ShapesOnRank = Mapping[str, tuple[int, ...]]  # layer name to its weight's shape on this rank, where it is cut


VERBS_OF_AN_UPDATE = (
    "backward", "scale", "unscale", "step", "step_unless", "skip_step", "step_was_skipped", "begin_micro_batch",
    "initialize", "masters", "clipped", "weights_have_changed",
)  # fmt: skip


class Precision:
    """Describes a number format, and does what it needs around forward, backward and step.

    The base class is the identity: whatever dtype the module has, no context, no scaling. A format overrides what
    differs. A strategy with machinery of its own (FSDP policies, DeepSpeed) reads the three dtypes and leaves
    ``forward_context`` alone.

    Attributes:
        name: the word that chooses it (``precision="bf16-mixed"``).
        parameter_dtype: dtype in which parameters and optimizer state are kept; None leaves them as the user made them.
        compute_dtype: dtype of matrix products in forward and backward; None follows the parameters.
        reduce_dtype: dtype in which gradients are summed over ranks; None follows the gradients.
        scales_loss: whether a step may be skipped because gradients overflowed.
        judges_gradients: whether ``step`` itself leaves the parameters alone where a gradient isn't finite.
        master_weights: whether an optimizer steps on float32 copies of the parameters, which its state holds.
        computes_by_itself: whether the format has layers, weights or steps of its own, so that a strategy whose engine
            has those can't do its part.
        refused_arguments: arguments of a run ("gradient_checkpointing", "torch_compile") that this instance's options
            don't work with: why not, and what to write instead.
        refused_parameters: kinds of placed parameters (``Strategy.parameter_kinds``) that this instance's options don't
            work with: why not, and what to write instead. A format as a whole is refused in strategies/matrix.py.
    """

    name: ClassVar[str]
    refused_turns: ClassVar[str] = ""
    """Why a module can't be trained in turns in this format, and what to use instead; "" where it can."""
    parameter_dtype: torch.dtype | None = None
    compute_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    scales_loss: ClassVar[bool] = False
    judges_gradients: ClassVar[bool] = False
    master_weights: bool = False
    computes_by_itself: ClassVar[bool] = False
    refused_arguments: Mapping[str, str] = {}
    refused_parameters: Mapping[str, str] = {}

    def __new__(cls, *values: Any, **options: Any) -> Any:
        """Make the object, where all names are names of options.

        Raises:
            TypeError: a name isn't; the message says which there are.
        """
        has_none = cls.__init__ is object.__init__
        parameters = [] if has_none else list(inspect.signature(cls.__init__).parameters.values())
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            known = [each.name for each in parameters[1:]]
            for option in options:
                if option not in known:
                    raise TypeError(f"{cls.__name__} has no option {option!r}. {near_names(option, known)}")
        if has_none and values:
            raise TypeError(f"{cls.__name__} has no options. Received: {', '.join(map(repr, values))}")
        return super().__new__(cls)

    @property
    def takes_program(self) -> bool:
        """Whether an update may be one program: the format is dtypes and a forward context, and takes no part in
        backward and step.
        """
        return not (self.master_weights or self.computes_by_itself or self.scales_loss) and all(
            getattr(type(self), name) is getattr(Precision, name) for name in VERBS_OF_AN_UPDATE
        )

    def set_up(self, device: torch.device, max_over_ranks: MaxReduce) -> None:
        """Prepare for a device. A strategy calls it once, when the process group exists and before a module is placed.

        Args:
            device: where the module will live.
            max_over_ranks: in-place MAX all-reduce over every rank that shares the model.

        Raises:
            ValueError: the device can't compute in this format.
        """

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast the module to the dtypes of this format, before the strategy wraps it."""
        return module

    def replace_layers(self, module: nn.Module, shapes: ShapesOnRank) -> None:
        """Put layers that compute in this format in the place of the user's; parameters keep their names. Called after
        ``convert_module``, before any layer is cut, checkpointed, compiled or sharded.

        Args:
            module: late layers are there, without memory.
            shapes: layer name to the shape of its weight on this rank, for the layers that will be cut.

        Raises:
            ValueError: there is none to replace.
        """

    def cast_batch(self, batch: Any) -> Any:
        """Return a batch as a loss computes with it that isn't called by forward, whose inputs are cast at its border:
        the loss of a turn.
        """
        return batch

    def weights_have_changed(self, module: nn.Module) -> None:
        """Renew what was computed from weights: they were stepped, loaded or swapped."""

    def forward_context(self) -> AbstractContextManager[Any]:
        """Make a context for forward and loss."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the loss, scaled, to those of the update."""
        self.scale(loss).backward()

    def saved_weights(self, module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint holds and is read into, given the module's parameters and buffers."""
        return state

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss that backward is called on: scaled, where the format scales."""
        return loss

    def unscale(self, optimizer: Optimizer) -> None:
        """Bring gradients to their true size, once an update, after the last backward and before clipping."""

    def step(self, optimizer: Optimizer) -> None:
        """Step the optimizer, or skip it where the gradients overflowed."""
        optimizer.step()

    def step_unless(self, optimizer: Optimizer, refused: Tensor) -> None:
        """Step the optimizer unless a flag on the device is up. Optimizers that read such a flag themselves are torch's
        fused ones; for any other the host waits for the flag, as torch's GradScaler does.
        """
        if takes_flag(optimizer):
            optimizer.found_inf = refused  # type: ignore[attr-defined]
            try:
                self.step(optimizer)
            finally:
                del optimizer.found_inf  # type: ignore[attr-defined]
        elif not refused.item():
            self.step(optimizer)

    def skip_step(self, optimizer: Optimizer) -> None:
        """Do what an update asks for whose step is left out."""

    def begin_turn(self, turn: str | None) -> None:
        """Called before a turn is made, of a module that is trained in turns, and with None after it. A format that
        scales the loss has one scale a turn.
        """

    def is_at_floor(self) -> bool:
        """Whether a loss scale is so small that gradients are lost. It may wait for the device."""
        return False

    def skip_is_known(self) -> bool:
        """Whether ``step_was_skipped`` answers without waiting for the device."""
        return True

    def step_was_skipped(self) -> bool:
        """Whether the last ``step`` left the parameters alone. Waits at most for that step, never for later work."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in JSON types only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""

    def log_values(self) -> dict[str, float]:
        """Return further numbers for a log line (the loss scale). It may wait for the device: only logging calls it."""
        return {}

    # For one precision: what apex.amp asks for, and every other format leaves as it is.

    def initialize(self, module: nn.Module, optimizer: Optimizer | None) -> None:
        """Change the module and its optimizer (None where nothing is trained), before the module is wrapped."""

    def begin_micro_batch(self, last: bool) -> None:
        """Called before each micro-batch by strategies whose parameters are whole; after the last one's backward the
        gradients are those of the update.
        """

    def masters(self, parameters: Mapping[str, nn.Parameter]) -> Mapping[str, nn.Parameter]:
        """What the optimizer steps for each of the module's parameters, by name: those, or copies of them."""
        return parameters

    def clipped(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """The parameters whose gradients are clipped, given the module's trainable ones."""
        return parameters

    def take_weights(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Copy ``saved_weights``, which a checkpoint was read into, to the module's own where they are copies."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
