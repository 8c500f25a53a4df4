"""A resumed run equals, bit for bit, the run that never stopped: parameters, optimizer, random state and logs."""

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from stratagem import Callback, Fit, FitArguments, TrainModule
from stratagem.framework import random_state
from stratagem.framework.data import make_stream
from stratagem.precision import FP16Mixed
from stratagem.strategies import Strategy
from tiny import (
    Dropping,
    Float64,
    MakeFit,
    NoisyRows,
    Regressor,
    RowStream,
    StopAt,
    Tagger,
    logs_of,
    parameters_of,
    regression_rows,
    token_rows,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

# 22 rows in micro-batches of 4 are six, the last of 2 rows: three updates of 2 an epoch.
SIZES = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 3,
    "logging_steps": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "learning_rate": 0.02,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "shuffle": True,
    "loggers": ["jsonl"],
}
UPDATES = 9


def optimizer_state(fit: Fit) -> list[Any]:
    """Everything the optimizer holds, in the order of its groups."""
    held: list[Any] = [{k: v for k, v in group.items() if k != "params"} for group in fit.optimizer.param_groups]
    for group in fit.optimizer.param_groups:
        for parameter in group["params"]:
            state = fit.optimizer.state[parameter]
            held.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()})
    return held


def everything(fit: Fit) -> dict[str, Any]:
    """What two runs that did the same must agree in."""
    return {
        "parameters": parameters_of(fit.module),
        "optimizer": optimizer_state(fit),
        "schedule": fit.scheduler.state_dict(),
        "loss scale": fit.strategy.precision.state_dict(),
        "logs": logs_of(fit),
        "losses": (fit.state.train_loss_sum, fit.state.train_loss_count, fit.state.items_seen),
        "progress": (fit.state.global_step, fit.state.epoch, fit.state.skipped_updates, fit.run.epoch_index),
    }


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal, tensors bit for bit."""
    assert type(found) is type(expected), where
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), f"{where}: {found} is not {expected}"
    elif isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}/{i}")
    else:
        both_nan = isinstance(expected, float) and math.isnan(expected) and math.isnan(found)  # an overflow's norm
        assert both_nan or found == expected, f"{where}: {found} is not {expected}"


def lines_of(directory: Path) -> list[dict[str, Any]]:
    """What was logged, without the totals of the run, which tell its time."""
    return [line for line in tiny.lines_of(directory / "log.jsonl") if "train_runtime" not in line]


def check_resume(
    make_fit: MakeFit,
    tmp_path: Path,
    stop: int,
    data: Callable[[], Any],
    module: Callable[[], TrainModule] = Dropping,
    compare_random: bool = True,
    **arguments: Any,
) -> Fit:
    """Run to the end; run to ``stop`` and save; resume that in objects of their own; compare the two ends."""

    def make(name: str, seed: int, **more: Any) -> Fit:
        random.seed(seed)
        torch.manual_seed(seed)
        return make_fit(module(), data(), **{**SIZES, "output_dir": str(tmp_path / name), **arguments, **more})

    unbroken = make("unbroken", seed=1)
    unbroken.train()
    expected, expected_random = everything(unbroken), random_state.capture()

    saving = {"save_strategy": "steps", "save_steps": stop}
    broken = make("broken", seed=1, **{**saving, "callbacks": [StopAt(stop), *arguments.get("callbacks", ())]})
    broken.train()
    assert broken.state.global_step == stop

    # Another seed, so that weights and random state must come from the checkpoint.
    resumed = make("resumed", seed=2)
    result = resumed.train(resume_from_checkpoint=tmp_path / "broken" / f"checkpoint-{stop}")
    assert_same(everything(resumed), expected)
    assert result.training_loss == unbroken.state.train_loss_sum / unbroken.state.train_loss_count
    if compare_random:
        assert random_state.capture() == expected_random
    after = [line for line in lines_of(tmp_path / "unbroken") if line["step"] > stop]
    begin, *rest = lines_of(tmp_path / "resumed")
    assert begin == {"step": stop, "event": "resume", "max_steps": UPDATES}
    assert rest == after
    return resumed


@pytest.mark.parametrize("stop", range(1, UPDATES + 1))
def test_everywhere_in_a_run(make_fit: MakeFit, tmp_path: Path, stop: int) -> None:
    # 3 and 6 are ends of epochs; odd ones lie between two logs; 9 is the end of the run.
    check_resume(make_fit, tmp_path, stop, lambda: regression_rows(22))


def test_a_checkpoint_written_in_the_background(make_fit: MakeFit, tmp_path: Path) -> None:
    # Training goes on while it is written: what is written must be the moment of the save.
    options = {**SIZES, "loggers": (), "save_strategy": "steps", "save_steps": 2, "async_save": True}
    torch.manual_seed(1)
    whole = make_fit(Dropping(), NoisyRows(22), **options)
    whole.train()
    for step in (2, 4, 6):
        resumed = make_fit(Dropping(), NoisyRows(22), **{**options, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=tmp_path / "output" / f"checkpoint-{step}")
        assert_same(everything(resumed), everything(whole))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [4, 6])
def test_randomness_inside_the_dataset(make_fit: MakeFit, tmp_path: Path, workers: int, stop: int) -> None:
    check_resume(make_fit, tmp_path, stop, lambda: NoisyRows(22), dataloader_num_workers=workers)


@pytest.mark.slow  # where the collector ends such workers, each is waited for up to five seconds, in the next test
def test_workers_that_stay_between_epochs(make_fit: MakeFit, tmp_path: Path) -> None:
    options = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 1}
    check_resume(make_fit, tmp_path, 4, lambda: NoisyRows(22), **options)


@pytest.mark.parametrize("stop", [2, 5])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision(make_fit: MakeFit, tmp_path: Path, precision: str, stop: int) -> None:
    check_resume(make_fit, tmp_path, stop, lambda: regression_rows(22), precision=precision)


@pytest.mark.parametrize("stop", [2, 3, 5, 7])
def test_a_loss_scale_that_moves(make_fit: MakeFit, tmp_path: Path, stop: int) -> None:
    # The first updates overflow; after two without overflow the scale doubles, and overflows again.
    resumed = check_resume(
        make_fit,
        tmp_path,
        stop,
        lambda: regression_rows(22),
        precision=FP16Mixed(initial_scale=2.0**22, growth_interval=2),
        logging_steps=1,
    )
    scales = [line["loss_scale"] for line in logs_of(resumed)]
    assert any(b < a for a, b in itertools.pairwise(scales))
    assert any(b > a for a, b in itertools.pairwise(scales))


def test_padded_labels_and_plain_sgd(make_fit: MakeFit, tmp_path: Path) -> None:
    check_resume(make_fit, tmp_path, 4, lambda: token_rows(22), module=Tagger)


class BufferedShuffle(IterableDataset):
    """Draws from Python's generator while it is read, as stream libraries do."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        waiting: list[Any] = []
        for row in self.rows if info is None else self.rows[info.id :: info.num_workers]:
            waiting.append(row)
            if len(waiting) > 5:
                yield waiting.pop(random.randrange(len(waiting)))
        random.shuffle(waiting)
        yield from waiting


ITERABLES = {
    "in order": lambda: RowStream(regression_rows(22)),
    "shuffled as it begins": lambda: RowStream(regression_rows(22), shuffle=True),
    "shuffled as it goes": lambda: BufferedShuffle(regression_rows(22)),
}


@pytest.mark.parametrize("stop", [1, 3, 5, 6])
@pytest.mark.parametrize("kind", ITERABLES)
def test_iterable_datasets(make_fit: MakeFit, tmp_path: Path, kind: str, stop: int) -> None:
    check_resume(make_fit, tmp_path, stop, ITERABLES[kind], max_steps=UPDATES)


@pytest.mark.parametrize("stop", [5, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (1, 3, 6))])
@pytest.mark.parametrize("kind", ["in order", "shuffled as it goes"])  # as it begins, each worker draws an order
def test_iterable_datasets_with_workers(make_fit: MakeFit, tmp_path: Path, kind: str, stop: int) -> None:
    check_resume(make_fit, tmp_path, stop, ITERABLES[kind], dataloader_num_workers=2, max_steps=UPDATES)


class EveryOther(BatchSampler):
    """Batches of a sampler of its own kind, so that its order can't be made by us."""


def shuffling_loader(workers: int = 0) -> DataLoader:
    return DataLoader(NoisyRows(22), batch_size=4, shuffle=True, num_workers=workers)


def loader_with_a_generator(workers: int = 0) -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    return DataLoader(NoisyRows(22), batch_size=4, shuffle=True, generator=generator, num_workers=workers)


def loader_with_a_weighted_sampler(workers: int = 0) -> DataLoader:
    sampler = WeightedRandomSampler([1.0] * 11 + [2.0] * 11, 22)
    return DataLoader(NoisyRows(22), batch_size=4, sampler=sampler, num_workers=workers)


def loader_with_a_batch_sampler(workers: int = 0) -> DataLoader:
    data = NoisyRows(22)
    sampler = EveryOther(RandomSampler(data), 4, drop_last=False)
    return DataLoader(data, batch_sampler=sampler, num_workers=workers)


LOADERS = [shuffling_loader, loader_with_a_generator, loader_with_a_weighted_sampler, loader_with_a_batch_sampler]


@pytest.mark.parametrize("stop", [1, 3, 5, 6])
@pytest.mark.parametrize("loader", LOADERS)
def test_ready_loaders(make_fit: MakeFit, tmp_path: Path, loader: Callable[[], DataLoader], stop: int) -> None:
    check_resume(make_fit, tmp_path, stop, loader)


@pytest.mark.parametrize("stop", [6, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("loader", LOADERS)
def test_ready_loaders_with_workers(
    make_fit: MakeFit, tmp_path: Path, loader: Callable[[int], DataLoader], stop: int
) -> None:
    # Read ahead by how many batches the workers have in flight: the main process's own draws stay in step.
    check_resume(make_fit, tmp_path, stop, lambda: loader(2))


@pytest.mark.parametrize("data", [lambda: NoisyRows(22), shuffling_loader, loader_with_a_generator])
def test_checkpoints_at_the_end_of_epochs(make_fit: MakeFit, tmp_path: Path, data: Callable[[], Any]) -> None:
    def make(name: str, **more: Any) -> Fit:
        torch.manual_seed(len(name))
        return make_fit(Dropping(), data(), **{**SIZES, "output_dir": str(tmp_path / name), **more})

    whole = make("whole", save_strategy="epoch")
    whole.train()
    assert sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint-9",
    ]
    for step in (3, 6):
        resumed = make(f"resumed-{step}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(everything(resumed), everything(whole))


class Evaluated(Callback):
    """Asks for an evaluation at odd moments: it must not move the run's random state in one run and not in another."""

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        control.should_evaluate = state.global_step % 4 == 1


def test_evaluation_on_the_way(make_fit: MakeFit, tmp_path: Path) -> None:
    held_out = NoisyRows(6)

    def make(name: str, **more: Any) -> Fit:
        torch.manual_seed(len(name))
        options = {**SIZES, "output_dir": str(tmp_path / name), "callbacks": [Evaluated()], **more}
        return make_fit(Dropping(), NoisyRows(22), held_out, **options)

    whole = make("whole", save_strategy="steps", save_steps=4)
    whole.train()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-4")
    assert_same(everything(resumed), everything(whole))
    assert sum("eval_loss" in line for line in whole.state.log_history) == 3


class WithOptimizer(Dropping):
    """Another optimizer over two groups with options of their own; the first layer's bias is frozen."""

    def __init__(self, make_optimizer: Callable[..., Optimizer]) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer
        self.first.bias.requires_grad_(False)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.temperature

    def configure_optimizer(self, args: FitArguments) -> Optimizer:
        head = [*self.head.parameters(), self.temperature]
        known = {id(p) for p in head}
        rest = [p for p in self.parameters() if id(p) not in known and p.requires_grad]
        return self.make_optimizer([{"params": rest}, {"params": head, "lr": 0.003}], lr=args.learning_rate)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True),
    "plain sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr),
    "adagrad": lambda groups, lr: torch.optim.Adagrad(groups, lr=lr),
    "rmsprop": lambda groups, lr: torch.optim.RMSprop(groups, lr=lr, momentum=0.5, centered=True),
    "adam amsgrad": lambda groups, lr: torch.optim.Adam(groups, lr=lr, amsgrad=True),
    "nadam": lambda groups, lr: torch.optim.NAdam(groups, lr=lr),
    "adamax": lambda groups, lr: torch.optim.Adamax(groups, lr=lr),
    "adafactor": lambda groups, lr: torch.optim.Adafactor(groups, lr=lr),
    "asgd": lambda groups, lr: torch.optim.ASGD(groups, lr=lr),
    "fused adamw": lambda groups, lr: torch.optim.AdamW(groups, lr=lr, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(make_fit: MakeFit, tmp_path: Path, optimizer: str) -> None:
    resumed = check_resume(
        make_fit, tmp_path, 4, lambda: regression_rows(22), module=lambda: WithOptimizer(OPTIMIZERS[optimizer])
    )
    assert resumed.module.first.bias.grad is None


class Scheduled(Dropping):
    """Another schedule."""

    def __init__(self, make_schedule: Callable[[Optimizer], LRScheduler]) -> None:
        super().__init__()
        self.make_schedule = make_schedule

    def configure_scheduler(self, optimizer: Optimizer, args: FitArguments) -> LRScheduler:
        return self.make_schedule(optimizer)


SCHEDULES: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "multi step": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, milestones=[2, 6], gamma=0.3),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=UPDATES + 1),
    "warm restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.001, 0.02, step_size_up=3, cycle_momentum=False),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8),
    "one after another": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=3),
            torch.optim.lr_scheduler.MultiStepLR(o, milestones=[2, 3]),
        ],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("stop", [2, 5])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(make_fit: MakeFit, tmp_path: Path, schedule: str, stop: int) -> None:
    check_resume(make_fit, tmp_path, stop, lambda: regression_rows(22), module=lambda: Scheduled(SCHEDULES[schedule]))


def test_resuming_a_finished_run_does_nothing(make_fit: MakeFit, tmp_path: Path) -> None:
    first = make_fit(Dropping(), NoisyRows(22), **SIZES, save_strategy="steps")
    expected = first.train()
    again = make_fit(Dropping(), NoisyRows(22), **SIZES, save_strategy="steps")
    found = again.train(resume_from_checkpoint=True)
    assert (found.global_step, found.training_loss) == (expected.global_step, expected.training_loss)
    assert_same(everything(again), everything(first))


def test_a_finished_run_can_be_made_longer(make_fit: MakeFit, tmp_path: Path) -> None:
    # With a constant rate, three epochs and then two more are five.
    options = {**SIZES, "lr_scheduler_type": "constant", "warmup_steps": 0}
    five = make_fit(Dropping(), NoisyRows(22), **{**options, "num_train_epochs": 5})
    initial = parameters_of(five.module)
    five.train()
    module = Dropping()
    module.load_state_dict(initial)
    make_fit(module, NoisyRows(22), **{**options, "save_strategy": "steps", "loggers": ()}).train()
    longer = make_fit(Dropping(), NoisyRows(22), **{**options, "num_train_epochs": 5})
    assert longer.train(resume_from_checkpoint=True).global_step == 15
    assert_same(parameters_of(longer.module), parameters_of(five.module))
    assert_same(optimizer_state(longer), optimizer_state(five))


def test_resuming_twice(make_fit: MakeFit, tmp_path: Path) -> None:
    def make(*callbacks: Callback) -> Fit:
        torch.manual_seed(len(callbacks))
        return make_fit(Dropping(), NoisyRows(22), callbacks=callbacks, save_strategy="steps", save_steps=1, **SIZES)

    torch.manual_seed(1)
    unbroken = make_fit(Dropping(), NoisyRows(22), **{**SIZES, "output_dir": str(tmp_path / "unbroken")})
    unbroken.train()
    make(StopAt(2)).train(resume_from_checkpoint=True)  # nothing is there yet: it begins anew
    make(StopAt(5), StopAt(99)).train(resume_from_checkpoint=True)
    last = make()
    last.train(resume_from_checkpoint=True)
    assert_same(everything(last), everything(unbroken))


def test_an_iterable_that_is_shared_for_it_goes_on_with_other_workers(make_fit: MakeFit, tmp_path: Path) -> None:
    class Whole(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter(regression_rows(48))

    def made(name: str, workers: int, *callbacks: Callback) -> Fit:
        torch.manual_seed(3)
        return make_fit(
            Regressor(), Whole(), callbacks=callbacks, dataloader_num_workers=workers, max_steps=6,
            per_device_train_batch_size=4, save_strategy="steps", save_steps=3, output_dir=str(tmp_path / name),
        )  # fmt: skip

    whole, cut = made("whole", 0), made("cut", 2, StopAt(3))
    whole.train()
    cut.train()
    again = made("cut", 0)
    again.train(resume_from_checkpoint=True)
    assert logs_of(again) == logs_of(whole)


def test_a_run_is_the_same_whatever_was_drawn_before_it(make_fit: MakeFit, tmp_path: Path) -> None:
    ends = []
    for draws in (0, 100):
        torch.manual_seed(1)
        module = Dropping()
        fit = make_fit(module, NoisyRows(22), **{**SIZES, "output_dir": str(tmp_path / str(draws))})
        torch.rand(draws)
        [random.random() for _ in range(draws)]
        fit.train()
        ends.append(everything(fit))
    assert_same(ends[0], ends[1])
    other = make_fit(module, NoisyRows(22), **{**SIZES, "seed": 7, "output_dir": str(tmp_path / "other")})
    other.train()
    assert other.state.log_history != ends[0]["logs"]


def test_a_run_after_a_resumed_finished_one_begins_anew(make_fit: MakeFit, tmp_path: Path) -> None:
    options = {**SIZES, "save_strategy": "steps", "loggers": ()}
    make_fit(Dropping(), NoisyRows(22), **options).train()
    fit, fresh = (make_fit(Dropping(), NoisyRows(22), **{**options, "save_strategy": "no"}) for _ in range(2))
    fit.train(resume_from_checkpoint=True)
    fresh.module.load_state_dict(parameters_of(fit.module))
    fit.train()
    fresh.train()
    assert_same(everything(fit), everything(fresh))


def test_another_split_into_micro_batches_goes_on_with_the_same_global_batches(
    make_fit: MakeFit, tmp_path: Path
) -> None:
    # Two updates of 8 before the checkpoint; the short group of 6 and the next epoch after it.
    def make(size: int, accumulation: int, *callbacks: Callback, **more: Any) -> Fit:
        torch.manual_seed(1)
        return make_fit(
            Tagger(),
            token_rows(22),
            precision=Float64(),
            shuffle=True,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=2,
            callbacks=callbacks,
            **more,
        )

    whole = make(8, 1)
    whole.train()
    make(8, 1, StopAt(2), save_strategy="steps", save_steps=2).train()
    for split in ((4, 2), (2, 4), (1, 8)):
        resumed = make(*split)
        assert resumed.train(resume_from_checkpoint=tmp_path / "output" / "checkpoint-2").global_step == 6
        torch.testing.assert_close(parameters_of(resumed.module), parameters_of(whole.module), rtol=1e-12, atol=1e-13)


class Noting(Tagger):
    """Notes the numbers of the samples that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        self.seen += batch["index"].tolist()
        return super().loss(outputs, batch)


@pytest.mark.parametrize("split", [(8, 2), (4, 1), (3, 1), (22, 1)])
@pytest.mark.parametrize("stop", [2, 3, 4, 7])
@pytest.mark.parametrize("length", [{"num_train_epochs": 3}, {"num_train_epochs": 2.5}, {"max_steps": 9}])
def test_another_global_batch_goes_on_at_the_right_sample_to_the_right_end(
    make_fit: MakeFit, tmp_path: Path, split: tuple[int, int], stop: int, length: dict[str, Any]
) -> None:
    """Updates of 8, then of 16, 4, 3 or 22: no sample twice and none left out, up to the end that was asked for."""
    rows = [{**row, "index": torch.tensor(i)} for i, row in enumerate(token_rows(22))]

    def make(size: int, accumulation: int, **more: Any) -> Fit:
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        return make_fit(Noting(), rows, shuffle=True, lr_scheduler_type="linear", **{**sizes, **length, **more})

    first = make(4, 2, callbacks=[StopAt(stop)], save_strategy="steps", save_steps=stop)
    first.train()
    resumed = make(*split)
    steps = resumed.train(resume_from_checkpoint=tmp_path / "output" / f"checkpoint-{stop}").global_step
    whole = make(4, 2, num_train_epochs=12, max_steps=-1)
    whole.train()
    seen = first.module.seen + resumed.module.seen
    assert seen == whole.module.seen[: len(seen)]
    if "max_steps" in length:
        assert steps == 9
    elif length["num_train_epochs"] == 3:
        assert len(seen) == 66
    else:  # to the end of the update that the half epoch ends in
        total = split[0] * split[1]
        assert 0 <= len(seen) - 55 < total
    # The schedule ends where the run does.
    assert resumed.scheduler.get_last_lr()[0] == pytest.approx(0.0, abs=1e-12)
    # Asked to begin anew, the same Fit has the length of a run of its own.
    resumed.module.seen.clear()
    assert resumed.train().global_step == make(*split).train().global_step


class Huge(torch.utils.data.Dataset):
    """Ten million rows that are made when they are asked for, and counts how many were."""

    def __init__(self) -> None:
        self.reads: list[int] = []

    def __len__(self) -> int:
        return 10_000_000

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.reads.append(index)
        return {"x": torch.full((3,), index / 1e7), "y": torch.ones(1)}


@pytest.mark.parametrize("shuffle", [True, False])
def test_nothing_is_read_again_to_resume_in_ten_million_rows(make_fit: MakeFit, tmp_path: Path, shuffle: bool) -> None:
    options: dict[str, Any] = {"shuffle": shuffle, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole, data = Huge(), Huge()
    make_fit(Regressor(), whole, **options).train()
    path = tmp_path / "output" / "checkpoint-2"
    began = time.perf_counter()
    fit = make_fit(Regressor(), data, **options)
    fit.train(resume_from_checkpoint=path)
    # The first and the last sample tell this dataset from another, once a run that saves and once more to compare.
    known_by = data.reads[:4]
    assert {*known_by} <= {0, 9_999_999}
    assert data.reads[len(known_by) :] == whole.reads[-16:]
    assert len(data.reads) == 20
    assert time.perf_counter() - began < 10.0  # drawing the order takes half a second; reading would take minutes


def test_a_position_far_into_ten_million_rows_is_a_jump() -> None:
    data = Huge()
    for shuffle in (True, False):
        stream = make_stream(data, FitArguments(shuffle=shuffle), Strategy(), training=True)
        stream.load_state_dict({"position": 9_000_000})
        next(stream.epoch(0))
        assert len(data.reads) == 8
        order = (
            torch.randperm(10_000_000, generator=torch.Generator().manual_seed(42)) if shuffle else range(10_000_000)
        )
        assert data.reads == [int(index) for index in order[9_000_000:9_000_008]]
        data.reads.clear()


def test_a_plateau_schedule_goes_on_waiting_where_it_stood(make_fit: MakeFit, tmp_path: Path) -> None:
    """With a rate that changes nothing, every evaluation but the first is a plateau; each third of them divides."""
    options: dict[str, Any] = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 2, "factor": 0.1, "eps": 0.0},
        "eval_strategy": "steps",
        "eval_steps": 1,
        "learning_rate": 1e-12,
        "logging_steps": 1,
        "max_steps": 8,
    }

    def rates(fit: Fit) -> list[float]:
        return [line["learning_rate"] for line in fit.state.log_history if "learning_rate" in line]

    rows = regression_rows(4)
    first = make_fit(Regressor(), rows, rows, save_strategy="steps", save_steps=3, callbacks=[StopAt(3)], **options)
    first.train()
    resumed = make_fit(Regressor(), rows, rows, **options)
    resumed.train(resume_from_checkpoint=tmp_path / "output" / "checkpoint-3")
    assert rates(resumed) == pytest.approx([1e-12] * 4 + [1e-13] * 3 + [1e-14])
