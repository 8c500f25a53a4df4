"""DistributedDataParallel: a whole replica on every rank, gradients averaged in buckets during backward."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
    replicas_of_turns: Mapping[str, Replicas] = {}

    @property
    def learns_first_graph(self) -> bool:
        """Whether DDP learns the order of gradients once."""
        return self.options.static_graph

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
        if any(p.requires_grad for p in module.parameters()):  # else there is nothing to average; DDP refuses it
            self.model = self.replicas([self.device] if self.device.type != "cpu" else None)

    def replicas(self, device_ids: list[torch.device] | None) -> Replicas:
        """Wrap the module, to average the gradients of the parameters that require some now.

        Args:
            device_ids: where the wrapper moves what it is called with; None where that is there, or nothing: torch's
                own fails without arguments to move.
        """
        options = self.options
        replicas = Replicas(
            self.module,
            device_ids=device_ids,
            process_group=self.gradient_group,
            init_sync=False,  # the ranks are alike
            static_graph=options.static_graph,
            find_unused_parameters=options.find_unused_parameters,
            gradient_as_bucket_view=options.gradient_as_bucket_view,
            bucket_cap_mb=options.bucket_cap_mb,
        )
        self.register_hook(replicas, SENT_IN[options.compress_gradients] if options.compress_gradients else None)
        return replicas

    def place_turns(self, moved: Mapping[str, Sequence[str]]) -> None:
        """Wrap the module once for each turn, around the parameters that it moves, instead of once around all."""
        super().place_turns(moved)
        if isinstance(self.model, Replicas):
            self.model.let_go()
        self.model = self.module
        self.replicas_of_turns = {}
        for turn in moved:
            with super().turn(turn):
                self.replicas_of_turns[turn] = self.replicas(None)

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Call the module by the turn's own wrapper."""
        with super().turn(name):
            self.model = self.replicas_of_turns[name]
            try:
                yield
            finally:
                self.model = self.module

    def forget_module(self) -> None:
        """Let go of the wrappers, too."""
        super().forget_module()
        self.replicas_of_turns = {}

    def register_hook(self, model: Replicas, dtype: torch.dtype | None) -> None:
        """Have gradients be sent in a 16-bit dtype; None leaves that to torch."""
        if dtype is not None:
            model.register_comm_hook(dtype, compressed_average)

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Make a context in which gradients aren't reduced before the last micro-batch."""
        assert isinstance(self.model, Replicas)
        self.precision.begin_micro_batch(last)
        return self.model.accumulate(last)

    def prepare_gradients(self) -> None:
        """Refuse an update in which a gradient never came, for its bucket waits; else bring gradients to true size."""
        if isinstance(self.model, Replicas):
            try:
                self.model.check_reduced()
            except RuntimeError as error:
                raise ValueError(self.unreduced()) from error
        super().prepare_gradients()

    def unreduced(self) -> str:
        """Say which parameters backward didn't reach, and what to write."""
        names = [name for name, p in self.named_parameters().items() if p.requires_grad and p.grad is None]
        when = "update" if self.turn_now is None else f"turn of {self.turn_now!r}"
        return (
            f"strategy='ddp': no gradient reached {', '.join(names)} on rank {self.rank} in this {when}, so that "
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
