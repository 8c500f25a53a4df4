"""Batches copied on a second stream of a real GPU. No GPU has run these yet; where there is none they are skipped."""

from typing import Any

import pytest
import torch
from stratagem import Callback
from stratagem.strategies import Single
from stratagem.strategies.copies_ahead import CopiesAhead, copies_ahead
from stratagem.strategies.devices import move_to
from tiny import MakeFit, Regressor, logs_of, parameters_of, regression_rows

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and this machine has none"),
    pytest.mark.slow,
]

DEVICE = torch.device("cuda", 0)
CYCLES = 200_000_000  # about a tenth of a second


def test_a_batch_is_there_before_the_work_that_was_handed_over_is_done() -> None:
    batch = torch.arange(1 << 20, dtype=torch.float32).pin_memory()
    move_to(batch, DEVICE)  # makes the stream
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    work = torch.cuda.Event()
    work.record()
    moved = move_to(batch, DEVICE)
    copied = torch.cuda.Event()
    copied.record(copies_ahead(DEVICE).stream)
    copied.synchronize()
    assert not work.query()  # neither the copy nor the host waited for it
    assert (moved + 1).cpu().equal(batch + 1)


def test_values_stay_though_the_host_frees_and_copies_far_ahead() -> None:
    ahead = CopiesAhead(DEVICE, most=10 << 20)
    sums = []
    for number in range(200):
        torch.cuda._sleep(CYCLES // 200)
        batch = torch.full((1 << 18,), float(number)).pin_memory()
        moved = ahead.move(batch, lambda value: value.to(DEVICE, non_blocking=True))
        sums.append(moved.double().mean())
        del moved, batch  # their memory may be taken for the next
    assert torch.stack(sums).tolist() == [float(number) for number in range(200)]


class OnTheComputingStream(Single):
    """Copies as before."""

    def to_device(self, batch: Any) -> Any:
        return {name: value.to(self.device) for name, value in batch.items()}


class Waits(Callback):
    """Has any wait of the host's be an error from the second update on."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if 1 <= state.global_step < 8 else "default")


def test_a_run_has_the_same_losses_and_weights_and_waits_for_nothing(make_fit: MakeFit) -> None:
    found = []
    for strategy in (Single(device=DEVICE), OnTheComputingStream(device=DEVICE)):
        torch.manual_seed(0)
        waits = [Waits()] if type(strategy) is Single else []
        fit = make_fit(
            Regressor(), regression_rows(64), strategy=strategy, callbacks=waits, max_steps=10, logging_steps=10,
            per_device_train_batch_size=4, dataloader_num_workers=1,
        )  # fmt: skip
        try:
            fit.train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append(([log.get("loss") for log in logs_of(fit)], parameters_of(fit.module)))
    assert found[0][0] == found[1][0]
    for name, value in found[0][1].items():
        assert value.equal(found[1][1][name])
