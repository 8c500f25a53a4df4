"""Dynamic loss scaling in which all ranks skip together, whatever the gradients are sharded over."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from .base import MaxReduce
from .complex_numbers import as_real
from .device_flag import DeviceFlag, takes_flag


class RankAwareGradScaler(GradScaler):
    """A GradScaler that looks for overflow in each rank's own shards and agrees on the finding.

    torch's scaler checks the gradients one rank holds. Under sharding another rank's overflow would go unseen and the
    scales would drift apart; with DTensor and plain gradients in one optimizer it raises. Here local tensors are
    checked and the flag is all-reduced (MAX) once per update.

    Args:
        device: where the flags live.
        max_over_ranks: in-place MAX all-reduce over every rank that shares the model.
        **options: those of torch.amp.GradScaler.
    """

    def __init__(self, device: torch.device, max_over_ranks: MaxReduce, **options: Any) -> None:
        super().__init__(device.type, **options)
        self._max_over_ranks = max_over_ranks
        self._overflow: DeviceFlag | None = None
        self._refused: Tensor | None = None
        # The scale exists from the start, so that a checkpoint taken before the first backward holds it.
        self._lazy_init_scale_growth_tracker(device)

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        # Overrides torch.amp.GradScaler's private method (2.9 to 2.13); tests/precision pins its behaviour.
        from torch.distributed.tensor import DTensor  # importing DTensor costs as much as importing torch

        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                if local.is_sparse:
                    local = local._values()
                local = as_real(local)
                if local.dtype == torch.float16 and not allow_fp16:
                    raise ValueError(
                        "Loss scaling needs float32 gradients, but found float16 ones: the module's parameters were "
                        "cast to float16 after Fit was given it. Use precision='16-mixed' and leave the casts to it."
                    )
                if local.numel():
                    groups[local.device, local.dtype].append(local)
        flags = {found_inf.device: found_inf}
        with torch.no_grad():
            for (device, _), gradients in groups.items():
                flag = flags.setdefault(device, found_inf.to(device))
                torch._amp_foreach_non_finite_check_and_unscale_(gradients, flag, inv_scale.to(device))
            for flag in flags.values():
                self._max_over_ranks(flag)
        found = list(flags.values())
        on_one = found[0] if len(found) == 1 else torch.stack([flag.to(found[0].device) for flag in found]).amax()
        self._overflow = DeviceFlag(on_one)
        return flags

    def refuse_where(self, flag: Tensor) -> None:
        """Have the next step leave the parameters alone where a flag on the device is up, too. The scale doesn't follow
        the flag.
        """
        self._refused = flag

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step the optimizer unless its gradients overflowed, or the flag of ``refuse_where`` is up."""
        refused, self._refused = self._refused, None
        state = self._per_optimizer_states[id(optimizer)]
        found: dict[torch.device, Tensor] = state["found_inf_per_device"]
        if refused is not None:
            device = next(iter(found))
            state["found_inf_per_device"] = {**found, device: torch.maximum(found[device], refused.to(device))}
        result = None
        if misses_flag(optimizer) and any(flag.item() for flag in state["found_inf_per_device"].values()):
            state["stage"] = OptState.STEPPED
        else:
            result = super().step(optimizer, *args, **kwargs)
        state["found_inf_per_device"] = found
        return result

    def step_was_skipped(self) -> bool:
        """Whether the last update overflowed; waits for that update's flag alone."""
        return self._overflow is not None and self._overflow.is_up()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore scale and growth counter into the live tensors; an update that broke off half-way is forgotten."""
        super().load_state_dict(state)
        self._per_optimizer_states.clear()
        self._overflow = None
        scale, growth_tracker = self._check_scale_growth_tracker("load_state_dict")
        scale.fill_(state["scale"])
        growth_tracker.fill_(state["_growth_tracker"])


def misses_flag(optimizer: Optimizer) -> bool:
    """Whether torch leaves it to an optimizer to read the flag on the device, and the coming step can't."""
    return getattr(optimizer, "_step_supports_amp_scaling", False) and not takes_flag(optimizer)
