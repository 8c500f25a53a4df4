"""The loop: how many updates a run takes, what is in each, what is logged of it, and what it returns."""

import math
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback, Fit, FitArguments, TrainModule, TrainOutput
from stratagem.precision import FP16Mixed
from tiny import (
    Float64,
    MakeFit,
    Numbers,
    NumberStream,
    Regressor,
    StopAt,
    collate,
    logs_of,
    parameters_of,
    regression_rows,
)
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset


class Recorder(TrainModule):
    """Notes which samples each micro-batch holds; its loss is a parameter that no data moves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.micro_batches: list[list[int]] = []

    def forward(self, samples: Tensor) -> Tensor:
        self.micro_batches.append(samples.tolist())
        return self.weight * 1.0

    def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
        return outputs

    def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=args.learning_rate)


class ByUpdate(Callback):
    """Groups what a Recorder noted by update."""

    def __init__(self) -> None:
        self.updates: list[list[list[int]]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        module = context["fit"].module
        self.updates.append(module.micro_batches)
        module.micro_batches = []


def updates_of(make_fit: MakeFit, data: Any, **arguments: Any) -> list[list[list[int]]]:
    """The samples of a run: update by update, micro-batch by micro-batch."""
    watch = ByUpdate()
    make_fit(Recorder(), data, callbacks=[watch], **arguments).train()
    return watch.updates


# How long a run is.


def test_ten_thousand_rows_are_313_batches_and_79_updates(make_fit: MakeFit) -> None:
    sizes = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 4}
    updates = updates_of(make_fit, Numbers(10_000), num_train_epochs=2, **sizes)
    assert len(updates) == 2 * 79
    assert sum(map(len, updates)) == 2 * 313
    assert [len(update) for update in updates[:79]] == [4] * 78 + [1]
    assert len(updates[78][0]) == 10_000 - 312 * 32 == 16
    assert sorted(sample for update in updates[:79] for batch in update for sample in batch) == list(range(10_000))


def test_an_epoch_of_an_unsized_iterable_ends_in_an_update_of_its_left_overs(make_fit: MakeFit) -> None:
    updates = updates_of(
        make_fit, NumberStream(9), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=5
    )
    epoch = [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8]]]
    assert updates == epoch + epoch[:2]


def test_left_over_micro_batches_are_one_mean(make_fit: MakeFit) -> None:
    # 7 rows as 2 + 2 | 2 + 1: the last update is the mean over 3 rows, not the mean of two means.
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(regression_rows(7, dtype=torch.float64))

    module, by_hand = Regressor(), Regressor().double()
    by_hand.load_state_dict(module.state_dict())
    rows = regression_rows(7, dtype=torch.float64)
    for group in (rows[:4], rows[4:]):
        batch = collate(group)
        by_hand.zero_grad()
        (by_hand(batch["x"]) - batch["y"]).square().mean().backward()
        with torch.no_grad():
            for parameter in by_hand.parameters():
                parameter -= 0.1 * parameter.grad
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    make_fit(module, Stream(), precision=Float64(), max_steps=2, **sizes).train()
    torch.testing.assert_close(parameters_of(module), parameters_of(by_hand), rtol=1e-12, atol=1e-13)


def test_max_steps_overrides_the_epochs(make_fit: MakeFit) -> None:
    updates = updates_of(make_fit, Numbers(6), per_device_train_batch_size=2, num_train_epochs=1, max_steps=5)
    assert updates == [[[0, 1]], [[2, 3]], [[4, 5]], [[0, 1]], [[2, 3]]]


@pytest.mark.parametrize(("epochs", "updates"), [(1.0, 4), (1.5, 6), (0.25, 1), (0.3, 2), (2.1, 9)])
def test_fractional_epochs_round_up_to_whole_updates(make_fit: MakeFit, epochs: float, updates: int) -> None:
    fit = make_fit(Recorder(), Numbers(8), per_device_train_batch_size=2, num_train_epochs=epochs)
    assert fit.train().global_step == updates
    assert fit.state.epoch == updates / 4


def test_drop_last_leaves_out_the_short_micro_batch(make_fit: MakeFit) -> None:
    sizes = {"per_device_train_batch_size": 4, "dataloader_drop_last": True, "num_train_epochs": 2}
    assert updates_of(make_fit, Numbers(10), **sizes) == 2 * [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_epoch_is_a_whole_number_at_its_end(make_fit: MakeFit, drop_last: bool) -> None:
    class Epochs(Callback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_epoch_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            self.ends.append(state.epoch)

    watch = Epochs()
    sizes = {"per_device_train_batch_size": 4, "dataloader_drop_last": drop_last, "num_train_epochs": 2}
    make_fit(Recorder(), Numbers(10), callbacks=[watch], **sizes).train()
    assert watch.ends == [1.0, 2.0]


def test_an_iterable_that_can_be_read_only_once_is_refused_in_its_second_epoch(make_fit: MakeFit) -> None:
    class Once(IterableDataset):
        def __init__(self) -> None:
            self.iterator = iter(range(4))

        def __iter__(self) -> Any:
            return self.iterator

    with pytest.raises(ValueError, match=r"train_data gave no batch in epoch 1\..*__iter__ begin anew"):
        make_fit(Recorder(), Once(), per_device_train_batch_size=2, max_steps=5).train()


# The numbers a run is planned with.

SEVEN = ("epochs", "updates_per_epoch", "examples", "samples", "epoch_based", "len_dataloader", "max_steps")


@pytest.mark.parametrize(
    ("arguments", "rows", "expected"),
    [
        # 10,000 rows, batch 32: ceil(10,000 / 32) = 313 batches, ceil(313 / 4) = 79 updates.
        ({"gradient_accumulation_steps": 4, "num_train_epochs": 3}, 10_000, (3, 79, 10_000, 30_000, True, 313, 237)),
        ({"gradient_accumulation_steps": 4, "num_train_epochs": 1.5}, 10_000, (2, 79, 10_000, 15_000, True, 313, 119)),
        ({"gradient_accumulation_steps": 4, "max_steps": 100}, 10_000, (2, 79, 10_000, 12_800, False, 313, 100)),
        ({"gradient_accumulation_steps": 4, "max_steps": 79}, 10_000, (1, 79, 10_000, 10_112, False, 313, 79)),
        ({"dataloader_drop_last": True, "num_train_epochs": 1}, 10_000, (1, 312, 10_000, 10_000, True, 312, 312)),
        # Fewer micro-batches than an update holds: still one update.
        ({"gradient_accumulation_steps": 8, "num_train_epochs": 2}, 40, (2, 1, 40, 80, True, 2, 2)),
        ({"max_steps": 3}, None, (sys.maxsize, 3, 96, 96, False, None, 3)),
    ],
)
def test_set_initial_training_values(
    make_fit: MakeFit, arguments: dict[str, Any], rows: int | None, expected: tuple[Any, ...]
) -> None:
    data = NumberStream(100) if rows is None else Numbers(rows)
    fit = make_fit(Recorder(), data, per_device_train_batch_size=32, **arguments)
    args = FitArguments(per_device_train_batch_size=32, **arguments)
    total = 32 * args.gradient_accumulation_steps
    assert fit.get_total_train_batch_size(args) == total
    values = fit.set_initial_training_values(args, fit.stream, total)
    assert dict(zip(SEVEN, values, strict=True)) == dict(zip(SEVEN, expected, strict=True))
    assert fit.args.max_steps == expected[-1]


def test_epochs_over_data_without_a_length_are_refused(make_fit: MakeFit) -> None:
    with pytest.raises(ValueError, match=r"train_data has no length.*Set max_steps.*Received: max_steps=-1"):
        make_fit(Recorder(), NumberStream(10), num_train_epochs=2)


def test_an_iterable_with_a_length_can_be_counted_in_epochs(make_fit: MakeFit) -> None:
    class Sized(NumberStream):
        def __len__(self) -> int:
            return self.count

    updates = updates_of(make_fit, Sized(5), per_device_train_batch_size=2, num_train_epochs=2)
    assert updates == 2 * [[[0, 1]], [[2, 3]], [[4]]]


def test_one_device_is_a_tensor_parallel_group_of_one(make_fit: MakeFit) -> None:
    assert make_fit(Recorder(), Numbers(2)).get_tp_size() == 1


# What is logged.


def test_the_logged_norm_and_the_clipped_step(make_fit: MakeFit) -> None:
    rows = regression_rows(6, dtype=torch.float64)
    module = Regressor().double()
    before, batch = parameters_of(module), collate(rows)
    loss = (module(batch["x"]) - batch["y"]).square().mean()
    gradients = dict(zip(before, torch.autograd.grad(loss, list(module.parameters())), strict=True))
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    limit = norm / 3
    fit = make_fit(
        module,
        rows,
        precision=Float64(),
        max_grad_norm=limit,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=1,
    )
    fit.train()
    [line] = logs_of(fit)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-12)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-12)
    for name, value in parameters_of(module).items():
        # torch adds 1e-6 to the norm that it divides by.
        expected = before[name] - 0.1 * gradients[name] * limit / (norm + 1e-6)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


def test_no_norm_is_logged_without_clipping(make_fit: MakeFit) -> None:
    fit = make_fit(Regressor(), regression_rows(4), max_steps=1)
    fit.train()
    assert "grad_norm" not in fit.state.log_history[0]


def test_the_learning_rate_logged_is_the_one_the_update_used(make_fit: MakeFit) -> None:
    fit = make_fit(
        Regressor(),
        regression_rows(10),
        lr_scheduler_type="linear",
        warmup_steps=2,
        learning_rate=0.4,
        per_device_train_batch_size=1,
        max_steps=6,
        logging_steps=1,
    )
    fit.train()
    # Warm-up over two updates from 0, then down to 0 after the sixth: the seventh would use 0.
    expected = [0.0, 0.2, 0.4, 0.3, 0.2, 0.1]
    assert [line["learning_rate"] for line in logs_of(fit)] == pytest.approx(expected, abs=1e-12)


def test_the_schedule_moves_the_parameters(make_fit: MakeFit) -> None:
    class Slope(Recorder):
        """The gradient is 1 whatever the data, so an update moves the weight by exactly the learning rate."""

    module = Slope()
    fit = make_fit(module, Numbers(4), precision=Float64(), lr_scheduler_type="cosine", learning_rate=0.5, max_steps=4)
    fit.train()
    rates = [0.5 * 0.5 * (1 + math.cos(math.pi * update / 4)) for update in range(4)]
    assert module.weight.item() == pytest.approx(1.0 - sum(rates), rel=1e-12)


class Squared(Recorder):
    """Loss w^2 / 2 under SGD with rate 0.5: the weight halves each update, the loss is 4^-k / 2."""

    def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
        return outputs.square() / 2


def test_logs_are_means_since_the_last_log_and_the_result_is_the_mean_over_all_updates(make_fit: MakeFit) -> None:
    fit = make_fit(
        Squared(),
        Numbers(8),
        precision=Float64(),
        learning_rate=0.5,
        per_device_train_batch_size=1,
        max_steps=7,
        logging_steps=3,
    )
    result = fit.train()
    losses = [0.5 * 0.25**k for k in range(7)]
    assert [line["step"] for line in logs_of(fit)] == [3, 6, 7]
    means = [sum(losses[:3]) / 3, sum(losses[3:6]) / 3, losses[6]]
    assert [line["loss"] for line in logs_of(fit)] == pytest.approx(means, rel=1e-12)
    assert [line["epoch"] for line in logs_of(fit)] == [3 / 8, 6 / 8, 7 / 8]
    assert isinstance(result, TrainOutput)
    assert result.global_step == 7
    assert result.training_loss == pytest.approx(sum(losses) / 7, rel=1e-12)
    assert result.metrics["train_loss"] == result.training_loss
    assert {"train_runtime", "train_samples_per_second", "total_flos"} < set(result.metrics)
    assert result.metrics["train_steps_per_second"] == pytest.approx(7 / result.metrics["train_runtime"])
    # One sample per update.
    assert result.metrics["train_items_per_second"] == pytest.approx(7 / result.metrics["train_runtime"])


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"logging_strategy": "no"}, []),
        ({"logging_strategy": "epoch"}, [4, 8]),
        ({"logging_steps": 5}, [5, 8]),
        ({"logging_steps": 5, "logging_first_step": True}, [1, 5, 8]),
        ({"logging_steps": 8}, [8]),
    ],
)
def test_when_logs_are_written(make_fit: MakeFit, arguments: dict[str, Any], steps: list[int]) -> None:
    fit = make_fit(Squared(), Numbers(4), per_device_train_batch_size=1, num_train_epochs=2, **arguments)
    result = fit.train()
    assert [line["step"] for line in logs_of(fit)] == steps
    losses = [0.5 * 0.81**k for k in range(8)]  # rate 0.1: the weight shrinks to 0.9 of itself
    assert result.training_loss == pytest.approx(sum(losses) / 8, rel=1e-5)


def test_the_mean_is_right_beyond_the_averages_fold(make_fit: MakeFit) -> None:
    fit = make_fit(Squared(), Numbers(1), precision=Float64(), max_steps=2500, logging_steps=2500, learning_rate=1e-3)
    assert fit.train().training_loss == pytest.approx(sum(0.5 * 0.999 ** (2 * k) for k in range(2500)) / 2500, rel=1e-9)


# Loss scaling.


def test_the_schedule_stays_where_fp16_skips_an_update(make_fit: MakeFit) -> None:
    class Weights(Callback):
        def __init__(self) -> None:
            self.seen: list[dict[str, Tensor]] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            self.seen.append(parameters_of(context["fit"].module))

    watch, module = Weights(), Regressor()
    initial = parameters_of(module)
    fit = make_fit(
        module,
        regression_rows(64),
        callbacks=[watch],
        precision=FP16Mixed(initial_scale=2.0**60),
        lr_scheduler_type="linear",
        learning_rate=0.01,
        max_steps=80,
        logging_steps=1,
        max_grad_norm=1.0,
    )
    fit.train()
    lines = logs_of(fit)
    skipped = fit.state.skipped_updates
    # float16 ends at 65504: a scale of 2^60 overflows, and one of 2^10 doesn't for gradients of about 1.
    assert 40 < skipped < 60
    assert lines[-1]["skipped_updates"] == skipped
    for k in range(skipped):
        assert lines[k]["loss_scale"] == 2.0 ** (59 - k)
        assert lines[k]["learning_rate"] == 0.01
        torch.testing.assert_close(watch.seen[k], initial, rtol=0, atol=0)
    # The first update that counts uses the peak; the schedule moves only then.
    rates = [0.01 * (1 - k / 80) for k in range(80 - skipped)]
    assert [line["learning_rate"] for line in lines[skipped:]] == pytest.approx(rates, rel=1e-9)
    assert not torch.equal(watch.seen[skipped]["head.weight"], initial["head.weight"])
    assert fit.scheduler.last_epoch == 80 - skipped


# Runs after each other, and what a user's stack trace looks like.


def test_a_second_train_begins_anew(make_fit: MakeFit) -> None:
    class Adam(Regressor):
        def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=args.learning_rate)

    arguments = {
        "lr_scheduler_type": "linear",
        "max_steps": 5,
        "logging_steps": 2,
        "per_device_train_batch_size": 2,
        "shuffle": True,
        "learning_rate": 0.01,
    }
    twice, fresh = Adam(), Adam()
    fit = make_fit(twice, regression_rows(9), **arguments)
    first = fit.train()
    fresh.load_state_dict(parameters_of(twice))
    second = fit.train()
    other = make_fit(fresh, regression_rows(9), **arguments)
    expected = other.train()
    assert (first.global_step, second.global_step) == (5, 5)
    assert second.training_loss == expected.training_loss
    assert logs_of(fit) == logs_of(other)
    torch.testing.assert_close(parameters_of(twice), parameters_of(fresh), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Adam])
def test_a_second_train_begins_anew_for_optimizers_with_state_from_the_start(
    make_fit: MakeFit, kind: type[torch.optim.Optimizer]
) -> None:
    class Other(Regressor):
        def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
            return kind(self.parameters(), lr=args.learning_rate)

    twice, by_hand = Other(), Other()
    fit = make_fit(twice, regression_rows(4), max_steps=3, learning_rate=0.01)
    fit.train()
    by_hand.load_state_dict(parameters_of(twice))
    fit.train()
    optimizer, batch = kind(by_hand.parameters(), lr=0.01), collate(regression_rows(4))
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(by_hand(batch["x"]), batch["y"]).backward()
        optimizer.step()
    torch.testing.assert_close(parameters_of(twice), parameters_of(by_hand), rtol=1e-6, atol=1e-7)


def test_a_second_train_begins_with_the_first_loss_scale(make_fit: MakeFit) -> None:
    fit = make_fit(
        Regressor(),
        regression_rows(4),
        precision=FP16Mixed(initial_scale=64.0, growth_interval=2),
        max_steps=4,
        logging_steps=1,
    )
    for _ in range(2):
        fit.train()
        # The scale doubles after two updates without overflow.
        assert [line["loss_scale"] for line in logs_of(fit)] == [64.0, 128.0, 128.0, 256.0]


@pytest.mark.parametrize("event", ["on_substep_end", "on_pre_optimizer_step"])
def test_a_run_that_broke_off_leaves_nothing_to_the_next(make_fit: MakeFit, event: str) -> None:
    class Interrupt(Callback):
        armed = True

        def _interrupt(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            if self.armed and state.global_step == 1:
                self.armed = False
                raise KeyboardInterrupt

    module, fresh = Regressor(), Regressor()
    arguments = {
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "max_grad_norm": 1.0,
    }
    callback = type("Here", (Interrupt,), {event: Interrupt._interrupt})()
    precision = FP16Mixed(initial_scale=8.0)
    fit = make_fit(module, regression_rows(9), precision=precision, callbacks=[callback], **arguments)
    with pytest.raises(KeyboardInterrupt):
        fit.train()
    fresh.load_state_dict(parameters_of(module))
    fit.train()
    make_fit(fresh, regression_rows(9), precision=FP16Mixed(initial_scale=8.0), **arguments).train()
    torch.testing.assert_close(parameters_of(module), parameters_of(fresh), rtol=0, atol=0)


def test_a_trial_changes_fields_for_one_run(make_fit: MakeFit) -> None:
    fit = make_fit(Recorder(), Numbers(8), per_device_train_batch_size=2, num_train_epochs=1)
    assert fit.train().global_step == 4
    assert fit.train(trial={"num_train_epochs": 2.0}).global_step == 8
    assert fit.train(trial={"per_device_train_batch_size": 8}).global_step == 1
    assert fit.train().global_step == 4


def test_a_trial_changes_the_learning_rate(make_fit: MakeFit) -> None:
    fit = make_fit(Regressor(), regression_rows(4), max_steps=1, learning_rate=0.5)
    fit.train()
    fit.train(trial={"learning_rate": 0.25})
    assert fit.state.log_history[0]["learning_rate"] == 0.25


def test_forward_sits_at_most_eight_frames_below_train(make_fit: MakeFit) -> None:
    class Failing(Recorder):
        def forward(self, samples: Tensor) -> Tensor:
            raise RuntimeError("here")

    with pytest.raises(RuntimeError, match="here") as caught:
        make_fit(Failing(), Numbers(4), max_steps=1).train()
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    below = names[names.index("train") + 1 :]
    assert below[-1] == "forward"
    assert len(below) <= 8


def test_a_stopped_run_keeps_what_it_did(make_fit: MakeFit) -> None:
    watch = ByUpdate()
    fit = make_fit(
        Recorder(), Numbers(8), per_device_train_batch_size=2, num_train_epochs=3, callbacks=[watch, StopAt(6)]
    )
    assert fit.train().global_step == 6
    assert len(watch.updates) == 6
    assert fit.state.epoch == 1.5


def test_gradients_are_gone_after_an_update(make_fit: MakeFit) -> None:
    module = Regressor()
    make_fit(module, regression_rows(4), max_steps=2).train()
    assert [parameter.grad for parameter in module.parameters()] == [None] * 4


def test_training_puts_the_module_in_training_mode_and_evaluation_back(make_fit: MakeFit) -> None:
    class Modes(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.modes: list[bool] = []

        def forward(self, x: Tensor) -> Tensor:
            self.modes.append(self.training)
            return super().forward(x)

    module = Modes()
    module.eval()
    rows = regression_rows(4)
    sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4}
    make_fit(module, rows, rows, max_steps=2, eval_strategy="steps", eval_steps=1, **sizes).train()
    assert module.modes == [True, False, True, False]


def test_output_dir_is_untouched_by_a_run_that_writes_nothing(make_fit: MakeFit, tmp_path: Path) -> None:
    make_fit(Regressor(), regression_rows(4), max_steps=2).train()
    assert list(tmp_path.iterdir()) == []


def test_initial_values_of_a_users_own_dataloader(make_fit: MakeFit) -> None:
    fit = make_fit(Recorder(), Numbers(4))
    loader = torch.utils.data.DataLoader(Numbers(10), batch_size=4)
    args = FitArguments(num_train_epochs=2)
    # 10 rows in batches of 4 are 3 batches.
    assert fit.set_initial_training_values(args, loader, 4) == (2, 3, 10, 20, True, 3, 6)


def test_a_fit_without_train_data_says_so(make_fit: MakeFit) -> None:
    with pytest.raises(ValueError, match="no train_data"):
        make_fit(Recorder()).train()


def test_a_dataset_need_not_derive_from_torchs(make_fit: MakeFit) -> None:
    class Plain:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> int:
            if index > 2:
                raise IndexError(index)
            return index

    assert not isinstance(Plain(), Dataset)
    assert updates_of(make_fit, Plain(), per_device_train_batch_size=2, num_train_epochs=1) == [[[0, 1]], [[2]]]


def test_overridden_methods_are_what_the_loop_calls(make_fit: MakeFit, tmp_path: Path) -> None:
    class Doubled(Fit):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(*args, **kwargs)
            return (found[0] * 2, found[1]) if isinstance(found, tuple) else found * 2

    module = Recorder()
    quiet = {"output_dir": str(tmp_path), "progress": False, "loggers": (), "save_strategy": "no"}
    Doubled(
        module, Numbers(4), max_steps=1, learning_rate=0.25, lr_scheduler_type="constant", max_grad_norm=0.0, **quiet
    ).train()
    assert module.weight.item() == 1.0 - 0.25 * 2
