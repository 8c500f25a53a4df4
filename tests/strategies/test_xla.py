"""What strategy="xla" says where it can't run, and how parameters lie on a mesh; tests/xla trains."""

from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch
from stratagem import Fit, TrainModule
from stratagem.strategies.xla import client
from stratagem.strategies.xla.sharding import Partition, partitions
from tiny import Regressor
from torch import nn


@pytest.mark.parametrize("found", [None, "2.7.1"])
def test_without_the_torch_xla_that_fits(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(client, "version", version)
    with pytest.raises(ValueError) as refusal:
        Fit(Regressor(), strategy="xla")
    beside = "no torch_xla" if found is None else f"torch_xla {found}"
    assert str(refusal.value) == (
        "strategy='xla' needs torch_xla 2.9.0 with torch 2.9.0, in an environment of their own: "
        f"pip install torch==2.9.0 torch_xla==2.9.0. Found: torch {torch.__version__} and {beside}."
    )


class Mesh:
    """As torch_xla's: axis to size."""

    def __init__(self, **sizes: int) -> None:
        self.sizes = {"data": 1, "fsdp": 1, "tensor": 1, **sizes}

    def shape(self) -> dict[str, int]:
        return self.sizes


class Cut(TrainModule):
    """Each way in which a plan cuts, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.up, self.down, self.norm = nn.Linear(8, 32), nn.Linear(32, 8), nn.LayerNorm(8)
        self.scalar = nn.Parameter(torch.ones(()))
        self.pair = nn.Parameter(torch.ones(2))

    def tensor_parallel_plan(self) -> dict[str, Any]:
        return {"embed": "embedding", "head": "colwise_gather", "up": "colwise", "down": "rowwise", "norm": "sequence"}


def laid_out(**sizes: int) -> dict[str, Partition]:
    return partitions(Cut(), Mesh(**sizes))


def test_fsdp_cuts_the_largest_dimension_that_has_an_entry_for_each_device() -> None:
    assert laid_out(fsdp=4) == {
        "scalar": (),
        "pair": (None,),
        "embed.weight": ("fsdp", None),
        "up.weight": ("fsdp", None),
        "up.bias": ("fsdp",),
        "down.weight": (None, "fsdp"),
        "down.bias": ("fsdp",),
        "norm.weight": ("fsdp",),
        "norm.bias": ("fsdp",),
    }


def test_tensor_cuts_by_the_plan_and_fsdp_what_is_left() -> None:
    found = laid_out(fsdp=2, tensor=2)
    assert found["embed.weight"] == ("tensor", "fsdp")
    assert (found["up.weight"], found["up.bias"]) == (("tensor", "fsdp"), ("tensor",))
    assert (found["down.weight"], found["down.bias"]) == (("fsdp", "tensor"), ("fsdp",))


def test_copies_are_cut_nowhere() -> None:
    assert all(set(axes) <= {None, "fsdp"} for axes in laid_out(data=4).values())


def test_a_shared_weight_that_a_plan_cuts_two_ways() -> None:
    module = Cut()
    module.tensor_parallel_plan = lambda: {"embed": "embedding", "head": "rowwise"}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"cuts the weight that 'head' shares with another layer by two dimensions"):
        partitions(module, Mesh(tensor=2))


def test_a_size_that_the_devices_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"'embed' is cut embedding, but its weight \(12, 8\) has 12 entries.*8 ranks"):
        partitions(Cut(), Mesh(tensor=8))
