"""Fully sharded data parallel by torch's ``fully_shard``, alone or with tensor parallelism on one mesh."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from .base import ConfigureOptimizer
from .gradient_norm import clip_by_norm
from .materialize import build_on_meta, materialize
from .process_group import (
    CONTEXT,
    REPLICATE,
    SHARD,
    TENSOR,
    ProcessGroupOptions,
    ProcessGroupStrategy,
    broadcast_module,
    split_world,
)
from .tensor_parallel_plan import apply_plan, groups_split_by_mesh


@dataclass(frozen=True)
class FSDP2Options(ProcessGroupOptions):
    """Options of FSDP2.

    Args:
        reshard_after_forward: drop a block's gathered parameters after its forward and gather them again for backward
            (ZeRO-3); False keeps them between the two (ZeRO-2), for more memory and less traffic.
        replicas: hybrid sharding: this many copies of the model, each sharded over world / replicas ranks.
        tensor_parallel: ranks that hold each layer together, by the module's ``tensor_parallel_plan()``.
        loss_parallel: with tensor_parallel, keep the logits sharded by class up to the loss.
        cpu_offload: keep parameters, gradients and optimizer state in host memory.
    """

    reshard_after_forward: bool = True
    replicas: int = 1
    tensor_parallel: int = 1
    loss_parallel: bool = False
    cpu_offload: bool = False


class FSDP2(ProcessGroupStrategy):
    """``strategy="fsdp2"`` (or "fsdp"): every rank keeps a shard of parameters, gradients and optimizer state.

    Placed in this order: build on the meta device, cast, tensor parallelism, shard blocks and root, fill the shards,
    optimizer. (Zhao et al., 2023; Rajbhandari et al., 2020.) See FSDP2Options.

    Example:
        ``Fit(module, data, strategy=FSDP2(tensor_parallel=2), devices=4)``
    """

    name = "fsdp2"
    Options = FSDP2Options
    options: FSDP2Options

    def mesh_shape(self, world_size: int) -> dict[str, int]:
        """Replicas outermost, tensor-parallel ranks innermost; shards are what is left."""
        options = self.options
        shards = split_world(
            world_size, type(self).__name__, replicas=options.replicas, tensor_parallel=options.tensor_parallel
        )
        return {REPLICATE: options.replicas, SHARD: shards, CONTEXT: 1, TENSOR: options.tensor_parallel}

    def place(self, module: nn.Module, configure_optimizer: ConfigureOptimizer | None) -> None:
        """Shard the module in place; the optimizer is made over the shards."""
        options = self.options
        if options.loss_parallel and options.tensor_parallel == 1:
            raise ValueError("FSDP2(loss_parallel=True) has no effect without tensor_parallel=2 or more.")
        meta_layers = build_on_meta(module)
        self.precision.convert_module(module)
        if not meta_layers:
            module.to(self.device)
            broadcast_module(module)
        if options.tensor_parallel > 1:
            apply_plan(module, self.mesh[TENSOR], loss_parallel=options.loss_parallel)
        # Once is enough: torch says it in every forward whose output is a view, such as that of any 3-D Linear.
        warnings.filterwarnings("once", message="FSDP2-wrapped module .* returned a view tensor")
        self.shard(module)
        materialize(module, meta_layers, torch.device("cpu") if options.cpu_offload else self.device)
        self.module = self.model = module
        self.optimizer = configure_optimizer(module) if configure_optimizer else None

    def shard(self, module: nn.Module) -> None:
        """``fully_shard`` the module's blocks and then the rest of it, over the mesh's data dimensions."""
        options = self.options
        # One dimension shards; two replicate over the first and shard over the second.
        mesh = self.mesh[REPLICATE, SHARD] if options.replicas > 1 else self.mesh[SHARD]
        common: dict[str, Any] = {
            "mesh": mesh,
            "reshard_after_forward": options.reshard_after_forward,
            "offload_policy": CPUOffloadPolicy(pin_memory=self.device.type != "cpu")
            if options.cpu_offload
            else OffloadPolicy(),
        }
        compute, reduce = self.precision.compute_dtype, self.precision.reduce_dtype
        mixed = compute is not None and compute != self.precision.parameter_dtype
        for unit in module.shard_units():  # type: ignore[operator]
            fully_shard(
                unit,
                mp_policy=MixedPrecisionPolicy(compute, reduce) if mixed else MixedPrecisionPolicy(),
                **common,
            )
        # Outputs come back in float32, so that the loss is computed there.
        root = MixedPrecisionPolicy(compute, reduce, output_dtype=torch.float32) if mixed else MixedPrecisionPolicy()
        fully_shard(module, mp_policy=root, **common)

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are reduced, and parameters resharded, in the last micro-batch's backward."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        self.model.set_is_last_backward(last)
        return nullcontext()

    def forward_context(self) -> AbstractContextManager[Any]:
        """The policy casts; autocast would only cast again."""
        return nullcontext()

    def local_loss(self, loss: Tensor) -> Tensor:
        """The loss as a plain tensor; loss parallelism leaves it spread over the mesh."""
        return loss.full_tensor() if self.options.loss_parallel else loss  # type: ignore[attr-defined]

    def clip_grad_norm(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """The norm over all shards; torch's own fails where parameters live on different meshes."""
        return clip_by_norm(parameters, max_norm)

    def step(self) -> None:
        """Step the optimizer, mesh by mesh where there are several."""
        assert self.optimizer is not None
        with groups_split_by_mesh(self.optimizer) if self.options.tensor_parallel > 1 else nullcontext():
            super().step()
