"""Every cell of the table in precision/matrix.py, on two ranks: it learns what one process does, or is refused."""

import warnings
from functools import cache
from typing import Any

import pytest
from ranks import Ranks
from stratagem import Fit
from stratagem.precision import FP8, MXFP8, PRECISIONS, Precision
from stratagem.precision.matrix import MATRIX, PLACEMENTS, check_cell
from training import Tagger, make_strategy, train
from wide import Deep, rows

pytestmark = pytest.mark.slow

# Column to strategy, options and how many processes train in it.
CALLED: dict[str, tuple[str, dict[str, Any], int]] = {
    "single": ("single", {}, 1),
    "dp": ("dp", {}, 1),
    "ddp": ("ddp", {}, 2),
    "fsdp1": ("fsdp1", {}, 2),
    "fsdp2": ("fsdp2", {}, 2),
    "tp": ("tp", {}, 2),
    "fsdp2 x tp": ("fsdp2", {"tensor_parallel": 2}, 2),
}
# How far a sum in another order may be off after a few updates, by the bits of what is summed.
CLOSE = {"64-true": 1e-9, "32-true": 1e-4, "bf16-mixed": 0.03, "bf16-true": 0.03, "16-mixed": 0.01, "16-true": 0.01}
ARGUMENTS: dict[str, Any] = {"max_steps": 12, "learning_rate": 0.02}


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # mxfp8 says that it is experimental
    EMULATED: dict[str, Precision] = {"fp8": FP8(emulate=True), "mxfp8": MXFP8(emulate=True)}
# Formats that need a GPU and a package that isn't here: only their refusals can be shown.
ELSEWHERE = ("fp8-te", "apex-O1", "apex-O2")


def test_the_table_covers_what_there_is() -> None:
    assert list(MATRIX) == list(PRECISIONS)
    assert list(CALLED) == list(PLACEMENTS)
    for refused in MATRIX.values():
        assert refused.keys() <= PLACEMENTS.keys()


def test_columns_are_the_strategies_own() -> None:
    for column, (name, options, _) in CALLED.items():
        assert make_strategy(name, options).placement == column


@cache
def alone(precision: str) -> dict[str, list[Any]]:
    """The run in one process."""
    return train(per_device_train_batch_size=16, **arguments_of(precision))


def arguments_of(precision: str) -> dict[str, Any]:
    """Of a run in that format; those that are emulated need layers whose sizes they take."""
    if precision in EMULATED:
        return {**ARGUMENTS, "precision": EMULATED[precision], "module": Deep, "data": rows()}
    return {**ARGUMENTS, "precision": precision}


@pytest.mark.parametrize("precision", MATRIX)
@pytest.mark.parametrize("column", CALLED)
def test_cell(ranks: dict[int, Ranks], column: str, precision: str) -> None:
    strategy, options, world = CALLED[column]
    why = MATRIX[precision].get(column)
    if why is not None:
        with pytest.raises(ValueError) as refusal:
            if precision in ELSEWHERE:
                check_cell(precision, make_strategy(strategy, options).placement)
            else:
                made = EMULATED.get(precision, precision)
                Fit(Tagger(), strategy=make_strategy(strategy, options), precision=made)
        assert f"precision={precision!r} doesn't work with {PLACEMENTS[column]}: {why}" in str(refusal.value)
        assert "use " in why.lower()
        return
    if precision in ELSEWHERE:
        pytest.skip(f"{precision} needs a GPU and a package that isn't here")
    arguments = {"strategy": strategy, "options": options, **arguments_of(precision)}
    if world == 1:
        found = [train(per_device_train_batch_size=16, **arguments)]
    else:
        batch_size = 8 if column in ("ddp", "fsdp1", "fsdp2") else 16
        found = ranks[world].run(
            train, per_device_train_batch_size=batch_size // 2, gradient_accumulation_steps=2, **arguments
        )
    assert found == [found[0]] * world
    loss = found[0]["loss"]
    assert sum(loss[-3:]) < 0.8 * sum(loss[:3])
    assert loss == pytest.approx(alone(precision)["loss"], rel=CLOSE.get(precision, 0.05))
    assert "skipped_updates" not in found[0]
