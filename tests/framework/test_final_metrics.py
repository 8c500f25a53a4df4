"""What train() reports at its end: rates of the updates that it made, FLOPs and MFU, and memory by stage."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback
from stratagem.framework.measures import flops
from stratagem.framework.module import IGNORED_LABEL
from tiny import (
    CLASSES,
    MakeFit,
    Regressor,
    RowStream,
    StopAt,
    Tagger,
    collate,
    logs_of,
    regression_rows,
    token_rows,
)
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

ROWS = [row for row in token_rows(14) if (row["labels"] != -100).any()]  # 12, of 1 to 6 labels
LABELS = sum(int((row["labels"] != -100).sum()) for row in ROWS)
PARAMETERS = 2 * 5 * CLASSES + CLASSES  # embedding, head and its bias


class Counted(Tagger):
    main_input_name = "tokens"


def counts(metrics: dict[str, float], *names: str) -> list[float]:
    """What the rates are rates of: times the run time, they are counts again."""
    return [pytest.approx(metrics[f"train_{name}_per_second"] * metrics["train_runtime"]) for name in names]


NAMES = ("samples", "steps", "items", "tokens")
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "include_num_input_tokens_seen": "all",
    "num_train_epochs": 2,
    "logging_steps": 4,
}


def test_rates_are_counts_over_the_run_time(make_fit: MakeFit) -> None:
    metrics = make_fit(Counted(), ROWS, **OPTIONS).train().metrics
    assert counts(metrics, *NAMES) == [24, 12, 2 * LABELS, 24 * 6]
    assert metrics["total_flos"] == 6 * PARAMETERS * 24 * 6


@pytest.mark.parametrize("stop", [1, 4, 6, 9])
def test_a_resumed_run_counts_its_own_updates(make_fit: MakeFit, tmp_path: Path, stop: int) -> None:
    saving = {"save_strategy": "steps", "save_steps": stop, "callbacks": [StopAt(stop)]}
    first = make_fit(Counted(), ROWS, **OPTIONS, **saving).train().metrics
    rest = make_fit(Counted(), ROWS, **OPTIONS).train(resume_from_checkpoint=tmp_path / "output" / f"checkpoint-{stop}")
    # 6 updates an epoch; what a checkpoint between two logs holds was trained by the run that saved it.
    labels = [int((row["labels"] != -100).sum()) for row in ROWS * 2]
    done = sum(labels[: 2 * stop])
    assert [2 * stop, stop, done, 2 * stop * 6] == counts(first, *NAMES)
    assert [24 - 2 * stop, 12 - stop, 2 * LABELS - done, (24 - 2 * stop) * 6] == counts(rest.metrics, *NAMES)
    assert rest.metrics["total_flos"] == 6 * PARAMETERS * (24 - 2 * stop) * 6
    assert rest.metrics["train_loss"] == rest.training_loss > 0


def test_the_rate_in_a_log_is_of_this_runs_tokens(make_fit: MakeFit, tmp_path: Path, monkeypatch: Any) -> None:
    """A clock that stands still but for a second in each log: the rate is the tokens since the last log or resume."""
    options = {**OPTIONS, "include_tokens_per_second": True}
    saving = {"save_strategy": "steps", "save_steps": 3, "callbacks": [StopAt(3)]}
    make_fit(Counted(), ROWS, **options, **saving).train()
    ticks = iter(range(1000))
    monkeypatch.setattr("stratagem.framework.run.totals.time.perf_counter", lambda: float(next(ticks)))
    fit = make_fit(Counted(), ROWS, **options)
    fit.train(resume_from_checkpoint=tmp_path / "output" / "checkpoint-3")
    # Logs at updates 4, 8 and 12; the first is 1 update after the resume.
    assert [line["tokens_per_second"] for line in logs_of(fit)] == [1 * 12, 4 * 12, 4 * 12]


class Pairs(BatchSampler):
    """Batches of a kind of its own, so that the loader is taken as it is."""


class StopsEpochAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        control.should_epoch_stop = state.global_step == self.step


@pytest.mark.parametrize(
    ("data", "arguments", "samples"),
    [
        (regression_rows(7), {}, 14),
        (regression_rows(7), {"dataloader_drop_last": True}, 12),
        (regression_rows(8), {"callbacks": [StopsEpochAt(1)]}, 10),  # 2 of the first epoch, 8 of the second
        (RowStream(regression_rows(7)), {"max_steps": 8}, 14),  # no length to count by
        (RowStream(regression_rows(7)), {"max_steps": 5}, 9),
        (DataLoader(regression_rows(7), batch_sampler=Pairs(range(7), 2, drop_last=False)), {}, 14),
        (DataLoader(regression_rows(7), sampler=SequentialSampler(range(7)), batch_size=3), {}, 14),
    ],
)
def test_samples_are_those_that_were_handed_out(
    data: Any, arguments: dict[str, Any], samples: int, make_fit: MakeFit
) -> None:
    options = {"per_device_train_batch_size": 2, "num_train_epochs": 2, **arguments}
    assert [samples] == counts(make_fit(Regressor(), data, **options).train().metrics, "samples")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_peaks_of_devices(name: str, peak: float | None) -> None:
    assert flops.peak_flops(name) == peak


def test_mfu_is_the_part_of_the_peak_that_was_used(make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "mfu" not in make_fit(Counted(), ROWS, **OPTIONS).train().metrics  # nobody knows a CPU's peak
    monkeypatch.setitem(flops.PEAK_FLOPS, "cpu", 2e9)
    metrics = make_fit(Counted(), ROWS, **OPTIONS).train().metrics
    assert metrics["mfu"] == pytest.approx(6 * PARAMETERS * 24 * 6 / metrics["train_runtime"] / 2e9)


def test_a_module_may_know_its_flops_better(make_fit: MakeFit) -> None:
    class Own(Counted):
        def flops_per_token(self, parameter_count: int) -> float:
            return 1000.0 + parameter_count

    assert make_fit(Own(), ROWS, **OPTIONS).train().metrics["total_flos"] == (1000 + PARAMETERS) * 24 * 6


class Holding(Callback):
    """Holds 64 MiB during training that it lets go of when the totals are taken."""

    def on_train_begin(self, *args: Any, **context: Any) -> None:
        self.held = torch.ones(2**24)

    def on_train_end(self, *args: Any, **context: Any) -> None:
        del self.held


def test_memory_by_stage_without_threads(make_fit: MakeFit) -> None:
    before = set(threading.enumerate())
    rows = regression_rows(4)
    fit = make_fit(Regressor(), rows, rows, callbacks=[Holding()], max_steps=2, eval_strategy="steps", eval_steps=1)
    metrics = fit.train().metrics
    stages = {name.partition("_memory_")[0] for name in metrics if "_memory_" in name}
    assert stages == {"init", "train", "eval"}
    held = {stage: metrics[f"{stage}_memory_cpu_resident"] for stage in stages}
    assert held["eval"] >= held["init"] + 2**26 - 2**20
    assert held["train"] >= held["init"] + 2**26 - 2**20  # the totals are logged, and so taken, before on_train_end
    assert metrics["train_memory_cpu_peak"] >= held["eval"] - 2**22  # the system counts in steps
    assert set(threading.enumerate()) == before

    class Failing(Callback):
        def on_step_end(self, *args: Any, **context: Any) -> None:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        make_fit(Regressor(), rows, callbacks=[Failing()], max_steps=2).train()
    assert set(threading.enumerate()) == before


PROGRAM = """
import sys
import torch
from stratagem import Fit, TrainModule
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)
    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))

class Deep(TrainModule):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(24))
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x
    def loss(self, outputs, batch):
        return outputs.square().mean()

torch.set_num_threads(1)
rows = [{"x": torch.randn(512, 64)} for _ in range(16)]
fit = Fit(Deep(), rows, max_steps=2, per_device_train_batch_size=16, gradient_checkpointing=sys.argv[1] == "True",
          progress=False, loggers=(), save_strategy="no")
metrics = fit.train().metrics
print(metrics["train_memory_cpu_peak"] - metrics["init_memory_cpu_resident"])
"""


@pytest.mark.slow
def test_gradient_checkpointing_lowers_the_peak_of_resident_memory(tmp_path: Path) -> None:
    """Without it each of 24 blocks keeps its input (8192 x 64 numbers of 4 bytes: 2 MiB), and 8 MiB before and after
    the activation: 432 MiB. With it, its input.
    """
    parents = torch.ones(2**28)  # what this process holds is no part of what another one does
    peaks = {}
    for recompute in (False, True):
        command = [sys.executable, "-c", PROGRAM, str(recompute)]
        # Freed blocks go back to the system, so that the peak is of what is in use.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
        peaks[recompute] = float(output.stdout) / 2**20
    del parents
    print(f"peak beyond what the placed model holds, in MiB: {peaks}")
    assert peaks[False] > 432
    assert peaks[True] < peaks[False] - 300


@pytest.mark.parametrize("counts_on_device", [False, True])
@pytest.mark.parametrize(("batch", "accumulation"), [(2, 1), (1, 2)])
def test_updates_without_a_label_that_counts_are_left_out_of_means(
    make_fit: MakeFit, counts_on_device: bool, batch: int, accumulation: int
) -> None:
    class Counting(Tagger):
        def count_items(self, batch: Any) -> Any:
            return (batch["labels"] != IGNORED_LABEL).sum() if counts_on_device else super().count_items(batch)

    rows = [{**row, "labels": row["tokens"].clone()} for row in token_rows(12)]
    for row in (*rows[2:4], *rows[6:10]):  # the updates 2, 4 and 5
        row["labels"][:] = IGNORED_LABEL
    sizes: dict[str, Any] = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 6,
        "learning_rate": 0.0,
    }
    fit = make_fit(Counting(), rows, logging_steps=2, **sizes)
    output = fit.train()
    with torch.no_grad():  # at a learning rate of 0 each update's loss is that of the weights there are
        alone = [
            float(fit.module.loss(fit.module(torch.stack([a["tokens"], b["tokens"]])), collate([a, b])))
            for a, b in (rows[0:2], rows[4:6], rows[10:12])
        ]
    assert output.training_loss == pytest.approx(sum(alone) / 3, rel=1e-6)
    logs = logs_of(fit)
    assert [log["step"] for log in logs] == [2, 4, 6]
    assert [log["loss"] for log in logs] == pytest.approx(alone, rel=1e-6)
    each = make_fit(Counting(), rows, logging_steps=1, **sizes)
    each.train()
    assert ["loss" in log for log in logs_of(each)] == [True, False, True, False, False, True]
    assert all("learning_rate" in log for log in logs_of(each))
