"""Averaged weights on ranks: one device's under every strategy, nothing sent for them, saved and loaded by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from safetensors.torch import load_file
from stratagem import Average, Callback
from torch.utils._python_dispatch import TorchDispatchMode
from training import PLACEMENTS, Tagger, make_fit, share_of_16, token_rows

UPDATES, SAVED_AT = 8, 4
ENGINES = [(2, f"deepspeed_stage_{stage}", {}) for stage in (0, 2, 3)]


def train_averaged(export: str, resume: str | None = None, **arguments: Any) -> list[float]:
    """A run whose averaged weights go to a file; the losses of the average and of the weights."""
    torch.manual_seed(0)
    average = Average(0.8)
    rows = token_rows()
    fit = make_fit(Tagger(), rows, rows[:40], max_steps=UPDATES, callbacks=[average], **arguments)
    fit.train(resume_from_checkpoint=resume)
    fit.export(export, weights=average)
    losses = [fit.evaluate(weights=average)["eval_loss"], fit.evaluate()["eval_loss"]]
    fit.close()
    return losses


def assert_close(found: Path, expected: Path) -> None:
    weights, references = load_file(found), load_file(expected)
    assert weights.keys() == references.keys()
    for name, reference in references.items():
        torch.testing.assert_close(weights[name], reference, rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "strategy", "options"), [*PLACEMENTS, *ENGINES], ids=str)
def test_one_devices_average_saved_and_loaded_anywhere(
    ranks: dict[int, Ranks], tmp_path: Path, world: int, strategy: str, options: dict[str, Any]
) -> None:
    alone, there = tmp_path / "alone", tmp_path / "there"
    losses = train_averaged(f"{alone}.safetensors", per_device_train_batch_size=16)
    run = {
        "strategy": strategy,
        "options": options,
        "per_device_train_batch_size": share_of_16(strategy, world, options),
        "save_strategy": "steps",
        "save_steps": SAVED_AT,
        "output_dir": str(there),
    }
    found = ranks[world].run(train_averaged, export=f"{there}.safetensors", **run)
    assert found == [found[0]] * world
    assert found[0] == pytest.approx(losses, abs=2e-6)
    assert losses[0] != losses[1]
    assert_close(Path(f"{there}.safetensors"), Path(f"{alone}.safetensors"))

    saved = str(there / f"checkpoint-{SAVED_AT}")
    again = ranks[world].run(
        train_averaged, export=f"{there}-2.safetensors", resume=saved, **run | {"save_strategy": "no"}
    )
    assert again == found
    resumed, whole = load_file(f"{there}-2.safetensors"), load_file(f"{there}.safetensors")
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())

    train_averaged(f"{alone}-2.safetensors", resume=saved, per_device_train_batch_size=16)
    assert_close(Path(f"{alone}-2.safetensors"), Path(f"{alone}.safetensors"))


class Collectives(TorchDispatchMode):
    """Counts what is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.namespace in ("c10d", "_c10d_functional", "c10d_functional")
        return function(*args, **(kwargs or {}))


class Watched(Average):
    """An average that counts what averaging sends."""

    sent = 0

    def on_step_end(self, *args: Any, **context: Any) -> None:
        with Collectives() as collectives:
            super().on_step_end(*args, **context)
        self.sent += collectives.count


def sent_by_averaging(**arguments: Any) -> list[int]:
    """What was sent in five averagings, and by one all-reduce that shows that the count sees it."""
    average: Callback = Watched()
    fit = make_fit(Tagger(), token_rows(), max_steps=5, callbacks=[average], **arguments)
    fit.train()
    with Collectives() as control:
        dist.all_reduce(torch.zeros(1))
    return [average.sent, average.count, control.count]  # type: ignore[attr-defined]


@pytest.mark.parametrize("strategy", [pytest.param("fsdp1", marks=pytest.mark.slow), "fsdp2", "tp"])
def test_averaging_sends_nothing(ranks: dict[int, Ranks], strategy: str) -> None:
    assert ranks[2].run(sent_by_averaging, strategy=strategy) == [[0, 5, 1]] * 2
