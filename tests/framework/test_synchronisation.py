"""What the framework costs a run: no wait for the device between two logs, a light import, a shallow stack trace."""

import inspect
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
from stratagem import Callback, TrainModule
from stratagem.precision import FP16Mixed
from tiny import Dropping, Elsewhere, MakeFit, Regressor, Tagger, regression_rows, token_rows
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import dataloader

aten = torch.ops.aten
# Operators whose result, or whose result's shape, the host has to know before it can go on.
WAITING = {
    aten._local_scalar_dense.default,  # item(), float(), int(), bool(), `if tensor:`, indexing by a tensor
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
}
# Reads that a tensor on the CPU answers without an operator, where one on an accelerator would wait.
READING_METHODS = ("tolist", "cpu")


def begins_an_epoch() -> bool:
    """Whether torch's DataLoader is drawing its workers' seed, once an epoch: a tensor that is on the host anyway."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "__init__" and frame.f_code.co_filename == dataloader.__file__:
            return True
        frame = frame.f_back
    return False


class Waits(TorchDispatchMode):
    """Notes, while it is entered, each time that the host asks for a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in WAITING and not begins_an_epoch():
            self.noted.append(str(function))
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> "Waits":
        self.patches = pytest.MonkeyPatch()
        for name in READING_METHODS:
            self.patches.setattr(torch.Tensor, name, self.noting(name, getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.patches.undo()
        super().__exit__(kind, error, trace)

    def noting(self, name: str, method: Any) -> Any:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.noted.append(name)
            return method(tensor, *args, **kwargs)

        return read


class Watch(Callback):
    """Counts waits from the first event of training to the end of an update; says during which updates they came.

    The first update counts too: to make the optimizer's state and to check the first loss, nothing is read.
    """

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self.waits = Waits()
        self.by_update: dict[int, list[str]] = {}
        self.seen = self.skipped = self.scheduled = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.waits.__enter__()

    def on_step_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        # An update's log comes after its on_step_end, so its waits are still there at the next update's beginning.
        self.note(state.global_step)
        if state.global_step == self.updates:
            self.waits.__exit__(None, None, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.note(state.global_step)
        self.seen += 1

    def note(self, update: int) -> None:
        if self.waits.noted:
            self.by_update[update] = [*self.by_update.get(update, []), *self.waits.noted]
            self.waits.noted.clear()


class AdamTagger(Tagger):
    """Padded labels, under the default optimizer."""

    configure_optimizer = TrainModule.configure_optimizer


class DeviceCountingTagger(AdamTagger):
    """Counts its items as it would where the data is on the accelerator already: in a tensor that stays there."""

    def count_items(self, batch: Mapping[str, Tensor]) -> Tensor:
        return (batch["labels"] != -100).sum()


class LoggingTagger(AdamTagger):
    """Logs values of the device, and reads its counters."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        self.log("size", outputs.abs().mean())
        self.log("of_labels", outputs.mean(), items=(batch["labels"] != -100).sum())
        self.log("update", self.update_number)
        return super().loss(outputs, batch) / (1 + self.epoch)


class ReadingRegressor(Regressor):
    """A user's own mistake: reads each micro-batch's loss."""

    configure_optimizer = TrainModule.configure_optimizer

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        loss = super().loss(outputs, batch)
        self.last = loss.item()
        return loss


def watched(make_fit: MakeFit, module: TrainModule, rows: Iterable[Any], updates: int, **arguments: Any) -> Watch:
    """Train a little past ``updates`` with everything on, and without a log unless asked for one."""
    watch = Watch(updates)
    options: dict[str, Any] = {
        "callbacks": [watch],
        "strategy": Elsewhere(device="cpu"),
        "loggers": ["jsonl"],
        "progress": True,
        "shuffle": True,
        "per_device_train_batch_size": 2,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "linear",
        "learning_rate": 1e-3,
        "warmup_steps": 5,
        "max_steps": updates + 5,
        "logging_steps": 10_000,
    }
    fit = make_fit(module, rows, **{**options, **arguments})
    fit.train()
    assert watch.seen == fit.state.global_step == updates + 5
    optimizer = fit.optimizer
    assert isinstance(optimizer, torch.optim.Adam) and all(group["fused"] for group in optimizer.param_groups)
    watch.skipped = fit.state.skipped_updates
    watch.scheduled = fit.scheduler.last_epoch
    return watch


# 28 rows are 14 micro-batches of 2: at accumulation 4 an epoch ends in a short group, so 50 updates cross many epochs.
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("module", [Dropping, AdamTagger, DeviceCountingTagger, LoggingTagger])
def test_fifty_updates_between_two_logs_never_wait_for_the_device(
    make_fit: MakeFit, module: type[TrainModule], accumulation: int, precision: str
) -> None:
    rows = regression_rows(28) if module is Dropping else token_rows(28)
    watch = watched(make_fit, module(), rows, updates=50, gradient_accumulation_steps=accumulation, precision=precision)
    assert watch.by_update == {}


@pytest.mark.parametrize("optim", ["adamw", "adam"])
def test_skipped_updates_are_counted_without_waiting(make_fit: MakeFit, optim: str) -> None:
    precision = FP16Mixed(initial_scale=2.0**60)  # which overflows until it was halved to about 2^16
    watch = watched(make_fit, AdamTagger(), token_rows(28), updates=75, optim=optim, precision=precision)
    assert watch.by_update == {}
    assert 35 < watch.skipped < 55
    assert watch.scheduled == 80 - watch.skipped


def test_the_watch_sees_a_read_in_every_micro_batch(make_fit: MakeFit) -> None:
    watch = watched(make_fit, ReadingRegressor(), regression_rows(32), updates=50, gradient_accumulation_steps=4)
    expected = [str(aten._local_scalar_dense.default)] * 4
    assert watch.by_update == dict.fromkeys(range(1, 51), expected)


def test_what_waits_is_a_log_and_nothing_else(make_fit: MakeFit) -> None:
    watch = watched(make_fit, Dropping(), regression_rows(32), updates=50, logging_steps=20)
    assert sorted(watch.by_update) == [20, 40]


# Imports.

HEAVY = (
    "accelerate",
    "deepspeed",
    "lightning",
    "matplotlib",
    "optuna",
    "rich",
    "sklearn",
    "sympy",  # 380 ms, by way of DTensor
    "tensorboard",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.elastic",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "torchmetrics",
    "tqdm",
    "transformers",
)


@pytest.fixture(scope="module")
def imported() -> set[str]:
    """The modules that ``import stratagem`` adds to those of ``import torch``, in an interpreter of its own."""
    program = "import json, sys, torch; before = set(sys.modules); import stratagem; " + (
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    return set(json.loads(output.splitlines()[-1]))


def belongs_to(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.slow
@pytest.mark.parametrize("package", HEAVY)
def test_importing_stratagem_leaves_heavy_packages_for_where_they_are_used(imported: set[str], package: str) -> None:
    assert sorted(module for module in imported if belongs_to(module, package)) == []


@pytest.mark.slow
def test_importing_stratagem_adds_one_small_package_to_torch_and_the_standard_library(imported: set[str]) -> None:
    assert "stratagem.framework.fit" in imported
    packages = {module.partition(".")[0] for module in imported} - set(sys.stdlib_module_names)
    assert packages <= {"stratagem", "safetensors", "torch"}
    # A handful of small ones at most: one heavy part of torch brings hundreds.
    assert len([module for module in imported if belongs_to(module, "torch")]) < 20


# Stack traces.


def depth_below_train() -> int:
    """How many frames the caller's caller sits below Fit.train; 1 would be called by it."""
    frames = inspect.stack()[1:]
    return next(
        depth
        for depth, frame in enumerate(frames)
        if frame.function == "train" and Path(frame.filename).parts[-2:] == ("framework", "fit.py")
    )


class Deep(Regressor):
    """Notes how deep its methods are called."""

    def __init__(self) -> None:
        super().__init__()
        self.depths: dict[str, set[int]] = {"forward": set(), "loss": set()}

    def forward(self, x: Tensor) -> Tensor:
        self.depths["forward"].add(depth_below_train())
        return super().forward(x)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        self.depths["loss"].add(depth_below_train())
        return super().loss(outputs, batch)


class LossGiving(nn.Module):
    """A module as others write them: its forward returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 1)
        self.depths: set[int] = set()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        self.depths.add(depth_below_train())
        return {"loss": nn.functional.mse_loss(self.head(x), y)}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_forward_and_loss_sit_at_most_eight_frames_below_train(
    make_fit: MakeFit, accumulation: int, precision: str
) -> None:
    module = Deep()
    arguments = {"precision": precision, "gradient_accumulation_steps": accumulation, "max_steps": 3}
    make_fit(module, regression_rows(16), max_grad_norm=1.0, **arguments).train()
    assert 1 <= max(module.depths["forward"]) <= 8
    assert 1 <= max(module.depths["loss"]) <= 8


def test_forward_of_a_wrapped_module_sits_as_shallow(make_fit: MakeFit) -> None:
    module = LossGiving()
    make_fit(TrainModule.wrap(module), regression_rows(16), max_steps=3).train()
    assert 1 <= max(module.depths) <= 8


def test_an_error_in_forward_shows_the_user_s_line_within_eight_frames_of_train(make_fit: MakeFit) -> None:
    class Failing(Regressor):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError) as caught:
        make_fit(Failing(), regression_rows(16), max_steps=3).train()
    names = [entry.frame.code.name for entry in caught.traceback]
    assert names[-1] == "forward"
    assert len(names) - 1 - names.index("train") <= 8
