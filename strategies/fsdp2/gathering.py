"""FSDP2 in mixed precision: a block's shards are gathered in one message, matrices of products in 16 bits and the rest
in float32, as autocast wants them.

torch takes one dtype for a group of parameters. Its messages can hold several (float8 weights are gathered so), and
sums of gradients are in float32 anyway, so each parameter is told its own dtype here, and gradients are widened before
they are laid side by side. The names with an underscore are torch's own, of 2.9 to 2.13.
"""

from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from ...precision.products import Slot


class InFloat32(FSDPParam):
    """A parameter that is gathered as it is."""

    def init_dtype_attrs(self, mp_policy: MixedPrecisionPolicy) -> None:
        """Set the dtypes as torch does, without the group's cast."""
        super().init_dtype_attrs(replace(mp_policy, param_dtype=None))


class InSixteenBits(FSDPParam):
    """A parameter that is cast and gathered beside others that aren't."""

    def accumulate_unsharded_grad_if_needed(self) -> None:
        """Widen the gradient to the dtype of the reduction, which the other parameters' gradients have."""
        super().accumulate_unsharded_grad_if_needed()
        self.to_accumulated_grad_if_needed()


def gather_by_parameter(unit: nn.Module, kept: set[Slot]) -> None:
    """Have a unit of ``fully_shard`` gather some of its parameters without a cast.

    Args:
        unit: sharded just now, with a policy that casts.
        kept: where these parameters stand.
    """
    for group in groups_of(unit):
        whole = [is_kept(parameter, kept) for parameter in group]
        if any(whole):
            for parameter, is_whole in zip(group, whole, strict=True):
                parameter.__class__ = InFloat32 if is_whole else InSixteenBits


def is_kept(parameter: FSDPParam, kept: set[Slot]) -> bool:
    """Whether a parameter stands in one of the places that are gathered in float32."""
    where = parameter._module_info
    return (where.module, where.param_name) in kept


def groups_of(unit: nn.Module) -> list[list[FSDPParam]]:
    """The parameters that a unit gathers together."""
    return [group.fsdp_params for group in parameter_groups(unit)]


def parameter_groups(unit: nn.Module) -> list[Any]:
    """torch's own groups of a unit: 2.9 knows one of them, later ones may know several."""
    state = fully_shard.state(unit)  # type: ignore[attr-defined]
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return list(groups)


def gather(unit: nn.Module) -> None:
    """Gather a unit in a forward, unless it is gathered. Collective. torch's own ``unshard`` would settle the dtypes
    of sums anew, by the parameters that require gradients now: in a turn those may be none.
    """
    for group in parameter_groups(unit):
        group.unshard()
        group.wait_for_unshard()
