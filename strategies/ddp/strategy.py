"""DistributedDataParallel: a whole replica on every rank, gradients averaged in buckets during backward."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...precision.base import Precision
from ..base import ConfigureOptimizer, Prepare, nothing_to_prepare
from ..process_group import ProcessGroupOptions, ProcessGroupStrategy
from .replicas import Replicas

SENT_IN = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class DDPOptions(ProcessGroupOptions):
    """Options of DDP.

    Args:
        static_graph: the same parameters are used in every update; lets DDP learn the order once.
        find_unused_parameters: some parameters get no gradient in some updates; costs a walk of the graph each time.
        gradient_as_bucket_view: gradients live in the communication buckets, which saves a copy of them.
        bucket_cap_mb: size of a bucket in MiB.
        compress_gradients: send gradients in this dtype ("bf16" or "fp16"); halves the traffic of float32 ones.
    """

    static_graph: bool = False
    find_unused_parameters: bool = False
    gradient_as_bucket_view: bool = True
    bucket_cap_mb: float = 25.0
    compress_gradients: str | None = None

    def __post_init__(self) -> None:
        if self.compress_gradients not in (None, *SENT_IN):
            raise ValueError(
                f"DDP(compress_gradients=...) takes 'bf16', 'fp16' or None. Received: {self.compress_gradients!r}"
            )


class DDP(ProcessGroupStrategy):
    """``strategy="ddp"``: data parallel with whole replicas (Li et al., 2020). See DDPOptions.

    Example:
        ``Fit(module, data, strategy=DDP(static_graph=True), devices=2)``
    """

    name = "ddp"
    played_by = "ddp.played:PlayedDDP"
    Options = DDPOptions
    options: DDPOptions

    def check_precision(self, precision: Precision) -> None:
        """Refuse to compress gradients that have 16 bits already."""
        super().check_precision(precision)
        dtype = precision.parameter_dtype
        if self.options.compress_gradients and dtype is not None and dtype.itemsize < 4:
            raise ValueError(
                f"DDP(compress_gradients={self.options.compress_gradients!r}) has no use with "
                f"precision={precision.name!r}, whose gradients are {dtype} already. Leave it out."
            )

    def place(
        self, module: nn.Module, configure_optimizer: ConfigureOptimizer | None, prepare: Prepare = nothing_to_prepare
    ) -> None:
        """Move and convert the module, make the optimizer, and wrap the module."""
        super().place(module, configure_optimizer, prepare)
        if not any(p.requires_grad for p in module.parameters()):
            return  # nothing to average; DDP refuses such a module
        options = self.options
        self.model = Replicas(
            module,
            device_ids=[self.device] if self.device.type != "cpu" else None,
            process_group=self.gradient_group,
            init_sync=False,  # the ranks are alike
            static_graph=options.static_graph,
            find_unused_parameters=options.find_unused_parameters,
            gradient_as_bucket_view=options.gradient_as_bucket_view,
            bucket_cap_mb=options.bucket_cap_mb,
        )
        self.register_hook(self.model, SENT_IN[options.compress_gradients] if options.compress_gradients else None)
        self.first_backward_is_done = False

    def register_hook(self, model: DistributedDataParallel, dtype: torch.dtype | None) -> None:
        """Have gradients be sent in a 16-bit dtype; None leaves that to torch."""
        if dtype is not None:
            model.register_comm_hook(dtype, compressed_average)

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Make a context in which gradients aren't reduced before the last micro-batch."""
        assert isinstance(self.model, DistributedDataParallel)
        self.precision.begin_micro_batch(last)
        if last or (self.options.static_graph and not self.first_backward_is_done):
            # With a static graph DDP learns the order in its first backward, which therefore has to reduce. Averaging
            # is linear, so an early reduction of the first share changes nothing in the sum.
            self.first_backward_is_done = True
            return nullcontext()
        return self.model.no_sync()

    def prepare_gradients(self) -> None:
        """Refuse an update in which a gradient never came, for its bucket waits; else bring gradients to true size."""
        if isinstance(self.model, DistributedDataParallel):
            try:
                self.model._check_reducer_finalized()
            except RuntimeError as error:
                raise ValueError(self.unreduced()) from error
        super().prepare_gradients()

    def unreduced(self) -> str:
        """Say which parameters backward didn't reach, and what to write."""
        names = [name for name, p in self.named_parameters().items() if p.requires_grad and p.grad is None]
        return (
            f"strategy='ddp': no gradient reached {', '.join(names)} on rank {self.rank} in this update, so that "
            "gradients were not averaged. Where a layer isn't used in every update, or not on every rank, pass "
            "strategy=DDP(find_unused_parameters=True); where it is never used, freeze it by requires_grad_(False)."
        )


def compressed_average(dtype: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients over ranks in a 16-bit dtype, and write it back in its own.

    torch's hooks of this kind are refused on the CPU, for their names.
    """
    buffer = bucket.buffer()
    compressed = buffer.to(dtype).div_(dist.get_world_size())
    work = dist.all_reduce(compressed, async_op=True)
    averaged: torch.futures.Future[Tensor] = work.get_future().then(lambda future: buffer.copy_(future.value()[0]))
    return averaged
