"""DistributedDataParallel with its gradients in one order from the first update on, and its buffers left to us."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Replicas(DistributedDataParallel):
    """Puts gradients into buckets in the reverse order of registration, for the whole of a run.

    torch begins with buckets by registration and rebuilds them after the first backward, in the order in which that one
    made its gradients. A ring of three ranks or more adds a number in another order where it lies elsewhere in its
    bucket, so a run that is resumed, and begins with other buckets than the one that went on, would differ in the last
    bits. Here the one rebuild takes place before the first forward, by an order that follows from the module alone:
    backward makes gradients from the last layer to the first, so that the buckets fill while it runs.

    Buffers are broadcast by every strategy's own rule (strategies/buffers.py).

    Where parameters may go unused torch never rebuilds, and its first buckets are kept.

    Args:
        module: on its device, its parameters final.
        **options: of DistributedDataParallel.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        self.rebuilds = options.get("static_graph", False) or not options.get("find_unused_parameters", False)
        super().__init__(module, **options)
        self.broadcast_buffers = False
        self.first_backward_is_done = False
        if self.rebuilds:
            self.reducer._push_all_rebuilt_params()
            self.reducer._rebuild_buckets()

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        """The parameters, and whether each has sparse gradients: the last one first."""
        parameters: list[Any]
        sparse: list[bool]
        parameters, sparse = super()._build_params_for_reducer()  # type: ignore[no-untyped-call]
        return (parameters[::-1], sparse[::-1]) if self.rebuilds else (parameters, sparse)

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Make a context for a micro-batch's forward and backward, in which only the last one's gradients are reduced.

        With a static graph torch learns the order in its first backward, which therefore has to reduce. Averaging is
        linear, so an early reduction of the first share changes nothing in the sum.
        """
        if last or (self.static_graph and not self.first_backward_is_done):
            self.first_backward_is_done = True
            return nullcontext()
        return self.no_sync()

    def check_reduced(self) -> None:
        """See that the last backward averaged all gradients.

        Raises:
            RuntimeError: one never came, and its bucket waits.
        """
        self._check_reducer_finalized()  # type: ignore[no-untyped-call]

    def let_go(self) -> None:
        """Leave the parameters to another wrapper: their gradients don't come to this one any more."""
        self._remove_autograd_hooks()  # type: ignore[no-untyped-call]
