"""The examples of a strategy and of a precision of one's own: they compute what they say, and can be resumed."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from running import EXAMPLES, run_program, table_of
from stratagem.precision import PRECISIONS

SMALL = ("--build.width=4", "--save_strategy=steps", "--logging_strategy=steps", "--logging_steps=1")
PARAMETERS = 4 * 9 + 4 + 8 * 4 * 9 + 8 + 8 * 4 * 4 * 10 + 10  # of the reader of digits with a width of 4


def losses(directory: Path) -> list[float]:
    rows = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
def test_averaging_after_every_step_of_sgd_is_what_ddp_computes(tmp_path: Path) -> None:
    options = ("--strategy.every=1", "--optim=sgd", "--learning_rate=0.05", "--max_steps=10", "--save_strategy=no")
    printed = run_program(EXAMPLES / "own_strategy.py", *SMALL, *options, directory=tmp_path)
    own, ddp = table_of(printed, "strategy")
    assert (own[0], ddp[0]) == ("local-sgd", "ddp") and own[1:3] == ddp[1:3]
    output = tmp_path / "output" / "own_strategy"
    assert losses(output) == pytest.approx(losses(output / "ddp"), rel=1e-5)
    sent, of_ddp = (int(row[3].replace(",", "")) for row in (own, ddp))
    assert sent - of_ddp == 4  # the norm of the gradients
    assert of_ddp == pytest.approx(4 * PARAMETERS, abs=64)  # logs send some numbers, too


@pytest.mark.slow
def test_local_sgd_goes_on_from_a_checkpoint_as_if_it_had_not_ended(tmp_path: Path) -> None:
    program, output = EXAMPLES / "own_strategy.py", tmp_path / "output" / "own_strategy"
    options = (*SMALL, "--strategy.every=3", "--max_steps=12", "--save_steps=4")
    whole = table_of(run_program(program, *options, directory=tmp_path), "strategy")
    before = losses(output)
    for run in (output, output / "ddp"):
        shutil.rmtree(run / "checkpoint-12")
    resumed = table_of(run_program(program, *options, "--resume", directory=tmp_path), "strategy")
    assert losses(output) == [*before, *before[8:]]
    assert [row[:3] for row in resumed] == [row[:3] for row in whole]
    # Averages of weights and two moments after the updates 3, 4, 7, 8, 11 and 12.
    assert float(whole[0][3].replace(",", "")) == pytest.approx(6 / 12 * 3 * 4 * PARAMETERS, rel=0.02)


@pytest.fixture(scope="module")
def example() -> Any:
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("own_precision_example", EXAMPLES / "own_precision.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(EXAMPLES))
    del PRECISIONS["bf16-stochastic"]


def test_rounding_at_random_is_right_on_average(example: ModuleType) -> None:
    step = 2.0**-7  # between bfloat16's neighbours from 1 to 2
    for part in (0.0, 0.25, 0.9):
        numbers = torch.full((40_000,), -1.5 - part * step)
        rounded = example.round_at_random(numbers, torch.Generator().manual_seed(0)).float()
        assert {*rounded.tolist()} <= {-1.5, -1.5 - step}
        assert (rounded < -1.5).float().mean().item() == pytest.approx(part, abs=0.01)


@pytest.mark.slow
def test_weights_that_are_rounded_at_random_take_updates_that_bfloat16_loses(tmp_path: Path) -> None:
    program, output = EXAMPLES / "own_precision.py", tmp_path / "output" / "own_precision"
    options = (*SMALL, "--max_steps=30", "--save_steps=15", "--learning_rate=1e-4", "--max_grad_norm=0")
    whole = table_of(run_program(program, *options, directory=tmp_path), "precision")
    formats = ["StochasticBF16(seed=0)", "Full()", "BF16True()", "BF16True(master_weights=False)"]
    assert [row[0] for row in whole] == formats
    # Of each weight: itself, a float32 copy, and two moments.
    assert [float(row[1]) for row in whole] == pytest.approx([2 + 8, 4 + 8, 2 + 4 + 8, 2 + 4], abs=0.1)
    own, exact, _, lossy = (float(row[3]) for row in whole)
    assert abs(own - exact) < 0.3 * abs(lossy - exact)
    before = losses(output)
    for run in (output, *(output / name for name in ("fp32", "bf16", "rounded"))):
        shutil.rmtree(run / "checkpoint-30")
    resumed = run_program(program, *options, "--resume", directory=tmp_path)
    assert losses(output) == [*before, *before[15:]]
    assert [row[3:] for row in table_of(resumed, "precision")] == [row[3:] for row in whole]
