"""A rank's account: what it holds, what it holds at most and where, what it sends and computes in an update."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from .growth import Line
from .recording import (
    ACTIVATIONS,
    BACKWARD,
    FORWARD,
    GRADIENTS,
    HOST_AVERAGES,
    OTHER,
    PARAMETERS,
    RECOMPUTED,
    STATE,
    TEMPORARY,
    Event,
    Message,
    Recording,
)

IN_NODE, BETWEEN_NODES = "in a node", "between nodes"
# How often each byte of a message goes over a rank's link, of a ring of n ranks: times (n - 1) / n.
TIMES_SENT = {"all_reduce": 2}


@dataclass(frozen=True)
class Peak:
    """The moment of an update at which the device holds most.

    Attributes:
        bytes: that it holds.
        parts: the same by what it is: "parameters", "activations", ...
        phase: "forward", "backward", "recomputed" (in backward), or "update".
        module: the layer that is computed; "" between layers.
        activations: bytes, at most, of what isn't parameters, gradients, state, buffers or gathered parameters, at any
            moment.
        beside: bytes, at most, of what isn't parameters, gradients or state, at any moment: all that a device holds
            where those lie in the host's memory.
    """

    bytes: int
    parts: Mapping[str, int]
    phase: str
    module: str
    activations: int
    beside: int = 0


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind in an update.

    Attributes:
        operation: "all_gather", "reduce_scatter", "all_reduce", "broadcast", "all_to_all".
        dimension: of the mesh that the ranks lie along, as "shard"; several with "+".
        ranks: that take part in each.
        link: "in a node" or "between nodes", where some of the ranks lie on several.
        neighbours: ranks of the group on the node of this one, which share the group's way out of the node.
        count: collectives.
        bytes: of their tensors, whole.
    """

    operation: str
    dimension: str
    ranks: int
    link: str
    neighbours: int
    count: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that this rank's link must carry, by a ring: no algorithm sends less of an all-gather."""
        return self.bytes * TIMES_SENT.get(self.operation, 1) * (self.ranks - 1) / self.ranks


@dataclass(frozen=True)
class Account:
    """What one rank comes to; bytes and operations of one update.

    Attributes:
        rank: that was played.
        parameters, frozen_parameters, gradients, optimizer_state, buffers: bytes that it holds; a storage that two
            tensors share counts once.
        averaged_weights: bytes of the averages that are kept beside the weights.
        on_host: bytes that lie in the host's memory between two updates, by what they are: kinds of the above, and
            "averaged_weights_on_host". The peak is without them.
        samples, accumulation: of a micro-batch, and micro-batches of an update.
        data_ranks: ranks with different samples.
        peak: None where no update could be played.
        traffic: the collectives of an update.
        flops: by phase.
        growth: lines of the moments that may be the peak, see ``growth.py``; empty where they aren't known.
        stopped: why no update could be played, and the line of the user's file.
        notes: what the plan leaves out, in sentences.
    """

    rank: int
    parameters: int = 0
    frozen_parameters: int = 0
    gradients: int = 0
    optimizer_state: int = 0
    buffers: int = 0
    averaged_weights: int = 0
    on_host: Mapping[str, int] = field(default_factory=dict)
    samples: int = 0
    accumulation: int = 1
    data_ranks: int = 1
    peak: Peak | None = None
    traffic: Sequence[Traffic] = ()
    flops: Mapping[str, int] = field(default_factory=dict)
    growth: Sequence[Line] = ()
    stopped: str = ""
    notes: Sequence[str] = ()

    @property
    def held(self) -> int:
        """Bytes that are held from update to update, with gradients."""
        kept = self.parameters + self.frozen_parameters + self.buffers + self.averaged_weights
        return kept + self.gradients + self.optimizer_state

    @property
    def all_flops(self) -> int:
        """Operations of an update on this rank."""
        return sum(self.flops.get(phase, 0) for phase in (FORWARD, BACKWARD, RECOMPUTED))

    def to_dict(self) -> dict[str, Any]:
        """The account in JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Account":
        """The account that ``to_dict`` wrote."""
        peak = None if values["peak"] is None else Peak(**values["peak"])
        traffic, growth = [Traffic(**each) for each in values["traffic"]], [(a, b) for a, b in values["growth"]]
        return cls(**{**values, "peak": peak, "traffic": traffic, "growth": growth})


def find_peak(recording: Recording, on_host: Collection[str] = ()) -> Peak:
    """Find the moment of what was recorded at which the device held most.

    Args:
        recording: of an update.
        on_host: kinds that lie in the host's memory instead, as averages there do. Where the optimizer's state does, so
            does what a step makes for itself.
    """
    most, parts, place = -1, dict[str, int](), ("update", "")
    activations = beside = 0
    for here, live, event in moments(recording, on_host):
        beside = max(beside, live - held_of(here))
        if event is None:
            parts = dict(here)
            continue
        activations = max(activations, here.get(ACTIVATIONS, 0) + here.get(TEMPORARY, 0))
        if live > most:
            most, parts, place = live, dict(here), (event.phase, event.where)
    return Peak(max(most, live), {kind: size for kind, size in parts.items() if size}, *place, activations, beside)


def moments(
    recording: Recording, on_host: Collection[str] = ()
) -> Iterator[tuple[Mapping[str, int], int, Event | None]]:
    """Yield what the device holds when an update begins and after each event: by kind, in one mapping that changes, and
    in all.

    Args:
        recording, on_host: see ``find_peak``.
    """
    here: dict[str, int] = {}
    away = {HOST_AVERAGES, *on_host}
    for piece, size in recording.at_begin.values():
        kind = piece.kind or ACTIVATIONS
        if kind not in away:
            here[kind] = here.get(kind, 0) + size
    live = sum(here.values())
    yield here, live, None
    for event in recording.events:
        piece = event.piece
        kind = piece.kind or (ACTIVATIONS if piece.phase in (FORWARD, RECOMPUTED) else TEMPORARY)
        if kind not in away and not (STATE in away and kind == TEMPORARY and piece.phase == OTHER):
            here[kind] = here.get(kind, 0) + event.change
            live += event.change
        yield here, live, event


def held_of(here: Mapping[str, int]) -> int:
    """The bytes of parameters, gradients and state among those of all kinds."""
    return here.get(PARAMETERS, 0) + here.get(GRADIENTS, 0) + here.get(STATE, 0)


def sum_up(messages: Sequence[Message], mesh: DeviceMesh | None, rank: int, ranks_per_node: int) -> list[Traffic]:
    """Sum up the messages of an update by operation and group.

    Args:
        messages: of an update.
        mesh: that the ranks are arranged on.
        rank: that sent them.
        ranks_per_node: ranks that share a node, neighbours in number.
    """
    found: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}
    for each in messages:
        count, size = found.get((each.operation, each.ranks), (0, 0))
        found[each.operation, each.ranks] = count + 1, size + each.bytes
    rows = []
    for (operation, ranks), (count, size) in found.items():
        if len(ranks) == 1:
            continue  # what a rank tells itself
        neighbours = sum(other // ranks_per_node == rank // ranks_per_node for other in ranks)
        link = IN_NODE if neighbours == len(ranks) else BETWEEN_NODES
        rows.append(Traffic(operation, dimension_of(ranks, mesh), len(ranks), link, neighbours, count, size))
    return sorted(rows, key=lambda row: (row.dimension, row.operation))


def dimension_of(ranks: Sequence[int], mesh: DeviceMesh | None) -> str:
    """Name the dimensions of a mesh along which ranks lie."""
    if mesh is None or mesh.mesh_dim_names is None:
        return "world"
    sizes, places = list(mesh.shape), []
    for rank in ranks:
        place = []
        for size in reversed(sizes):
            rank, index = divmod(rank, size)
            place.append(index)
        places.append(place[::-1])
    names = [name for name, *indices in zip(mesh.mesh_dim_names, *places, strict=True) if len(set(indices)) > 1]
    return "+".join(names) or "world"
