"""Models that every rank of a host makes whole, and that don't fit into its memory so: told by name."""

import warnings
from pathlib import Path

from torch import nn

LIMITS = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"  # of a container


def memory_of_host() -> int:
    """Bytes of memory that this host's processes may have together."""
    import psutil

    found: list[int] = [psutil.virtual_memory().total]
    for path in LIMITS:
        try:
            found.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no container, or one without a limit
            continue
    return min(found)


def warn_if_too_large(module: nn.Module, strategy: str, ranks: int, memory: int | None) -> None:
    """Warn of parameters that every rank of this host holds whole until they are sharded, where they need more memory
    than the host has.

    Args:
        module: the user's, not sharded.
        strategy: its name, for the message.
        ranks: on this host.
        memory: of the host, in bytes; None where it isn't known.
    """
    held = {name: p.nbytes for name, p in module.named_parameters() if p.device.type == "cpu"}
    total = sum(held.values())
    if memory is None or total * ranks <= memory:
        return
    largest = ", ".join(sorted(held, key=lambda name: -held[name])[:3])
    warnings.warn(
        f"strategy={strategy!r}: {type(module).__name__} was made whole in __init__, with {total / 1e9:.1f} GB of "
        f"parameters ({largest}, ...) on each of {ranks} ranks of this host, which has {memory / 1e9:.1f} GB of "
        "memory. Make big layers in build(self), so that each rank holds its shard alone; for a model of transformers, "
        "write TrainModule.wrap('its directory'), or wrap(lambda: AutoModelForCausalLM.from_config(config), "
        "weights='its directory').",
        stacklevel=2,
    )
