"""``strategy="auto"``: what is chosen for a memory, and that the run is that of a strategy that a user could name."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ranks import Ranks
from stratagem import Fit, TrainModule
from stratagem.strategies import FSDP2, Strategy
from stratagem.strategies.played import here
from torch import Tensor, nn

WIDTH, BLOCKS = 256, 8
# A parameter of 4 bytes has as much of gradient and twice of Adam's moments: 16 bytes, 8.4 MB in all.
PARAMETERS = BLOCKS * (WIDTH**2 + WIDTH) * 4


class Stack(TrainModule):
    """Blocks that are gathered one at a time."""

    blocks_made = BLOCKS

    def __init__(self) -> None:
        super().__init__()
        blocks = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)) for _ in range(self.blocks_made))
        self.blocks = nn.Sequential(*blocks)

    def shard_units(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return outputs.square().mean()


class OneBlock(Stack):
    """As many parameters in one block, which says how it is cut; gathered, it is there whole."""

    def __init__(self) -> None:
        super().__init__()
        wide = BLOCKS * WIDTH // 2
        self.blocks = nn.Sequential(nn.Linear(WIDTH, wide), nn.Tanh(), nn.Linear(wide, WIDTH))

    def shard_units(self) -> list[nn.Module]:
        return [self.blocks]

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {"blocks.0": "colwise", "blocks.2": "rowwise"}


def train(choice: str, directory: str, memory: int | None = None, **arguments: Any) -> dict[str, Any]:
    """Train three updates, on a host of so much memory, and return the parameters' bits and what was chosen."""
    torch.manual_seed(3)
    rows = [torch.randn(WIDTH) for _ in range(32)]
    strategies: dict[str, str | Strategy] = {
        "kept": FSDP2(reshard_after_forward=False), "cut": FSDP2(tensor_parallel=2),
    }  # fmt: skip
    is_cut = arguments.pop("is_cut", False)
    with patch.object(here, "memory_of_host", lambda: memory):
        fit = Fit(
            OneBlock() if is_cut else Stack(),
            rows,
            strategy=strategies.get(choice, choice),
            per_device_train_batch_size=4,
            max_steps=3,
            progress=False,
            output_dir=directory,
            **arguments,
        )
    fit.train()
    whole = [fit.strategy.whole(p.detach()) for p in fit.strategy.named_parameters().values()]
    return {
        "bits": [p.double().sum().item().hex() for p in whole],
        "strategy": repr(fit.strategy),
        "has_choice": fit.choice is not None,
    }


# Of the host's memory each of two ranks has nine twentieths: so many times PARAMETERS. ddp holds 4 of them in any
# case. Shards of weights, gradients and moments are 2; the gradients' half comes as the gathered weights go. Where all
# weights are kept, 1.5 + 1 are there when backward begins, and the first block's gradients, whole (1 / 8) and reduced
# (1 / 16): 2.7. Where two blocks' weights are gathered, 2 + 3 / 8 at the end of backward.
CASES = [
    (1, None, "single", "Single()"),
    (2, None, "ddp", "DDP()"),
    (2, 3.6, "kept", "FSDP2(reshard_after_forward=False)"),
    (2, 2.6, "fsdp2", "FSDP2()"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "room", "named", "strategy"), CASES, ids=[case[2] for case in CASES])
def test_the_run_is_bitwise_that_of_the_named_strategy(
    ranks: dict[int, Ranks], tmp_path: Path, world: int, room: float | None, named: str, strategy: str
) -> None:
    memory = 2**36 if room is None else int(room * PARAMETERS * world / 0.9)
    chosen = ranks[world].run(train, choice="auto", directory=str(tmp_path / "auto"), memory=memory)
    given = ranks[world].run(train, choice=named, directory=str(tmp_path / "named"))
    assert [each["strategy"] for each in chosen] == [strategy] * world
    assert all(each["has_choice"] for each in chosen)
    assert not any(each["has_choice"] for each in given)
    assert [each["bits"] for each in chosen] == [each["bits"] for each in given]
    record = json.loads((tmp_path / "auto" / "run.json").read_text())
    assert record["strategy"]["is"] == strategy
    assert record["choice"]["chosen"]["python"].startswith("strategy=")
    assert "auto" not in (tmp_path / "auto" / "config.yaml").read_text().split("strategy:")[1].splitlines()[0]


@pytest.mark.slow
def test_layers_are_cut_where_nothing_else_fits(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    """Cut layers hold half of all four: 2 times PARAMETERS. When backward begins, weights and moments are there (1.5),
    and a copy of the half that the rank gathers from itself (0.5); its gradients come twice (1): at most 3. Of
    a block that is gathered whole, weights and gradients are there whole: 1.5 + 1 + 1, and the reduced
    gradients.
    """
    memory = int(3.2 * PARAMETERS * 2 / 0.9)
    chosen = ranks[2].run(train, choice="auto", directory=str(tmp_path / "auto"), memory=memory, is_cut=True)
    given = ranks[2].run(
        train, choice="cut", directory=str(tmp_path / "named"), is_cut=True, gradient_accumulation_steps=2
    )
    assert [each["strategy"] for each in chosen] == ["FSDP2(tensor_parallel=2)"] * 2
    assert [each["bits"] for each in chosen] == [each["bits"] for each in given]
    record = json.loads((tmp_path / "auto" / "run.json").read_text())
    assert record["arguments"]["given"]["gradient_accumulation_steps"] == 2
    assert record["samples_per_update"] == 8  # as many as two ranks with samples of their own have


def refused(memory: int, directory: str) -> str:
    """What a Fit says for which nothing fits."""
    with pytest.raises(ValueError) as error:
        train("auto", directory, memory)
    return str(error.value)


@pytest.mark.slow
def test_where_nothing_fits_every_rank_says_so(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    said = ranks[2].run(refused, memory=PARAMETERS, directory=str(tmp_path))
    assert said[0] == said[1]
    assert "no candidate that fits" in said[0] and f"{int(PARAMETERS * 0.9) // 2:,} are there" in said[0]
