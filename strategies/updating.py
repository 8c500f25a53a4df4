"""The end of an update: the gradients' norm, whether all of them are finite, and the optimizer's step, or none."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .clip_factor import clip_factor
from .local_parts import local_part
from .ranks import Ranks
from .turns import TurnTaking

Names = Callable[[], list[str]]


class Updating(Ranks, TurnTaking):
    """The part of a strategy that ends an update.

    Attributes:
        device: where this rank's tensors live.
        normed: the gradients whose norms were computed last, as their parameters, and those norms, on this rank.
    """

    device: torch.device
    gradients_are_alike: ClassVar[bool] = True
    """Whether every rank has the same gradients after an update's last backward, or all of them know of one another's
    that aren't finite."""
    takes_program: ClassVar[bool] = False
    """Whether an update may be one program (``torch_compile="update"``): one device makes it, and the strategy does
    nothing between forward and the end of the step but what this class and the precision do."""
    compiles_updates: ClassVar[bool] = False
    """Whether an update is one compiled program, to which nothing can be added at will."""
    normed: tuple[Sequence[nn.Parameter], list[Tensor] | Tensor] | None = None

    @property
    def reads_at_once(self) -> bool:
        """Whether the host reads a number of an update without waiting for the device."""
        return self.device.type == "cpu"

    @property
    def forward_waits(self) -> bool:
        """Whether ranks wait for one another in every forward and backward, not in an update's last backward alone."""
        return False

    @property
    def judges_gradients(self) -> bool:
        """Whether ``step`` itself leaves the parameters alone where a gradient isn't finite, and tells by
        ``step_was_skipped``.
        """
        return self.precision.judges_gradients

    def prepare_gradients(self) -> None:
        """Bring the gradients to their true size, after the last backward of an update."""
        self.normed = None
        self.precision.unscale(self.optimizer_in_turn)

    def clip_grad_norm(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """Scale the gradients so that their 2-norm over the whole model is at most ``max_norm``.

        Returns:
            The norm before clipping, 0-dim, equal on every rank. It stays on the device.
        """
        parameters = self.precision.clipped(parameters)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return torch.zeros(())
        with torch.no_grad():  # torch.nn.utils.clip_grad_norm_ to the bit, without its sorting by device and dtype
            each = norms(gradients)
            norm: Tensor = torch.linalg.vector_norm(torch.stack(each))
            if not self.reads_at_once:
                torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
            elif (factor := clip_factor(norm, max_norm)) != 1.0:
                torch._foreach_mul_(gradients, factor)
        self.note_norms(parameters, each)
        return norm

    @torch.no_grad()
    def find_nonfinite(self, parameters: list[nn.Parameter]) -> Tensor:
        """Find out whether a gradient isn't finite, where no norm of all tells it. Sharded gradients take one reduction
        of one number.

        Returns:
            0-dim, finite where all gradients are, equal on every rank. It stays on the device.
        """
        parameters = self.precision.clipped(parameters)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.gradients_are_alike:
            return self.sum_of_norms(parameters, gradients)
        sum_of_norms = self.sum_of_norms(parameters, [local_part(gradient) for gradient in gradients])
        if self.world_size == 1:
            return sum_of_norms
        flag = nonfinite(sum_of_norms)  # no back end promises what the largest of some numbers and NaN is
        self.max_over_ranks(flag)
        return torch.where(flag > 0.0, torch.nan, flag)

    def sum_of_norms(self, parameters: Sequence[nn.Parameter], gradients: list[Tensor]) -> Tensor:
        """Add the norms of this rank's gradients, 0 without any, and note them; see ``note_norms``."""
        if not gradients:
            return torch.zeros((), device=self.device)
        each = norms(gradients)
        self.note_norms(parameters, each)
        return torch.stack(each).sum()

    def note_norms(self, parameters: Sequence[nn.Parameter], each: list[Tensor] | Tensor) -> None:
        """Note the norms of this rank's gradients, to name one that wasn't finite later.

        Args:
            parameters: with their gradients, or without.
            each: the norms of the gradients that are there, in this order; also in one tensor.
        """
        if len(each) != len(parameters):
            parameters = [parameter for parameter in parameters if parameter.grad is not None]
        self.normed = parameters, each

    def suspects(self) -> Names:
        """Return a function that names the parameters whose gradients on this rank aren't finite: call this between the
        last backward and the step, and the function whenever the names are wanted. It waits for the device.
        """
        normed, names = self.normed, self.names_stepped
        if normed is None:
            held = [p for group in self.groups_stepped() for p in group["params"] if p.grad is not None]
            with torch.no_grad():
                normed = held, norms([local_part(parameter.grad) for parameter in held]) if held else []
        parameters, each = normed

        def name() -> list[str]:
            name_of = names()
            stacked = torch.stack(each) if isinstance(each, list) and each else each
            finite = stacked.isfinite().tolist() if isinstance(stacked, Tensor) else []
            return [name_of.get(id(p), "?") for p, is_finite in zip(parameters, finite, strict=True) if not is_finite]

        return name

    def names_stepped(self) -> dict[int, str]:
        """The names of parameters, and of what the optimizer steps in their place, by id."""
        stepped = self.stepped_parameters()
        return {id(tensor): name for named in (self.named_parameters(), stepped) for name, tensor in named.items()}

    def groups_stepped(self) -> list[dict[str, Any]]:
        """The groups of the optimizer that steps."""
        return self.optimizer_in_turn.param_groups

    def step(self, refused: Tensor | None = None) -> None:
        """Step the optimizer.

        Args:
            refused: 0-dim on the device; where it isn't 0, parameters and the optimizer's state stay as they are. None
                steps.
        """
        if refused is None:
            self.precision.step(self.optimizer_in_turn)
        else:
            self.precision.step_unless(self.optimizer_in_turn, refused)
        self.weights_have_changed()

    def skip(self) -> None:
        """Do all that ``step`` does but step: the update isn't made."""
        self.precision.skip_step(self.optimizer_in_turn)

    def step_was_skipped(self) -> bool:
        """Whether the last ``step`` itself found that it must leave the parameters alone. Waits at most for that step,
        never for later work.
        """
        return self.precision.step_was_skipped()


def norms(gradients: list[Tensor]) -> list[Tensor]:
    """Compute the 2-norm of each tensor, at least in float32: 16 bits would round the sum, and overflow at 65504."""
    dtype = None if gradients[0].dtype.itemsize > 2 else torch.float32
    try:
        return list(torch._foreach_norm(gradients, 2.0, dtype=dtype))
    except NotImplementedError:  # a sparse gradient may hold an index twice, whose values must be summed first
        values = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
        return list(torch._foreach_norm(values, 2.0, dtype=dtype))


def nonfinite(number: Tensor) -> Tensor:
    """Return 1 where a 0-dim number isn't finite, and else 0, in float32 and on its device."""
    return number.mul(0.0).ne_(0.0).float()
