"""The plan of a run: its ranks' accounts, and what follows from them on a device."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .account import BETWEEN_NODES, Account, Traffic
from .devices import Device
from .growth import most_samples


@dataclass(frozen=True)
class Floors:
    """What an update can't be faster than, in seconds, by the rates of the data sheet.

    Attributes:
        compute: FLOPs / bf16 FLOP/s, and what is held, read and written once, / memory bandwidth.
        traffic: bytes / bandwidth of the link, over all collectives.
    """

    compute: float
    traffic: float

    @property
    def overlapped(self) -> float:
        """Where every message hides behind computing, or the other way round."""
        return max(self.compute, self.traffic)

    @property
    def apart(self) -> float:
        """Where nothing overlaps."""
        return self.compute + self.traffic


FORMULA = (
    "compute = FLOPs of this rank / dense bf16 FLOP/s + (parameters + gradients + optimizer state) x 2 / memory "
    "bandwidth; messages = over all collectives, sent in rings: bytes x (n - 1) / n (an all-reduce twice) / bandwidth "
    "of the link; of a group on several nodes that is the network x the ranks of the group on the node. From "
    "max(compute, messages), where all of it overlaps, to their sum, where nothing does."
)
UNKNOWN = (
    "What a plan can't know: how far kernels stay below the data sheet's rates, latency and congestion of links, "
    "reading data; fragmentation of the allocator, workspaces of cuBLAS and of attention, buffers of NCCL, the CUDA "
    "context: the margin is for those."
)


@dataclass(frozen=True)
class RunPlan:
    """What a run comes to, before there is a machine for it. All memory is in bytes, all times in seconds.

    Attributes:
        accounts: of the ranks that were played; those that are equal once.
        world_size, nodes: of the run.
        device: that each rank has.
        margin: the part of its memory that is to stay free.
        seconds: that planning took.
    """

    accounts: Sequence[Account]
    world_size: int
    nodes: int
    device: Device
    margin: float
    seconds: float = 0.0

    @property
    def largest(self) -> Account:
        """The account of the rank that holds most."""
        return max(self.accounts, key=lambda each: each.peak.bytes if each.peak else each.held)

    @property
    def fits(self) -> bool | None:
        """Whether the largest rank's peak leaves the margin free; None where no update could be played."""
        peak = self.largest.peak
        return None if peak is None else peak.bytes <= self.room

    @property
    def room(self) -> int:
        """The bytes of the device without the margin."""
        return int(self.device.memory * (1 - self.margin))

    @property
    def largest_micro_batch(self) -> int | None:
        """The most samples of a micro-batch with which the peak leaves the margin free, by a straight line through two
        sizes that were played, for each moment of an update; 0 where not even one does, None where that isn't known.
        """
        return most_samples(self.largest.growth, self.room)

    @property
    def floors(self) -> Floors | None:
        """The floors of the slowest rank's update; None where no update could be played."""
        found = [floors_of(each, self.device) for each in self.accounts if each.peak is not None]
        return max(found, key=lambda each: each.overlapped) if found else None

    def to_dict(self) -> dict[str, Any]:
        """The plan in JSON types, as ``stratagem plan --json`` prints it."""
        floors, peak = self.floors, self.largest.peak
        return {
            "world_size": self.world_size,
            "nodes": self.nodes,
            "device": asdict(self.device),
            "margin": self.margin,
            "fits": self.fits,
            "largest_micro_batch": self.largest_micro_batch,
            "peak_bytes": None if peak is None else peak.bytes,
            "seconds_per_update": None
            if floors is None
            else {**asdict(floors), "from": floors.overlapped, "to": floors.apart},
            "formula": FORMULA,
            "unknown": UNKNOWN,
            "ranks": [each.to_dict() for each in self.accounts],
            "planning_seconds": self.seconds,
        }


def floors_of(account: Account, device: Device) -> Floors:
    """Work out how fast an update can be at most."""
    touched = 2 * (account.parameters + account.gradients + account.optimizer_state)
    compute = account.all_flops / device.flops + touched / device.memory_bandwidth
    return Floors(compute, sum(seconds_of(row, device) for row in account.traffic))


def seconds_of(row: Traffic, device: Device) -> float:
    """Work out how long collectives of a kind take at least. Ranks of the group on one node each use their own way out
    of it, so that a ring over several nodes goes out by all of them.
    """
    inside = row.sent / device.link
    if row.link != BETWEEN_NODES:
        return inside
    return max(inside if row.neighbours > 1 else 0.0, row.sent / (device.network * row.neighbours))


def accounts_that_differ(accounts: Sequence[Account]) -> list[Account]:
    """The accounts without those that say the same as an earlier one."""
    found: list[Account] = []
    for account in accounts:
        if not any({**account.to_dict(), "rank": 0} == {**other.to_dict(), "rank": 0} for other in found):
            found.append(account)
    return found


def problem_of(answer: Mapping[str, Any]) -> str | None:
    """What a played rank says can't work."""
    return answer.get("problem")
