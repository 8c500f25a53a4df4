"""The kit of faults: each strikes where it is told to, and nowhere else."""

import errno
import io
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from stratagem import Callback, Fit
from stratagem.framework.checkpoint import CheckpointError
from stratagem.testing.faults import (
    PHASES,
    DeadStore,
    Delay,
    Fault,
    FaultError,
    FileSizeLimit,
    FullDisk,
    MismatchedCollective,
    NonfiniteGradient,
    OutOfMemory,
    Raise,
    SignalSelf,
    SlowDisk,
    UnevenData,
    UnevenStream,
    Within,
    flip_bit,
)
from stratagem.testing.faults.stores import cut_connections
from tiny import Regressor, regression_rows

TRAIN: dict[str, Any] = {"progress": False, "loggers": (), "per_device_train_batch_size": 4, "max_steps": 4}


class Seen(Fault):
    """Notes where it struck: in which function of the framework, and what the run had done by then."""

    def __init__(self, **where: Any) -> None:
        super().__init__(**where)
        self.seen: list[tuple[int, set[str]]] = []

    def strike(self, fit: Any) -> None:
        frame, names = sys._getframe(), set()
        while frame is not None:
            names.add(frame.f_code.co_name)
            frame = frame.f_back  # type: ignore[assignment]
        self.seen.append((fit.state.global_step, names))


def train(*callbacks: Callback, data: Any = None, resume: bool = False, **arguments: Any) -> Fit:
    torch.manual_seed(0)
    rows = regression_rows(40) if data is None else data
    quiet = {"save_strategy": "no", **TRAIN, **arguments}
    fit = Fit(Regressor(), rows, regression_rows(8), callbacks=list(callbacks), **quiet)
    fit.train(resume_from_checkpoint=resume)
    return fit


# Updates done when the fault strikes in update 2, and a function that must be on the stack.
STANDS = {
    "train_begin": (0, "train"),
    "data": (1, "read_update"),
    "begin": (1, "train"),
    "forward": (1, "forward"),
    "backward": (1, "backward"),
    "step": (1, "train"),
    "end": (2, "end_update"),
    "evaluate": (2, "evaluate"),
    "save": (2, "save_checkpoint"),
    "saved": (2, "save_checkpoint"),
    "train_end": (4, "train"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_is_reached_once(tmp_path: Path, phase: str) -> None:
    fault = Seen(update={"train_begin": 0, "train_end": 4}.get(phase, 2), phase=phase)
    train(
        fault, output_dir=str(tmp_path), save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    ((done, names),) = fault.seen
    assert done == STANDS[phase][0]
    assert STANDS[phase][1] in names


def test_several_updates_and_other_ranks() -> None:
    some, every, none = Seen(update=range(2, 4), phase="backward"), Seen(update=None), Seen(rank=1, update=None)
    train(some, every, none)
    assert [done for done, _ in some.seen] == [1, 2]
    assert [done for done, _ in every.seen] == [0, 1, 2, 3]
    assert not none.seen


def test_a_later_attempt_is_left_in_peace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    first, second = Seen(), Seen(attempt=1)
    train(first, second)
    assert (len(first.seen), len(second.seen)) == (0, 1)


def test_once_over_several_runs(tmp_path: Path) -> None:
    for _ in range(2):
        fault = Seen(update=range(1, 3), once_file=tmp_path / "once")
        train(fault)
        (tmp_path / "counts").open("a").write(str(len(fault.seen)))
    assert (tmp_path / "counts").read_text() == "10"


def test_a_fault_without_an_occasion_says_so() -> None:
    class Bare(Regressor):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.hidden.weight.t() @ self.head.weight.t()  # no layer is called

    with pytest.raises(FaultError, match="'forward' of update 1 on rank 0"):
        Fit(Bare(), regression_rows(8), callbacks=[Seen(phase="forward")], save_strategy="no", **TRAIN).train()


def test_wrong_places_are_refused() -> None:
    with pytest.raises(ValueError, match="phase takes one of"):
        Seen(phase="forwards")
    with pytest.raises(ValueError, match="of which the first is 1"):
        Seen(update=-1)
    with pytest.raises(ValueError, match="'backward'"):
        NonfiniteGradient(phase="step")
    with pytest.raises(ValueError, match="call takes one of"):
        MismatchedCollective("sum")


def test_raising() -> None:
    with pytest.raises(ZeroDivisionError):
        train(Raise(ZeroDivisionError, update=2, phase="forward"))
    with pytest.raises(torch.OutOfMemoryError):
        train(OutOfMemory(update=2, phase="backward"))
    fit = train(OutOfMemory(phase="forward"), auto_find_batch_size=True)
    assert fit.args.per_device_train_batch_size == 2 and fit.state.global_step == 4


def test_a_signal_comes() -> None:
    came = []
    before = signal.signal(signal.SIGUSR1, lambda *_: came.append(1))
    try:
        train(SignalSelf(signal.SIGUSR1, update=3, phase="forward"))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert came == [1]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "status"), [("Kill()", -9), ("Exit(7)", 7)])
def test_a_process_ends(kind: str, status: int, tmp_path: Path) -> None:
    program = f"""
from stratagem import Fit
from stratagem.testing.faults import Exit, Kill
from tiny import Regressor, regression_rows
Fit(Regressor(), regression_rows(8), callbacks=[{kind}], save_strategy="no", progress=False, loggers=()).train()
"""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, timeout=120)
    assert done.returncode == status


def test_delay() -> None:
    begin = time.perf_counter()
    train(Delay(0.1, update=range(1, 5), phase="data"))
    assert time.perf_counter() - begin > 0.4


@pytest.mark.parametrize("accumulation", [1, 2])
def test_one_gradient_is_not_finite(accumulation: int) -> None:
    seen: dict[int, list[str]] = {}

    class Look(Callback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
            named = fit.module.named_parameters()
            seen[state.global_step + 1] = [name for name, p in named if not p.grad.isfinite().all()]
            for p in fit.module.parameters():
                p.grad.nan_to_num_()

    fault = NonfiniteGradient("hidden.weight", math.inf, update=2)
    train(fault, Look(), gradient_accumulation_steps=accumulation, max_grad_norm=0.0)
    assert seen == {1: [], 2: ["hidden.weight"], 3: [], 4: []}
    with pytest.raises(ValueError, match=r"has no parameter 'head\.wait'"):
        train(NonfiniteGradient("head.wait"))


def test_a_full_disk(tmp_path: Path) -> None:
    with FullDisk(tmp_path / "full", free=5) as disk:
        (tmp_path / "full").mkdir()
        assert (tmp_path / "other").write_text("much more") == 9
        assert (tmp_path / "full" / "a").write_text("four") == 4
        with pytest.raises(OSError, match="No space") as raised:
            (tmp_path / "full" / "b").write_bytes(b"four")
        assert raised.value.errno == errno.ENOSPC and disk.free == 0
        assert (tmp_path / "full" / "b").read_bytes() == b"f"  # what fitted
        with open(tmp_path / "full" / "c", "wb", buffering=0) as raw, pytest.raises(OSError, match="No space"):
            raw.write(b"x")
    assert open is io.open and (tmp_path / "full" / "b").write_text("fits") == 4


def test_a_disk_that_is_full_from_an_update_on(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No space left"):
        train(Within(FullDisk(tmp_path), update=3), output_dir=str(tmp_path), save_strategy="steps", save_steps=1)
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-1", "checkpoint-2"]
    (tmp_path / "again").write_text("the context was left")


def test_a_slow_disk(tmp_path: Path) -> None:
    begin = time.perf_counter()
    with SlowDisk(tmp_path, seconds=0.05, bytes_per_second=100):
        (tmp_path / "a").write_bytes(b"x" * 10)
    assert time.perf_counter() - begin > 0.15
    assert (tmp_path / "a").read_bytes() == b"x" * 10


def test_the_kernels_limit_meets_libraries_too(tmp_path: Path) -> None:
    fit = train()
    with FileSizeLimit(100), pytest.raises(Exception, match="File too large"):
        fit.export(tmp_path / "weights.safetensors")
    fit.export(tmp_path / "weights.safetensors")


def test_a_flipped_bit_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(output_dir=str(tmp_path), save_strategy="steps", save_steps=2)
    whole = {path: path.read_bytes() for path in (tmp_path / "checkpoint-4").rglob("*") if path.is_file()}
    damaged = flip_bit(tmp_path / "checkpoint-4", bit=3)
    before, after = whole[damaged], damaged.read_bytes()
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    assert [path for path in whole if path.read_bytes() != whole[path]] == [damaged]
    with pytest.raises(FileNotFoundError):
        flip_bit(damaged, offset=len(after))
    fit = train(resume=True, output_dir=str(tmp_path), max_steps=3)
    assert fit.state.global_step == 3
    assert f"Passed over a checkpoint: {damaged} was altered" in capsys.readouterr().err


def test_uneven_data(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, length in (("0", 4), ("1", 2)):
        monkeypatch.setenv("RANK", rank)
        data = UnevenData([10, 11, 12, 13], rank=1, missing=2)
        assert (len(data), data[0]) == (length, 10)
        assert list(UnevenStream([10, 11, 12, 13], rank=1, samples=2)) == [10, 11, 12, 13][:length]


def test_a_store_that_is_cut_off() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    client.set("a", "b")
    assert cut_connections(server.port) >= 2  # both ends of the clients' connections lie in this process
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            client.get("a")
        except dist.DistError as error:
            failed.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(20.0)
    assert failed
    with pytest.raises(FaultError, match="no connection"):
        train(DeadStore(port=1))
