"""gradient_accumulation_schedule: updates of another size from an epoch on; counted, weighed and resumed exactly."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stratagem import Callback, Fit, FitArguments
from stratagem.framework.data import make_stream
from stratagem.framework.run.passes import Passes
from stratagem.framework.run.plan import Plan
from stratagem.strategies import Strategy
from tiny import Float64, MakeFit, Numbers, Regressor, Tagger, logs_of, parameters_of, regression_rows, token_rows

SCHEDULES = st.dictionaries(st.integers(1, 6), st.integers(1, 5), max_size=3)


def updates_by_hand(count: int, batch: int, steps: int, schedule: dict[int, int], epoch: int) -> int:
    """Micro-batches of an epoch in groups."""
    for begins in range(1, epoch + 1):
        steps = schedule.get(begins, steps)
    micro_batches = len(range(0, count, batch))
    return len(range(0, micro_batches, steps))


@given(
    count=st.integers(1, 60), batch=st.integers(1, 7), steps=st.integers(1, 5), schedule=SCHEDULES,
    epochs=st.sampled_from([1.0, 0.5, 2.0, 3.25, 7.0]), max_steps=st.integers(1, 90),
)  # fmt: skip
def test_a_run_is_as_long_as_its_epochs_together(
    count: int, batch: int, steps: int, schedule: dict[int, int], epochs: float, max_steps: int
) -> None:
    strategy = Strategy()
    strategy.data_rank, strategy.data_size = 0, 1
    options: dict[str, Any] = {
        "per_device_train_batch_size": batch, "gradient_accumulation_steps": steps,
        "gradient_accumulation_schedule": schedule,
    }  # fmt: skip
    per_epoch = [updates_by_hand(count, batch, steps, schedule, epoch) for epoch in range(100)]
    args = FitArguments(num_train_epochs=epochs, **options)
    settled = Plan.of(args).settled(make_stream(Numbers(count), args, strategy, training=True))
    whole = int(epochs)
    assert settled.args.max_steps == sum(per_epoch[:whole]) + -(-(epochs - whole) * per_epoch[whole] // 1)

    args = FitArguments(max_steps=max_steps, **options)
    settled = Plan.of(args).settled(make_stream(Numbers(count), args, strategy, training=True))
    needed = next(n for n in range(1, 100) if sum(per_epoch[:n]) >= max_steps)
    assert settled.num_train_epochs == needed
    passes = Passes(args, len(range(0, count, batch)))
    for first in range(4):
        expected = next(n for n in range(1, 100) if sum(per_epoch[first : first + n]) >= max_steps)
        assert passes.passes_of(max_steps, first) == expected
        assert passes.updates_between(first, first + 5) == sum(per_epoch[first : first + 5])


class Sizes(Callback):
    """Micro-batches of each update."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def on_step_begin(self, *context: Any, **_: Any) -> None:
        self.found.append(1)

    def on_substep_end(self, *context: Any, **_: Any) -> None:
        self.found[-1] += 1


def make(make_fit: MakeFit, **arguments: Any) -> Fit:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "num_train_epochs": 4.0, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 1, "shuffle": True,
        "gradient_accumulation_schedule": {1: 3, 3: 2}, "logging_steps": 1, "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
    }  # fmt: skip
    return make_fit(Regressor(), regression_rows(20), **{**options, **arguments})


def test_updates_change_their_size_when_an_epoch_begins(make_fit: MakeFit) -> None:
    sizes = Sizes()
    fit = make(make_fit, callbacks=[sizes])
    fit.train()
    # 7 micro-batches an epoch.
    assert sizes.found == [1] * 7 + [3, 3, 1] * 2 + [2, 2, 2, 1]
    assert fit.state.global_step == fit.state.max_steps == 17
    assert logs_of(fit)[-1]["learning_rate"] == pytest.approx(0.1 / 17)  # the schedule knows the run's length


def test_each_update_is_one_mean_over_its_items(make_fit: MakeFit) -> None:
    """Padded tokens; against a loop by hand in double precision."""
    rows = token_rows(20)
    torch.manual_seed(3)
    fit = make_fit(
        Tagger(), rows, num_train_epochs=2.0, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        gradient_accumulation_schedule={1: 5}, precision=Float64(), learning_rate=0.5,
    )  # fmt: skip
    by_hand = Tagger().double()
    by_hand.load_state_dict(fit.module.state_dict())
    fit.train()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.5)
    for size in (4, 10):
        for begin in range(0, 20, size):
            part = rows[begin : begin + size]
            batch = {key: torch.stack([row[key] for row in part]) for key in ("tokens", "labels")}
            optimizer.zero_grad()
            by_hand.loss(by_hand(batch["tokens"]), batch).backward()
            optimizer.step()
    for name, tensor in parameters_of(fit.module).items():
        torch.testing.assert_close(tensor, by_hand.state_dict()[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("step", [3, 7, 8, 9, 10, 14, 15])
def test_it_goes_on_exactly_from_any_epoch(make_fit: MakeFit, step: int) -> None:
    whole = make(make_fit, save_strategy="steps", save_steps=1)
    whole.train()
    again = make(make_fit)
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
    assert logs_of(again) == logs_of(whole)
    expected = parameters_of(whole.module)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parameters_of(again.module).items())


@pytest.mark.parametrize(("step", "length"), [(3, 3 + 4 + 3 * 7), (8, 8 + 4 + 2 * 7), (10, 10 + 2 * 7)])
def test_it_goes_on_with_updates_of_another_size_to_the_end_of_the_epochs(
    make_fit: MakeFit, step: int, length: int
) -> None:
    """From the schedule to none: what is left of the epoch, and the epochs after it, in updates of 3."""
    whole = make(make_fit, save_strategy="steps", save_steps=1)
    whole.train()
    again = make(make_fit, gradient_accumulation_schedule={})
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
    assert (again.state.global_step, again.state.epoch) == (length, 4.0)


def test_a_checkpoint_of_a_schedule_goes_on_with_one_for_larger_micro_batches(make_fit: MakeFit) -> None:
    """The same samples in each update: none is counted anew."""
    options: dict[str, Any] = {"num_train_epochs": 3.0, "save_strategy": "steps", "save_steps": 4}
    first = make(
        make_fit, per_device_train_batch_size=2, gradient_accumulation_steps=2, gradient_accumulation_schedule={1: 4},
        **options,
    )  # fmt: skip
    first.train()
    again = make(
        make_fit, per_device_train_batch_size=4, gradient_accumulation_steps=1, gradient_accumulation_schedule={1: 2},
        **options,
    )  # fmt: skip
    again.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-4")
    for log, other in zip(logs_of(again), logs_of(first), strict=True):
        assert log["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert log["learning_rate"] == other["learning_rate"]


def test_a_schedule_is_written_as_one_likes() -> None:
    found = FitArguments(gradient_accumulation_schedule={8: 1, 4: 2})
    assert list(found.gradient_accumulation_schedule) == [4, 8]
    assert FitArguments(gradient_accumulation_schedule="4=2,8=1") == found  # type: ignore[arg-type]
    assert FitArguments(**json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient_accumulation_schedule": {0: 8, 4: 4}}, "its keys are epochs, counted from 0; the first epoch has"),
        ({"gradient_accumulation_schedule": {"first": 8}}, "its keys are epochs"),
        ({"gradient_accumulation_schedule": {4: 0}}, "its values are micro-batches per update, at least 1"),
        ({"gradient_accumulation_schedule": {4: 1.5}}, "its values are micro-batches per update, at least 1"),
        ({"gradient_accumulation_schedule": [4, 8]}, "must be dict, not list"),
        ({"gradient_accumulation_schedule": {4: 2}, "limit_train_batches": 3}, "by which limit_train_batches counts"),
        ({"gradient_accumulation_schedule": {4: 2}, "auto_find_batch_size": True}, "by which auto_find_batch_size"),
        ({"gradient_accumulation_schedule": {4: 2}, "optim": "lomo", "max_grad_norm": 0}, "LOMO"),
    ],
)
def test_a_schedule_that_cant_work(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="can't work") as caught:
        FitArguments(**arguments)
    assert message in str(caught.value)
