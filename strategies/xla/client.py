"""torch_xla's client: which versions fit together, how it is started, and what it has compiled."""

import math
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

TORCH, TORCH_XLA = "2.9.0", "2.9.0"  # the last pair that fits together; torch_xla doesn't say which torch it needs


def check_package() -> None:
    """Refuse to run without torch_xla, or with a torch that it wasn't built for.

    Raises:
        ValueError: names the two versions that fit together.
    """
    try:
        found = version("torch_xla")
    except PackageNotFoundError:
        found = None
    if found is None or minor(found) != minor(torch.__version__):
        beside = "no torch_xla" if found is None else f"torch_xla {found}"
        raise ValueError(
            f"strategy='xla' needs torch_xla {TORCH_XLA} with torch {TORCH}, in an environment of their own: "
            f"pip install torch=={TORCH} torch_xla=={TORCH_XLA}. Found: torch {torch.__version__} and {beside}."
        )


def minor(release: str) -> list[str]:
    """The part of a version that must be the same in both packages."""
    return release.split(".")[:2]


def start() -> int:
    """Start the client, once in a process, and make sure that backward works there.

    Returns:
        The number of devices.

    Raises:
        RuntimeError: a backward on the host came first.
    """
    # Constants 0 and 1 would be a part of the program: where 1 - beta^t has become 1, an update would be compiled anew.
    os.environ.setdefault("XLA_NO_SPECIAL_SCALARS", "1")
    import torch_xla.runtime as xr

    if not xr.is_spmd():
        xr.use_spmd()
    devices: int = xr.global_runtime_device_count()  # this starts the client
    if xr.process_count() > 1:
        raise ValueError(
            f"strategy='xla' feeds the devices of one host from one process, and there are {xr.process_count()} "
            "processes. Start one."
        )
    probe = torch.ones((), device="xla", requires_grad=True)
    try:
        (2 * probe).backward()
    except RuntimeError as error:
        raise RuntimeError(
            "strategy='xla' must be set up before the process's first backward on the host, after which torch knows of "
            "no further devices. Make the Fit first."
        ) from error
    return devices


def check_mesh(sizes: Mapping[str, int], devices: int) -> None:
    """Refuse a mesh that doesn't hold all devices.

    Raises:
        ValueError: says how many there are.
    """
    product = math.prod(sizes.values())
    if product != devices:
        asked = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"
        raise ValueError(
            f"XLASPMD can't arrange {devices} devices as {asked} (a product of {product}): a mesh holds all devices. "
            f"Write mesh={{'fsdp': {devices}}}, or sizes whose product is {devices}. On a CPU, CPU_NUM_DEVICES in the "
            "environment says how many it stands for."
        )


def compilations() -> int:
    """Programs compiled in this process so far."""
    from torch_xla.debug import metrics

    return int(metrics.counter_value("UncachedCompile") or 0)


def on_host(value: Any) -> Any:
    """A copy of a tensor in host memory; anything else as it is."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
