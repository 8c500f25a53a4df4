"""The memory that each stage of a run takes, read at the end of the stage from counters of the system."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..process_memory import resident


class MemoryByStage:
    """Bytes by stage: "init" (placing the module), "train", "eval", "predict". No thread watches, so no thread can
    outlive an exception.

    Args:
        device: of a GPU, the allocated bytes and their peak are read too.

    Attributes:
        stage: the stage that is under way.

    Example:
        >>> memory = MemoryByStage(torch.device("cpu"))
        >>> memory.begin("train")
        'init'
        >>> "train_memory_cpu_resident" in memory.report()
        True
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stage = "init"
        self.found: dict[str, float] = {}

    def begin(self, stage: str) -> str:
        """End the stage that is under way and begin another.

        Returns:
            The stage that ended.
        """
        ended, self.stage = self.stage, stage
        held, peak = resident()
        self.found[f"{ended}_memory_cpu_resident"] = held
        self.found[f"{ended}_memory_cpu_peak"] = peak
        if self.device.type == "cuda":
            allocated, peak = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
            self.found[f"{ended}_memory_gpu_allocated"] = allocated
            # Training goes on after an evaluation, so that its peak is the highest one of its parts.
            key = f"{ended}_memory_gpu_peak"
            self.found[key] = max(peak, self.found.get(key, 0))
            torch.cuda.reset_peak_memory_stats(self.device)
        return ended

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Entered around a stage inside another one, which goes on afterwards."""
        outer = self.begin(stage)
        try:
            yield
        finally:
            self.begin(outer)

    def report(self) -> dict[str, float]:
        """End the stage that is under way, and return the bytes of every stage so far: ``<stage>_memory_cpu_resident``,
        ``_cpu_peak`` and, on a GPU, ``_gpu_allocated`` and ``_gpu_peak``.
        """
        self.begin(self.stage)
        return dict(self.found)
