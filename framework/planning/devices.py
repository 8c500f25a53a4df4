"""Devices: how much memory they have and how fast they are at most, by their makers' data sheets."""

import difflib
import re
import time
from dataclasses import dataclass, fields

import psutil
import torch

from ..measures.flops import PEAK_FLOPS

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True)
class Device:
    """A device, of which each rank has one. Rates are the most that its maker promises.

    Args:
        name: as ``--device`` takes it.
        memory: bytes that programs can have.
        flops: dense bf16 FLOP/s.
        memory_bandwidth: bytes/s between the device and its memory.
        link: bytes/s that it sends to another device of its node, in one direction.
        network: bytes/s of its share of the node's way to others, in one direction.
        source: where the figures are from.
    """

    name: str
    memory: int
    flops: float
    memory_bandwidth: float
    link: float
    network: float
    source: str


# Memory is what nvidia-smi (rocm-smi) shows as the total. The network is what the maker's own servers have for each
# device: it belongs to the server, not to the device.
DEVICES = {
    each.name: each
    for each in (
        Device("h100-80gb", 81559 * MIB, PEAK_FLOPS["H100"], 3.35e12, 450e9, 50e9,
               "NVIDIA H100 data sheet (SXM: 3.35 TB/s, NVLink 900 GB/s both ways); DGX H100: 400 Gbit/s a GPU"),
        Device("h200-141gb", 143771 * MIB, PEAK_FLOPS["H200"], 4.8e12, 450e9, 50e9,
               "NVIDIA H200 data sheet (SXM: 4.8 TB/s, NVLink 900 GB/s both ways); DGX H200: 400 Gbit/s a GPU"),
        Device("b200-180gb", 183359 * MIB, 2250e12, 7.7e12, 900e9, 50e9,
               "NVIDIA DGX B200 data sheet (72 PFLOPS sparse FP8 for 8, NVLink 1.8 TB/s both ways, 400 Gbit/s a GPU)"),
        Device("a100-80gb", 81920 * MIB, PEAK_FLOPS["A100"], 2.039e12, 300e9, 25e9,
               "NVIDIA A100 data sheet (SXM: 2,039 GB/s, NVLink 600 GB/s both ways); DGX A100: 200 Gbit/s a GPU"),
        Device("a100-40gb", 40960 * MIB, PEAK_FLOPS["A100"], 1.555e12, 300e9, 25e9,
               "NVIDIA A100 data sheet (SXM: 1,555 GB/s, NVLink 600 GB/s both ways); DGX A100: 200 Gbit/s a GPU"),
        Device("l40s-48gb", 46068 * MIB, PEAK_FLOPS["L40S"], 864e9, 32e9, 25e9,
               "NVIDIA L40S data sheet (864 GB/s, PCIe 4.0 x16: 64 GB/s both ways); 200 Gbit/s a GPU assumed"),
        Device("rtx4090-24gb", 24564 * MIB, 165.2e12, 1.008e12, 32e9, 12.5e9,
               "NVIDIA Ada whitepaper (1,008 GB/s, bf16 with float32 sums, PCIe 4.0 x16); 100 Gbit/s a GPU assumed"),
        Device("mi300x-192gb", 196592 * MIB, 1307.4e12, 5.3e12, 448e9, 50e9,
               "AMD MI300X data sheet (5.3 TB/s, 7 links of 64 GB/s each way); 400 Gbit/s a GPU assumed"),
    )
}  # fmt: skip
CPU = "cpu"
UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "B": 1.0}
FIGURES = 5
OWN = (
    'A device of your own is five figures: --device "80GiB,989e12,3.35e12,450e9,50e9" (memory, dense bf16 FLOP/s, and '
    "bytes/s of its memory, to a device of its node, and to one of another node; the last two may be left out where "
    "there is one rank)."
)


def find_device(name: str) -> Device:
    """Find a device by its name, or by a beginning that no other device's has; or make one of figures.

    Raises:
        ValueError: there is none; names the nearest, and says how to give figures.

    Example:
        >>> find_device("h100").name, find_device("24GiB,165e12,1e12").memory
        ('h100-80gb', 25769803776)
    """
    asked = name.strip().lower().replace("_", "-").replace(" ", "-")
    if asked == CPU:
        return this_cpu()
    if "," in name:
        return device_of(name)
    plain = asked.removeprefix("nvidia-").removeprefix("amd-").removeprefix("geforce-")
    known = {re.sub(r"[^a-z0-9]", "", each): each for each in DEVICES}
    key = re.sub(r"[^a-z0-9]", "", plain)
    begins = [
        each for short, each in known.items() if short.startswith(key) or short.removeprefix("rtx").startswith(key)
    ]
    if key and len(begins) == 1:
        return DEVICES[begins[0]]
    if key and key + "b" in known:  # h100-80
        return DEVICES[known[key + "b"]]
    near = begins or [known[each] for each in difflib.get_close_matches(key, known, n=2, cutoff=0.4)]
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"There is no device {name!r}. {hint}Known are {', '.join(DEVICES)} and {CPU}. {OWN}")


def device_of(figures: str) -> Device:
    """Make a device of figures with commas between them.

    Raises:
        ValueError: they are others than ``Device`` has.
    """
    parts = [part.strip() for part in figures.split(",")]
    if not 3 <= len(parts) <= FIGURES:
        raise ValueError(f"device={figures!r} has {len(parts)} figures. {OWN}")
    try:
        values = [bytes_in(part) for part in parts]
    except ValueError as error:
        raise ValueError(f"device={figures!r}: {error}. {OWN}") from error
    if min(values) <= 0:
        raise ValueError(f"device={figures!r}: figures are above 0. {OWN}")
    memory, flops, bandwidth, *ways = values
    ways += [ways[-1] if ways else bandwidth] * (2 - len(ways))
    return Device("own", int(memory), flops, bandwidth, ways[0], ways[1], "given")


def bytes_in(text: str) -> float:
    """Read a number with or without a unit: "80GiB", "989e12"."""
    found = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]*)", text)
    if found is None or (found[2] and found[2].upper() not in UNITS):
        raise ValueError(f"{text!r} is no figure")
    return float(found[1]) * UNITS.get(found[2].upper(), 1.0)


def this_cpu() -> Device:
    """This machine's CPU, measured for a moment: products of matrices in float32, and a copy in memory."""
    matrix = torch.ones(1024, 1024)
    flops = 2 * 1024**3 / fastest(lambda: matrix @ matrix)
    source = torch.ones(2**24)
    copied = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / fastest(lambda: copied.copy_(source))
    memory = psutil.virtual_memory().total
    # Ranks on one machine send through its memory: written once and read once.
    return Device(CPU, memory, flops, bandwidth, bandwidth / 2, bandwidth / 2, "measured here, in float32")


def fastest(work: object, times: int = 4) -> float:
    """The seconds of the fastest of a few calls."""
    assert callable(work)
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def rows_of_devices() -> list[tuple[str, ...]]:
    """The table of devices, a row for each: the fields of ``Device`` as a person reads them."""
    rows = []
    for each in DEVICES.values():
        rates = (f"{each.flops / 1e12:g}", *(f"{getattr(each, n.name) / 1e9:g}" for n in fields(each)[3:6]))
        rows.append((each.name, f"{each.memory / GIB:.1f}", *rates, each.source))
    return rows
