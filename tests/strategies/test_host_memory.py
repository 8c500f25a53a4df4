"""A model that the ranks of a host can't all hold whole is warned of by name."""

import warnings

import pytest
import torch
from stratagem.strategies.host_memory import memory_of_host, warn_if_too_large
from torch import nn


def test_what_does_not_fit_is_named() -> None:
    module = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(10, 10))
    whole = 4 * (1000 * 1000 + 1000 + 10 * 10 + 10)
    with pytest.warns(UserWarning, match=r"'fsdp2': Sequential was made whole.*\(0.weight, 0.bias, 1.weight") as told:
        warn_if_too_large(module, "fsdp2", ranks=8, memory=8 * whole - 1)
    assert "on each of 8 ranks of this host, which has 0.0 GB" in str(told[0].message)
    assert "build(self)" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_too_large(module, "fsdp2", ranks=8, memory=8 * whole)
        warn_if_too_large(module, "fsdp2", ranks=8, memory=None)
        with torch.device("meta"):
            warn_if_too_large(nn.Linear(1000, 1000), "fsdp2", ranks=8, memory=1)


def test_a_host_says_its_memory() -> None:
    assert memory_of_host() > 2**28
