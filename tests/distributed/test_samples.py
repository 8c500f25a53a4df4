"""Which samples an update is made of: the same on any number of ranks, each once an epoch; and how they are weighed."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from stratagem import Callback
from stratagem.framework.module import IGNORED_LABEL
from tiny import RowStream, StopAt
from torch import Tensor, nn
from training import Tagger, make_fit, token_rows, train

pytestmark = pytest.mark.slow

# (ranks, strategy, options, samples per rank, micro-batches), 16 samples an update.
PLACEMENTS: list[tuple[int, str, dict[str, Any], int, int]] = [
    (2, "ddp", {}, 8, 1),
    (2, "ddp", {}, 2, 4),
    (4, "ddp", {}, 2, 2),
    (4, "fsdp2", {"replicas": 2}, 4, 1),
    (2, "tp", {}, 4, 4),
    (4, "fsdp2", {"tensor_parallel": 2}, 2, 4),
]


class Watched(Tagger):
    """Notes the numbers of the samples that count."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: list[list[int]] = []

    def count_items(self, batch: dict[str, Tensor]) -> Any:
        self.counted.append(batch["index"].tolist())
        return super().count_items(batch)


class Updates(Callback):
    """The samples of each update on this rank: those counted between its beginning and its end."""

    def __init__(self) -> None:
        self.updates: list[list[int]] = []

    def on_step_begin(self, *context: Any, fit: Any, **_: Any) -> None:
        fit.module.counted.clear()

    def on_optimizer_step(self, *context: Any, fit: Any, **_: Any) -> None:
        self.updates.append([index for batch in fit.module.counted for index in batch])


def samples_of_updates(
    streamed: bool = False, samples: int = 75, stop: int | None = None, resume: Path | None = None, **arguments: Any
) -> tuple[int, list[list[int]]]:
    """This rank's place among those with other samples, and its samples in each update of two epochs (or from a
    checkpoint on, or up to an update).
    """
    rows = [{**row, "index": torch.tensor(i)} for i, row in enumerate(token_rows(samples))]
    updates = Updates()
    length = {"max_steps": 2 * -(-samples // 16)} if streamed else {"max_steps": -1, "num_train_epochs": 2.0}
    data = RowStream(rows) if streamed else rows
    callbacks = [updates, *([StopAt(stop)] if stop else [])]
    fit = make_fit(Watched(), data, callbacks=callbacks, **{**length, **arguments})
    fit.train(resume_from_checkpoint=resume)
    return fit.strategy.data_rank, updates.updates


def joined(results: list[tuple[int, list[list[int]]]]) -> list[list[int]]:
    """The samples of each update over all ranks. Ranks that share samples must have the same."""
    by_rank: dict[int, list[list[int]]] = {}
    for data_rank, updates in results:
        assert by_rank.setdefault(data_rank, updates) == updates
    return [sorted(itertools.chain(*parts)) for parts in zip(*by_rank.values(), strict=True)]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("world", "strategy", "options", "batch", "accumulation"), PLACEMENTS, ids=str)
def test_updates_hold_the_same_samples(
    ranks: dict[int, Ranks],
    streamed: bool,
    world: int,
    strategy: str,
    options: dict[str, Any],
    batch: int,
    accumulation: int,
) -> None:
    expected = joined([samples_of_updates(streamed, per_device_train_batch_size=16)])
    results = ranks[world].run(
        samples_of_updates,
        streamed=streamed,
        strategy=strategy,
        options=options,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    found = joined(results)
    assert found == expected
    # Two epochs of 4 whole updates and one of 11 samples: every sample once in each.
    assert [len(update) for update in found] == [*[16] * 4, 11] * 2
    for epoch in (found[:5], found[5:]):
        assert sorted(itertools.chain(*epoch)) == list(range(75))
    if not streamed:
        assert found[0] != found[5] and found[0] != list(range(16))  # shuffled, and anew


@pytest.mark.parametrize(("batch", "accumulation", "total"), [(8, 1, 32), (1, 2, 8)])
def test_another_number_of_ranks_goes_on_to_the_end_of_the_epochs(
    ranks: dict[int, Ranks], tmp_path: Path, batch: int, accumulation: int, total: int
) -> None:
    """Three updates of 16 on 2 ranks, then updates of 32 or 8 on 4: the same order, each sample once in each epoch."""
    whole = joined([samples_of_updates(per_device_train_batch_size=1)])
    saving = {"save_strategy": "steps", "save_steps": 3, "output_dir": str(tmp_path), "stop": 3}
    first = ranks[2].run(samples_of_updates, strategy="ddp", per_device_train_batch_size=8, **saving)
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    resume = tmp_path / "checkpoint-3"
    rest = joined(ranks[4].run(samples_of_updates, strategy="fsdp2", resume=resume, **sizes))
    found = [*joined(first)[:3], *rest]  # what stops ranks is agreed in the next update
    ends = [0, *itertools.accumulate(map(len, found))]
    assert ends[-1] == 150
    order = [index for (index,) in whole]
    assert found == [sorted(order[begin:end]) for begin, end in itertools.pairwise(ends)]
    # 27 samples are left of the first epoch, and 75 are the second.
    assert len(rest) == -(-27 // total) + -(-75 // total)


@pytest.mark.parametrize("samples", [1, 2, 5, 17])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_ranks_without_samples(ranks: dict[int, Ranks], strategy: str, samples: int) -> None:
    """The end of an epoch has fewer samples than there are ranks: all stay together, and nothing counts twice."""
    # In order: the row that is left over has labels, and so its update has a loss.
    rows, length = token_rows(samples), {"max_steps": -1, "num_train_epochs": 3.0, "shuffle": False}
    expected = train(data=rows, per_device_train_batch_size=16, **length)
    found = ranks[4].run(train, data=rows, strategy=strategy, per_device_train_batch_size=4, **length)
    assert len(expected["loss"]) == 3 * (1 + samples // 16)
    assert found[0]["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found[0]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


class Masked(Tagger):
    """A masked mean by hand: 0/0 where a micro-batch is all padding, and so is its gradient."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        labels, mask = batch["labels"].flatten(), batch["labels"].flatten() != IGNORED_LABEL
        losses = nn.functional.cross_entropy(outputs.flatten(0, 1), labels.clamp(min=0), reduction="none")
        return (losses * mask).sum() / mask.sum()


class Counted(Tagger):
    """Divides a sum by the items of the whole update itself."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:  # type: ignore[override]
        total = nn.functional.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        return total / num_items_in_batch


@pytest.mark.parametrize("module", [Masked, Counted])
@pytest.mark.parametrize(
    ("world", "strategy", "options", "batch"),
    [
        (4, "ddp", {}, 1),
        (2, "fsdp1", {}, 1),
        (4, "fsdp2", {}, 1),
        (2, "tp", {}, 2),
        (4, "fsdp2", {"tensor_parallel": 2}, 1),
    ],
    ids=str,
)
def test_losses_are_weighed_by_items(
    ranks: dict[int, Ranks], module: type[Tagger], world: int, strategy: str, options: dict[str, Any], batch: int
) -> None:
    """Some micro-batches of one or two samples are all padding (each 7th row is)."""
    expected = train(per_device_train_batch_size=16, max_steps=3, shuffle=False)
    data_ranks = 1 if strategy == "tp" else world // options.get("tensor_parallel", 1)
    found = ranks[world].run(
        train,
        module=module,
        strategy=strategy,
        options=options,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=16 // (batch * data_ranks),
        max_steps=3,
        shuffle=False,
    )
    assert found[0]["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found[0]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


def read_with_workers(directory: Path, **arguments: Any) -> Any:
    return samples_of_updates(samples=37, dataloader_num_workers=1, output_dir=str(directory), **arguments)


def test_worker_processes_keep_the_order(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    expected = joined([samples_of_updates(samples=37, per_device_train_batch_size=16)])
    found = ranks[2].run(read_with_workers, directory=tmp_path, strategy="ddp", per_device_train_batch_size=8)
    assert joined(found) == expected
