"""Every cell of the table in strategies/matrix.py, on two ranks: it learns what one process does, or is refused."""

import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from stratagem import Fit
from stratagem.precision import PRECISIONS
from stratagem.precision.fp8 import FP8
from stratagem.precision.mxfp8 import MXFP8
from stratagem.strategies.matrix import MATRIX, PLACEMENTS, check_cell
from torch import Tensor, nn
from training import WIDTH, Block, Tagger, make_strategy, train

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


INSTANCES: dict[str, Any] = {"fp8": lambda: FP8(emulate=True), "mxfp8": lambda: MXFP8(emulate=True)}
ELSEWHERE = ("fp8-te", "apex-O1", "apex-O2")  # CUDA alone; their own tests run there


def test_the_table_covers_what_there_is() -> None:
    assert list(MATRIX) == list(PRECISIONS)
    # test_deepspeed.py trains in the one's two cells, tests/xla in the other's three.
    assert {*CALLED, "deepspeed", "xla"} == set(PLACEMENTS)
    for refused in MATRIX.values():
        assert refused.keys() <= PLACEMENTS.keys()


def test_columns_are_the_strategies_own() -> None:
    for column, (name, options, _) in CALLED.items():
        assert make_strategy(name, options).placement == column


class Wide(Tagger):
    """Its blocks are wide enough for float8: sizes are multiples of 16, and of 32, on each of two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.blocks = nn.ModuleList(Block(32, 64) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.widen(self.mix(self.embed(tokens)) + self.position[self.order])
        for block in self.blocks:
            x = block(x)
        return self.head(self.narrow(x))


@cache
def alone(precision: str) -> dict[str, list[Any]]:
    """The run in one process."""
    return train(**run_of(precision), per_device_train_batch_size=16)


@cache
def instance(precision: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mxfp8 says that it is a prototype
        return INSTANCES.get(precision, lambda: precision)()


def run_of(precision: str) -> dict[str, Any]:
    return {"module": Wide if precision in INSTANCES else Tagger, "precision": instance(precision), **ARGUMENTS}


REFUSED = [(precision, column) for precision, refused in MATRIX.items() for column in refused]
RUN = [(p, c) for c in CALLED for p in MATRIX if c not in MATRIX[p] and p not in ELSEWHERE]


@pytest.mark.parametrize(("precision", "column"), REFUSED)
def test_a_cell_that_is_refused(precision: str, column: str) -> None:
    with pytest.raises(ValueError) as refusal:
        if precision in ELSEWHERE or column in ("deepspeed", "xla"):  # neither the format nor the strategy need be here
            check_cell(precision, column)
        else:
            strategy, options, _ = CALLED[column]
            Fit(Tagger(), strategy=make_strategy(strategy, options), precision=instance(precision))
    assert str(refusal.value) == f"precision={precision!r} under {PLACEMENTS[column]}: {MATRIX[precision][column]}"
    assert re.search(r"Use (precision|strategy)='", str(refusal.value))


@pytest.mark.parametrize(("precision", "column"), RUN)
def test_a_cell_that_trains(ranks: dict[int, Ranks], precision: str, column: str) -> None:
    strategy, options, world = CALLED[column]
    arguments = {"strategy": strategy, "options": options, **run_of(precision)}
    if world == 1:
        found = [train(per_device_train_batch_size=16, **arguments)]
    else:
        batch_size = 8 if column in ("ddp", "fsdp1", "fsdp2") else 16
        halves = {"per_device_train_batch_size": batch_size // 2, "gradient_accumulation_steps": 2}
        found = ranks[world].run(train, **halves, **arguments)
    assert found == [found[0]] * world
    loss = found[0]["loss"]
    assert sum(loss[-3:]) < 0.8 * sum(loss[:3])
    assert loss == pytest.approx(alone(precision)["loss"], rel=CLOSE.get(precision, 0.05))
    assert "skipped_updates" not in found[0]


SOURCES = ("32-true", "bf16-true", "16-true")


def continue_in_each(directory: str, **arguments: Any) -> dict[str, dict[str, list[float]]]:
    """Losses of 8 updates, saved after 4, by the precision that saved and the one that went on."""
    found = {}
    for source in SOURCES:
        output = f"{directory}/{source}"
        saving = {"output_dir": output, "save_strategy": "steps", "save_steps": 4, "max_steps": 8}
        found[source] = {"whole": train(precision=source, **saving, **arguments)["loss"]}
        for target in (*SOURCES, "64-true", "16-mixed"):
            going_on = {**arguments, "max_steps": 8, "resume": f"{output}/checkpoint-4", "precision": target}
            found[source][target] = train(**going_on)["loss"]
    return found


@pytest.mark.parametrize("column", ["ddp", "fsdp1", "fsdp2", "tp"])
def test_any_precision_goes_on_from_any(ranks: dict[int, Ranks], tmp_path: Path, column: str) -> None:
    strategy, options, world = CALLED[column]
    arguments = {"strategy": strategy, "options": options, "per_device_train_batch_size": 16 if column == "tp" else 8}
    for result in ranks[world].run(continue_in_each, directory=str(tmp_path), **arguments):
        for source, losses in result.items():
            assert losses[source] == losses["whole"], source  # to the bit: nothing was rounded on the way
            for target, continued in losses.items():
                assert continued == pytest.approx(losses["whole"], rel=0.03), (source, target)
