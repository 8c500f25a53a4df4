"""This rank's part of a tensor that may be spread over ranks, and the way back.

Importing DTensor takes as long as importing torch, so a tensor is asked whether it is one.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def local_part(tensor: Any) -> Tensor:
    """This rank's part of a tensor that is spread over ranks; any other as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def placed_like(part: Tensor, like: Any) -> Tensor:
    """Make a tensor of this rank's part that is spread over ranks as another is; the part itself where that one isn't.

    Args:
        part: of the shape of ``like``'s own part, in any dtype and on any device of the same mesh.
        like: a tensor of the same whole shape.
    """
    if not hasattr(like, "to_local"):
        return part
    made: Tensor = type(like.detach()).from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made


@torch.no_grad()
def copy_each(places: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Copy values to where they belong, between devices and dtypes."""
    for place, value in zip(places, values, strict=True):
        place.copy_(value)
