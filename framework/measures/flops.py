"""Peak FLOP/s of devices: what model FLOPs utilization (MFU) is measured against."""

import torch

# Dense bf16 FLOP/s by a part of the device's name, from the makers' data sheets.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
}


def device_name(device: torch.device) -> str:
    """Return the maker's name of a GPU, and the type of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(name: str) -> float | None:
    """Return the dense bf16 FLOP/s of the device of that name, or None where they aren't known."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
