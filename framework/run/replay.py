"""Replay: an update that is one program, as one CUDA graph, so that the host launches once and not kernel by kernel."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3
"""Calls before the capture: kernels are loaded in the first, and from the second on it shows which inputs stay."""


class Replay:
    """Calls a function of tensors, and from the fourth call on replays it.

    Inputs that are the same tensors in two calls (parameters, the optimizer's state) are read and changed where they
    are; others (the batch) are copied to where the graph reads them.

    Args:
        function: makes an update by kernels of one GPU alone.
    """

    def __init__(self, function: Callable[..., Sequence[Any]]) -> None:
        self.function = function
        self.calls = 0
        self.last: Sequence[Any] = ()
        self.read: list[Any] = []  # what the graph reads
        self.copied: list[int] = []  # places of inputs that are copied to there
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: Sequence[Any] = ()

    def __call__(self, *values: Any) -> Sequence[Any]:
        """Make the update.

        Raises:
            ValueError: an input is on the host, whose value a graph would hold as it was.
        """
        self.calls += 1
        if self.calls <= WARM_UP:
            self.last = values
            return self.function(*values)
        if self.graph is None or not self.reads(values):
            self.capture(values)
        assert self.graph is not None
        for place in self.copied:
            self.read[place].copy_(values[place], non_blocking=True)
        self.graph.replay()
        return [output.clone() if isinstance(output, Tensor) else output for output in self.outputs]

    def reads(self, values: Sequence[Any]) -> bool:
        """Whether the graph reads these inputs, but for those that are copied."""
        pairs = enumerate(zip(values, self.read, strict=True))
        return all(value is held or at in self.copied for at, (value, held) in pairs)

    def capture(self, values: Sequence[Any]) -> None:
        """Capture the graph, which computes nothing yet."""
        for value in values:
            if not (isinstance(value, Tensor) and value.is_cuda):
                raise ValueError(
                    "torch_compile_mode='reduce-overhead' replays an update as one CUDA graph, which would hold "
                    f"{value!r:.80}, on the host, as it is now. Write optim='adamw_torch_fused', whose counters are on "
                    "the GPU, or another torch_compile_mode."
                )
        self.copied = [at for at, (now, then) in enumerate(zip(values, self.last, strict=True)) if now is not then]
        copied = set(self.copied)
        self.read = [value.clone() if at in copied else value for at, value in enumerate(values)]
        self.last = values
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = self.function(*self.read)
