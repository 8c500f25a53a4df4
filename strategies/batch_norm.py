"""BatchNorm over the samples of all ranks, on any device (torch's SyncBatchNorm is for GPUs alone)."""

from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..precision.second_gradients import check_first_gradient

GROUPS: WeakKeyDictionary[nn.Module, dist.ProcessGroup] = WeakKeyDictionary()


def synchronize(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Have every BatchNorm compute its statistics over the group's samples (Ioffe and Szegedy, 2015).

    Layers and parameters stay the objects that they are, under their names: what is saved is a plain BatchNorm's.

    Args:
        module: changed in place.
        group: ranks with different samples.

    Raises:
        ValueError: it has no BatchNorm.
    """
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm)]
    if not layers:
        raise ValueError(
            f"sync_batchnorm=True has no effect: {type(module).__name__} has no BatchNorm layer. Leave it out."
        )
    for layer in layers:
        GROUPS[layer] = group
        layer.forward = MethodType(forward_jointly, layer)  # type: ignore[method-assign]


def separate(module: nn.Module) -> None:
    """Have every BatchNorm compute its statistics by itself again, as before ``synchronize``."""
    for layer in module.modules():
        if GROUPS.pop(layer, None) is not None:
            layer.__dict__.pop("forward", None)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def forward_jointly(layer: _BatchNorm, input: Tensor) -> Tensor:
    """A BatchNorm's forward. In training its statistics are over the group, and its running ones follow those."""
    group = GROUPS.get(layer)
    if group is None or not layer.training or not dist.is_initialized() or group.size() == 1:
        return type(layer).forward(layer, input)
    layer._check_input_dim(input)
    normalize: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = JointNorm.apply
    output, mean, variance, count = normalize(input, layer.weight, layer.bias, layer.eps, group)
    if layer.track_running_stats and layer.running_mean is not None and layer.running_var is not None:
        with torch.no_grad():
            assert layer.num_batches_tracked is not None
            layer.num_batches_tracked.add_(1)
            share: Any = 1.0 / layer.num_batches_tracked if layer.momentum is None else layer.momentum
            unbiased = variance * (count / (count - 1).clamp(min=1))
            for running, now in ((layer.running_mean, mean), (layer.running_var, unbiased)):
                running.copy_((1 - share) * running + share * now)
    return output


class JointNorm(torch.autograd.Function):
    """Normalizes over the samples of all ranks, which may hold different numbers of them.

    Each rank's mean and sum of squares about it are joined (Chan et al., 1979), which loses no bits where a mean is
    large beside its deviation, as a sum of squares would.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(output, mean, biased variance, number of values); the last three equal on all ranks."""
        x = input if input.dtype == torch.float64 else input.float()
        dims = [dim for dim in range(x.ndim) if dim != 1]
        number = x.numel() // x.shape[1]
        if number:
            variance, mean = torch.var_mean(x, dims, correction=0)
        else:
            variance = mean = x.new_zeros(x.shape[1])
        own = torch.cat([mean, variance * number, x.new_full((1,), number)])
        parts = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(parts, own, group=group)
        means, squares, numbers = torch.stack(parts).split([x.shape[1], x.shape[1], 1], dim=1)
        count = numbers.sum()
        mean = (means * numbers).sum(0) / count
        variance = (squares + numbers * (means - mean).square()).sum(0) / count
        scale = torch.rsqrt(variance + epsilon)
        output = (x - along(mean, x)) * along(scale, x)
        if weight is not None:
            output = output * along(weight, x)
        if bias is not None:
            output = output + along(bias, x)
        ctx.save_for_backward(input, weight, mean, scale, count)
        ctx.group, ctx.dims, ctx.has_bias = group, dims, bias is not None
        ctx.mark_non_differentiable(mean, variance, count)
        return output.to(input.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias; those of the last two are this rank's share, as of any parameter."""
        check_first_gradient("sync_batchnorm's layers have", "Leave sync_batchnorm out, or normalize otherwise.")
        input, weight, mean, scale, count = ctx.saved_tensors
        x, gradient = input.to(mean.dtype), gradients[0].to(mean.dtype)
        normed = (x - along(mean, x)) * along(scale, x)
        own = torch.stack([gradient.sum(ctx.dims), (gradient * normed).sum(ctx.dims)])
        sums = own.clone()
        dist.all_reduce(sums, group=ctx.group)
        shift, slope = (along(part, x) for part in sums / count)
        of_input = (gradient - shift - normed * slope) * along(scale if weight is None else scale * weight, x)
        of_weight = own[1].to(weight.dtype) if weight is not None else None
        return of_input.to(input.dtype), of_weight, own[0].to(weight.dtype) if ctx.has_bias else None, None, None


def along(vector: Tensor, x: Tensor) -> Tensor:
    """Reshape one number for each channel so that it broadcasts against ``x``."""
    return vector.view(1, -1, *([1] * (x.ndim - 2)))
