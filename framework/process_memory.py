"""The memory that this process holds now, by counters of the system and of torch."""

import sys

import torch


def held(device: torch.device) -> dict[str, float]:
    """The bytes that this process holds now, and those that are allocated on its GPU: what a log may ask for often."""
    import psutil

    found: dict[str, float] = {"memory_cpu_resident": psutil.Process().memory_info().rss}
    if device.type == "cuda":
        found["memory_gpu_allocated"] = torch.cuda.memory_allocated(device)
        found["memory_gpu_reserved"] = torch.cuda.memory_reserved(device)
    return found


def resident() -> tuple[int, int]:
    """Return the bytes of host memory that this process holds, and the most that it has held."""
    import psutil

    memory = psutil.Process().memory_info()
    return memory.rss, max(memory.rss, getattr(memory, "peak_wset", 0) or peak())  # peak_wset: on Windows


def peak() -> int:
    """The most bytes of host memory that this process has held, which psutil doesn't say on a POSIX system."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        # On Linux this count would begin with what the parent process held when it started this one.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
