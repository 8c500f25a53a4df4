"""Where a rank's part of a tensor lies in the whole one, and which ranks hold the same part."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Coordinates = tuple[int, ...] | None
WHOLE = "whole"  # the kind of a tensor that every rank holds whole


class Part(NamedTuple):
    """What a rank holds of a tensor.

    Attributes:
        name: of the tensor.
        tensor: the part itself, a plain tensor.
        begin: where it begins in the whole tensor.
        kind: how the tensor is cut, by a name that every rank has for it.
    """

    name: str
    tensor: Tensor
    begin: tuple[int, ...]
    kind: str


class Parts:
    """Finds this rank's parts of tensors. Many tensors are cut alike, and how is worked out once.

    Attributes:
        coordinates: for each kind of cut that was met, this rank's place in it: ranks of one place hold the same part.
            None where this rank holds none.
    """

    def __init__(self) -> None:
        self.coordinates: dict[str, Coordinates] = {WHOLE: ()}
        self._numbers: dict[object, int] = {}  # of the meshes, in the order in which every rank meets them
        self._known: dict[object, tuple[tuple[int, ...], str]] = {}

    def of(self, name: str, tensor: Tensor) -> Part:
        """Return this rank's part of a tensor; an empty one where it has none. Call it without gradients."""
        if not isinstance(tensor, DTensor):
            return Part(name, tensor.detach() if tensor.requires_grad else tensor, (0,) * tensor.ndim, WHOLE)
        if not tensor.numel():  # no rank has a part that says how it is shaped
            return Part(name, torch.empty(tensor.shape, dtype=tensor.dtype), (0,) * tensor.ndim, WHOLE)
        spec = id(tensor.device_mesh), tensor.placements, tensor.shape
        if spec not in self._known:
            self._known[spec] = self._work_out(tensor)
        begin, kind = self._known[spec]
        return Part(name, tensor.to_local().detach(), begin, kind)

    def _work_out(self, tensor: DTensor) -> tuple[tuple[int, ...], str]:
        mesh, placements = tensor.device_mesh, tensor.placements
        number = self._numbers.setdefault(mesh, len(self._numbers))
        kind = f"{number} {tuple(mesh.shape)} {placements}"
        place = mesh.get_coordinate()
        self.coordinates[kind] = (
            None
            if place is None
            else tuple(at for at, placement in zip(place, placements, strict=True) if not placement.is_replicate())
        )
        _, begin = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
        return tuple(begin), kind
