"""The memory that this process holds now, by counters of the system and of torch."""

import resource
import sys

import torch


def held(device: torch.device) -> dict[str, float]:
    """The bytes that this process holds now, and those that are allocated on its GPU: what a log may ask for often."""
    found: dict[str, float] = {}
    try:
        with open("/proc/self/statm", "rb") as file:
            found["memory_cpu_resident"] = int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):  # there is no /proc
        found["memory_cpu_resident"] = resident()[0]
    if device.type == "cuda":
        found["memory_gpu_allocated"] = torch.cuda.memory_allocated(device)
        found["memory_gpu_reserved"] = torch.cuda.memory_reserved(device)
    return found


def resident() -> tuple[int, int]:
    """Return the bytes of host memory that this process holds, and the most that it has held. Where the system doesn't
    say the first (there is no /proc), both are the second.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            kilobytes = {name: text.split() for name, _, text in (line.partition(":") for line in file)}
        held, peak = (int(kilobytes[name][0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return held, max(held, peak)
    except (OSError, KeyError):
        # On Linux this count would begin with what the parent process held when it started this one.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return peak, peak
