"""auto_find_batch_size: after out-of-memory a run is, to the bit, what the smaller batch would have given."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback, Fit, FitArguments, TrainModule
from stratagem.framework.batch_size import is_out_of_memory, smaller
from stratagem.precision import FP16Mixed
from tiny import Dropping, MakeFit, NoisyRows, Regressor, RowStream, parameters_of, regression_rows
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

ROWS = 50
RUN: dict[str, Any] = {"shuffle": True, "max_steps": 7, "logging_steps": 1, "max_grad_norm": 0.5}


class Hungry(Dropping):
    """Runs out of memory where a batch has more samples than ``limit``, in the given forward and after."""

    def __init__(self, limit: int, from_call: int = 1) -> None:
        super().__init__()
        self.limit, self.from_call = limit, from_call
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += len(x)
        if self.calls >= self.from_call and len(x) > self.limit:
            raise torch.OutOfMemoryError(f"tried to allocate {len(x)} samples")
        return super().forward(x)


class Counting(Callback):
    """A state that a failed attempt would leave behind, and the events that were heard."""

    def __init__(self) -> None:
        self.steps = 0
        self.events: list[str] = []

    def on_init_end(self, *_: Any, **__: Any) -> None:
        self.events.append("init end")

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.events.append("train begin")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.events.append("train end")

    def on_exception(self, *_: Any, **__: Any) -> None:
        self.events.append("exception")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def losses(fit: Fit) -> list[float]:
    """The loss of each update."""
    return [log["loss"] for log in fit.state.log_history if "loss" in log]


def assert_same(found: Fit, asked: Fit) -> None:
    """Two runs gave the same numbers, weights, buffers and optimizer states."""
    assert losses(found) == losses(asked)
    left, right = found.module.state_dict(), asked.module.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    states = [list(fit.optimizer.state_dict()["state"].values()) for fit in (found, asked)]
    for one, other in zip(*states, strict=True):
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in other)


@pytest.mark.parametrize(
    ("asked", "at_most", "gives"),
    [((16, 1), 8, (8, 2)), ((6, 1), 3, (3, 2)), ((10, 1), 5, (5, 2)), ((5, 3), 2, (1, 15)), ((9, 2), 4, (3, 6))],
)
def test_the_global_batch_stays(asked: tuple[int, int], at_most: int, gives: tuple[int, int]) -> None:
    args = FitArguments(per_device_train_batch_size=asked[0], gradient_accumulation_steps=asked[1])
    found = smaller(args, at_most)
    assert found is not None
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == gives
    assert smaller(args, 0) is None


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("out of memory, said the user's own code"), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
    ],
)
def test_what_is_out_of_memory(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


@pytest.mark.parametrize("from_call", [1, 3])  # in the first update, and after two that changed everything
def test_the_run_is_the_one_of_the_smaller_batch(make_fit: MakeFit, from_call: int) -> None:
    rows = NoisyRows(ROWS)
    torch.manual_seed(5)
    module = Hungry(limit=4, from_call=from_call)
    torch.manual_seed(5)
    other = Hungry(limit=99)
    counting = Counting()
    found = make_fit(
        module,
        rows,
        per_device_train_batch_size=16,
        auto_find_batch_size=True,
        callbacks=[counting],
        precision=FP16Mixed(growth_interval=1),
        **RUN,
    )
    first_layer = module.first
    found.train()
    asked = make_fit(
        other,
        rows,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        precision=FP16Mixed(growth_interval=1),
        **RUN,
    )
    asked.train()

    assert_same(found, asked)
    assert found.strategy.precision.log_values() == asked.strategy.precision.log_values()
    assert found.args.per_device_train_batch_size == found.state.train_batch_size == 4
    assert found.args.gradient_accumulation_steps == 4
    assert found.get_total_train_batch_size(found.args) == 16
    assert found.module is module
    assert module.first is first_layer
    assert module.calls == other.calls  # an attribute
    assert torch.equal(module.seen, other.seen)  # a buffer that checkpoints leave out
    assert counting.steps == 7
    begun = ["train begin", "exception"] * 2  # 16, 8
    assert counting.events == ["init end", *begun, "train begin", "train end"]
    sizes = [log for log in found.state.log_history if "per_device_train_batch_size" in log]
    assert [(log["per_device_train_batch_size"], log["gradient_accumulation_steps"]) for log in sizes] == [(4, 4)]


def test_a_second_run_begins_from_the_weights_of_the_first(make_fit: MakeFit) -> None:
    fits = []
    for auto, batch, accumulation in ((True, 16, 1), (False, 8, 2)):
        torch.manual_seed(5)
        module = Hungry(limit=99)
        fit = make_fit(
            module,
            NoisyRows(ROWS),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            auto_find_batch_size=auto,
            **RUN,
        )
        if auto:  # the first run must be the same on both
            fit.args = fit.requested = fit.running = fit.args.replace(
                per_device_train_batch_size=8, gradient_accumulation_steps=2
            )
            fit.stream = fit.get_train_dataloader()
        fit.train()
        fits.append(fit)
    found, asked = fits
    assert_same(found, asked)
    found.module.limit, found.module.from_call = 3, found.module.calls + 5
    found.train()
    asked.args = asked.requested = asked.running = asked.args.replace(
        per_device_train_batch_size=2, gradient_accumulation_steps=8
    )
    asked.stream = asked.get_train_dataloader()
    asked.train()
    assert found.args.per_device_train_batch_size == 2
    assert_same(found, asked)
