"""Modules that are trained in turns: each with a loss, an optimizer and a schedule of its own."""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Average, Callback, Fit, FitArguments, TrainModule, Turn
from stratagem.framework.checkpoint import CheckpointError
from stratagem.framework.run.transaction import SkippedUpdatesError
from stratagem.framework.turns import matches
from tiny import CLASSES, Elsewhere, MakeFit, Regressor, token_rows
from torch import Tensor, nn

FEATURES, NOISE, BATCH = 4, 3, 6
Rows = list[dict[str, Tensor]]


class Pair(TrainModule):
    """A generator of points and the critic that tells them from the data's, with a gradient penalty (WGAN-GP)."""

    every = 5
    options: dict[str, dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.critic = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 1))
        self.generator = nn.Sequential(nn.Linear(NOISE, 16), nn.Tanh(), nn.Linear(16, FEATURES))

    def turns(self) -> Sequence[Turn]:
        own: dict[str, dict[str, Any]] = {
            "critic": {"optim": "adam", "learning_rate": 2e-3},
            "generator": {"optim": "sgd", "learning_rate": 1e-2, "every": self.every},
        }
        return [
            Turn("critic", self.critic_loss, "critic", **{**own["critic"], **self.options.get("critic", {})}),
            Turn(
                "generator",
                self.generator_loss,
                **{"moves": "generator", **own["generator"], **self.options.get("generator", {})},
            ),
        ]

    def critic_loss(self, batch: dict[str, Tensor]) -> Any:
        real, fake = batch["real"], self.generator(batch["noise"])
        between = (batch["mix"] * real + (1 - batch["mix"]) * fake.detach()).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        return {"loss": self.critic(fake).mean() - self.critic(real).mean() + 10 * penalty, "penalty": penalty}

    def generator_loss(self, batch: dict[str, Tensor]) -> Any:
        return -self.critic(self.generator(batch["noise"])).mean()


def rows(count: int) -> Rows:
    generator = torch.Generator().manual_seed(8)
    return [
        {
            "real": torch.randn(FEATURES, generator=generator) + 2.0,
            "noise": torch.randn(NOISE, generator=generator),
            "mix": torch.rand(1, generator=generator),
        }
        for _ in range(count)
    ]


def in_batches(data: Rows) -> Rows:
    return [
        {name: torch.stack([row[name] for row in data[first : first + BATCH]]) for name in data[0]}
        for first in range(0, len(data), BATCH)
    ]


def poisoned(count: int, *batches: int) -> Rows:
    """Rows of which one in each of these batches (from 0) has a NaN in what the critic alone sees."""
    found = rows(count)
    for batch in batches:
        found[batch * BATCH] = {**found[batch * BATCH], "real": torch.full((FEATURES,), torch.nan)}
    return found


class Steps(Callback):
    """Notes each step: (update, turn, the names of the parameters that have a gradient)."""

    def __init__(self) -> None:
        self.made: list[tuple[int, str]] = []
        self.with_gradients: dict[str, set[str]] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        fit, turn = context["fit"], context["turn"]
        self.made.append((state.global_step, turn))
        self.with_gradients[turn] = {n for n, p in fit.module.named_parameters() if p.grad is not None}


def logs_of(fit: Fit) -> list[dict[str, Any]]:
    return [log for log in fit.state.log_history if "loss" in log and "train_loss" not in log]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def keep_weights(fit: Fit) -> list[dict[str, Tensor]]:
    """Have a Fit keep its module's weights after each update, in the list that is returned."""
    seen: list[dict[str, Tensor]] = []

    class Watch(Callback):
        def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            seen.append(weights_of(fit.module))

    fit.add_callback(Watch())
    return seen


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def by_hand(module: Pair, batches: Rows, rounds: int, max_norm: float) -> list[list[float]]:
    """A loop as one writes it: the losses of each round, the critic's five and the generator's."""
    critic = torch.optim.Adam(module.critic.parameters(), lr=2e-3, fused=True)
    generator = torch.optim.SGD(module.generator.parameters(), lr=1e-2)
    found = []
    for number in range(rounds):
        losses = []
        module.generator.requires_grad_(False)
        for batch in batches[5 * number : 5 * number + 5]:
            loss = module.critic_loss(batch)["loss"]
            loss.backward()
            if max_norm:
                nn.utils.clip_grad_norm_(module.critic.parameters(), max_norm)
            critic.step()
            critic.zero_grad()
            losses.append(loss.item())
        module.generator.requires_grad_(True)
        module.critic.requires_grad_(False)
        loss = module.generator_loss(batch)
        loss.backward()
        if max_norm:
            nn.utils.clip_grad_norm_(module.generator.parameters(), max_norm)
        generator.step()
        generator.zero_grad()
        module.critic.requires_grad_(True)
        found.append([*losses, loss.item()])
    return found


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_fifty_rounds_are_those_of_a_loop_by_hand(make_fit: MakeFit, max_norm: float) -> None:
    data, module = rows(250 * BATCH), Pair()
    expected = copy.deepcopy(module)
    fit = make_fit(
        module, data, per_device_train_batch_size=BATCH, max_steps=50, max_grad_norm=max_norm, logging_steps=1
    )
    fit.train()
    losses = by_hand(expected, in_batches(data), 50, max_norm)
    assert_same(weights_of(module), weights_of(expected))
    logs = logs_of(fit)
    assert len(logs) == fit.state.global_step == 50 and fit.state.items_seen == 250 * BATCH
    for log, (*critic, generator) in zip(logs, losses, strict=True):
        assert log["loss_critic"] == pytest.approx(sum(critic) / 5, rel=1e-6)
        assert log["loss_generator"] == pytest.approx(generator, rel=1e-6)
        assert log["loss"] == pytest.approx(sum(critic) / 5 + generator, rel=1e-5)
        assert ("grad_norm_critic" in log) == ("grad_norm_generator" in log) == bool(max_norm)
        assert (log["learning_rate_critic"], log["learning_rate_generator"]) == (2e-3, 1e-2)
        assert log["penalty"] > 0


def test_a_turn_is_made_on_each_kth_batch_and_moves_its_own_alone(make_fit: MakeFit) -> None:
    class Three(Pair):
        every = 2

        def turns(self) -> Sequence[Turn]:
            bias = Turn("shift", self.shift_loss, "shift", every=3, optim="sgd")
            return [*super().turns(), bias]

        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(FEATURES))

        def shift_loss(self, batch: dict[str, Tensor]) -> Tensor:
            return (batch["real"] - self.shift).square().mean()

    steps = Steps()
    fit = make_fit(Three(), rows(12 * BATCH), per_device_train_batch_size=BATCH, max_steps=2, callbacks=[steps])
    fit.train()
    both, all_three = ["critic", "generator"], ["critic", "generator", "shift"]
    round_of_six = ["critic", *both, "critic", "shift", *both, "critic", *all_three]
    assert steps.made == [(0, turn) for turn in round_of_six] + [(1, turn) for turn in round_of_six]
    names = {name for name, _ in fit.module.named_parameters()}
    for turn, found in steps.with_gradients.items():
        assert found == {name for name in names if name.startswith(turn)}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in fit.module.parameters())


def test_counts_are_rounds(make_fit: MakeFit) -> None:
    fit = make_fit(
        Pair(), rows(23 * BATCH + 1), per_device_train_batch_size=BATCH, gradient_accumulation_steps=2,
        num_train_epochs=2, logging_steps=1, lr_scheduler_type="linear",
    )  # fmt: skip
    assert fit.get_total_train_batch_size(fit.args) == 2 * 5 * BATCH
    fit.train()
    # An epoch has 24 micro-batches, 12 batches of 2: two rounds of 5, and one of the 2 that are left.
    assert fit.state.global_step == fit.state.max_steps == 6 and fit.state.epoch == 2.0
    rates = [log["learning_rate_critic"] for log in logs_of(fit)]
    assert rates == pytest.approx([2e-3 * (1 - update / 6) for update in range(6)])
    assert fit.state.items_seen == 2 * (23 * BATCH + 1)


def test_a_round_that_the_data_cuts_short_makes_each_turn(make_fit: MakeFit) -> None:
    steps, data, module = Steps(), rows(2 * BATCH + 2), Pair()
    expected = copy.deepcopy(module)
    fit = make_fit(module, data, per_device_train_batch_size=BATCH, num_train_epochs=1, callbacks=[steps])
    fit.train()
    assert [turn for _, turn in steps.made] == ["critic"] * 3 + ["generator"] and fit.state.global_step == 1
    critic = torch.optim.Adam(expected.critic.parameters(), lr=2e-3, fused=True)
    for batch in in_batches(data):
        critic.zero_grad()
        expected.critic_loss(batch)["loss"].backward()
        critic.step()
    expected.zero_grad()
    expected.generator_loss(batch).backward()
    torch.optim.SGD(expected.generator.parameters(), lr=1e-2).step()
    assert_same(weights_of(module), weights_of(expected))


class Taggers(TrainModule):
    """Two taggers of padded tokens, the second of which learns from the first one, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = (
            nn.Sequential(nn.Embedding(CLASSES, 5), nn.Linear(5, CLASSES)) for _ in range(2)
        )  # fmt: skip

    def turns(self) -> Sequence[Turn]:
        return [Turn("first", self.first_loss, "first"), Turn("second", self.second_loss, "second", every=2)]

    def first_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.first(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())

    def second_loss(self, batch: dict[str, Tensor], num_items_in_batch: Any) -> dict[str, Tensor]:
        logits = self.second(batch["tokens"]) + self.first(batch["tokens"])
        total = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        return {"loss": total / num_items_in_batch}

    def configure_optimizer(self, args: FitArguments) -> Any:
        return {
            turn: torch.optim.SGD(layers.parameters(), lr=rate)
            for turn, layers, rate in (("second", self.second, 0.3), ("first", self.first, 0.2))
        }


def test_a_turns_loss_is_one_mean_over_the_items_of_its_batch(make_fit: MakeFit) -> None:
    data = token_rows(22)
    module = Taggers()
    expected = copy.deepcopy(module)
    fit = make_fit(
        module, data, per_device_train_batch_size=3, gradient_accumulation_steps=2, num_train_epochs=1, logging_steps=1
    )
    fit.train()
    losses: dict[str, list[float]] = {"first": [], "second": []}
    for number in range(4):  # of 6 rows, the last of 4
        part = data[6 * number : 6 * number + 6]
        batch = {name: torch.stack([row[name] for row in part]) for name in ("tokens", "labels")}
        count = int((batch["labels"] != -100).sum())
        for turn, layers, rate in (("first", expected.first, 0.2), ("second", expected.second, 0.3)):
            if turn == "second" and number % 2 == 0:
                continue
            loss = expected.first_loss(batch) if turn == "first" else expected.second_loss(batch, count)["loss"]
            expected.zero_grad()
            loss.backward()
            torch.optim.SGD(layers.parameters(), lr=rate).step()
            losses[turn].append(loss.item())
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(module.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)
    logs = logs_of(fit)
    assert [log["loss_second"] for log in logs] == pytest.approx(losses["second"], rel=1e-5)
    first = losses["first"]
    assert [log["loss_first"] for log in logs] == pytest.approx([sum(first[:2]) / 2, sum(first[2:]) / 2], rel=1e-5)
    assert fit.state.items_seen == sum(int((row["labels"] != -100).sum()) for row in data)


def test_a_batch_of_padding_moves_nothing(make_fit: MakeFit) -> None:
    data = token_rows(4)
    empty = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in data]
    fit = make_fit(Taggers(), empty + data, per_device_train_batch_size=2, max_steps=2, logging_steps=1)
    before = weights_of(fit.module)
    seen = keep_weights(fit)
    fit.train()
    assert_same(before, seen[0])
    assert any(not torch.equal(tensor, before[name]) for name, tensor in seen[1].items())
    assert all(tensor.isfinite().all() for tensor in seen[1].values())
    assert len(logs_of(fit)) == 1  # the first round has no loss


# Left out.


@pytest.mark.parametrize("strategy", ["single", "elsewhere"])
def test_the_turn_that_is_left_out_is_named_and_the_others_are_made(
    make_fit: MakeFit, strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, module = poisoned(15 * BATCH, 6, *range(10, 15)), Pair()
    module.options = {"critic": {"lr_scheduler_type": "linear"}, "generator": {"lr_scheduler_type": "linear"}}
    fit = make_fit(
        module, data, per_device_train_batch_size=BATCH, max_steps=3, max_grad_norm=1.0, logging_steps=1,
        strategy=Elsewhere(device="cpu") if strategy == "elsewhere" else "single",
    )  # fmt: skip
    seen = keep_weights(fit)
    fit.train()
    said = capsys.readouterr().err
    assert "Turn 'critic' of update 2 was not made, as its gradients' norm is nan" in said
    assert said.count("Turn 'critic' of update 3 was not made") == 5
    assert "'generator'" not in said
    for name, tensor in seen[2].items():  # of the last round, the generator's turn alone was made
        assert torch.equal(tensor, seen[1][name]) == name.startswith("critic"), name
    assert fit.state.skipped_updates == 2 and logs_of(fit)[-1]["skipped_updates_critic"] == 6
    assert "skipped_updates_generator" not in logs_of(fit)[-1]
    critic, generator = (stepping.scheduler.last_epoch for stepping in fit.run.steppings.values())
    assert (critic, generator) == (2, 3)


def test_too_many_of_a_turn_in_a_row_end_the_run(make_fit: MakeFit) -> None:
    data = poisoned(10 * BATCH, *range(3, 10))
    fit = make_fit(Pair(), data, per_device_train_batch_size=BATCH, max_steps=2, max_skipped_updates=3)
    with pytest.raises(SkippedUpdatesError, match=r"turns 'critic' in a row were not made, up to update 2"):
        fit.train()


def test_statistics_of_a_turn_that_is_left_out_are_taken_back(make_fit: MakeFit) -> None:
    class Normed(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.critic.insert(1, nn.BatchNorm1d(16))

        def critic_loss(self, batch: dict[str, Tensor]) -> Any:
            return self.critic(self.generator(batch["noise"])).mean() - self.critic(batch["real"]).mean()

    fit = make_fit(Normed(), poisoned(5 * BATCH, 4), per_device_train_batch_size=BATCH, max_steps=1)
    fit.train()
    assert all(tensor.isfinite().all() for tensor in fit.module.state_dict().values())
    assert fit.state.skipped_updates == 1


# Checkpoints.


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_resumed_run_is_the_same_to_the_bit(make_fit: MakeFit, tmp_path: Path, precision: str) -> None:
    options: dict[str, Any] = {
        "per_device_train_batch_size": BATCH, "max_steps": 6, "save_strategy": "steps", "save_steps": 2,
        "logging_steps": 4, "max_grad_norm": 1.0, "lr_scheduler_type": "cosine", "precision": precision,
        "shuffle": True,
    }  # fmt: skip
    whole = make_fit(Pair(), poisoned(17 * BATCH, 3), **options)
    whole.train()
    with torch.random.fork_rng():
        resumed = make_fit(Pair(), poisoned(17 * BATCH, 3), **options)
        for parameter in resumed.module.parameters():
            parameter.data.zero_()
        resumed.train(resume_from_checkpoint=tmp_path / "output/checkpoint-4")
    assert_same(weights_of(whole.module), weights_of(resumed.module))
    assert resumed.state.log_history[:-1] == whole.state.log_history[:-1]
    for turn, stepping in whole.run.steppings.items():
        assert stepping.state_dict() == resumed.run.steppings[turn].state_dict()
    state = whole.strategy.optimizer_state()
    assert state.keys() == resumed.strategy.optimizer_state().keys() and "critic.0.weight" in state


def test_a_checkpoint_of_other_turns_is_refused(make_fit: MakeFit, tmp_path: Path) -> None:
    class Whole(Pair):
        def turns(self) -> Sequence[Turn]:
            return ()

        def forward(self, noise: Tensor) -> Tensor:
            return self.critic(self.generator(noise))

        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return outputs.mean()

    class Renamed(Pair):
        def turns(self) -> Sequence[Turn]:
            return [Turn("judge", self.critic_loss, "critic"), Turn("maker", self.generator_loss, "generator")]

    options: dict[str, Any] = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_fit(Pair(), rows(5 * BATCH), per_device_train_batch_size=BATCH, **options).train()
    path = tmp_path / "output/checkpoint-1"
    for module, said in ((Whole(), "has none"), (Renamed(), "has the turns judge, maker")):
        fit = make_fit(module, rows(5 * BATCH), per_device_train_batch_size=BATCH, **{**options, "max_steps": 2})
        with pytest.raises(CheckpointError, match=f"has the turns critic, generator, and this run's module {said}"):
            fit.train(resume_from_checkpoint=path)


def test_a_resume_with_other_arguments_has_each_turns_own_rate(make_fit: MakeFit, tmp_path: Path) -> None:
    options: dict[str, Any] = {"per_device_train_batch_size": BATCH, "save_strategy": "steps", "save_steps": 1}
    make_fit(Pair(), rows(10 * BATCH), max_steps=1, **options).train()
    module = Pair()
    module.options = {"critic": {"learning_rate": 5e-4}}
    fit = make_fit(module, rows(10 * BATCH), max_steps=2, resume_with="arguments", logging_steps=1, **options)
    fit.train(resume_from_checkpoint=tmp_path / "output/checkpoint-1")
    log = logs_of(fit)[-1]
    assert (log["learning_rate_critic"], log["learning_rate_generator"]) == (5e-4, 1e-2)


# What goes on as for other modules.


def test_schedules_and_optimizers_may_be_the_modules_own(make_fit: MakeFit) -> None:
    class Own(Taggers):
        def configure_scheduler(self, optimizer: Any, args: FitArguments) -> Any:
            first = torch.optim.lr_scheduler.StepLR(optimizer["first"], 1, 0.5)
            return {"first": first, "second": torch.optim.lr_scheduler.ConstantLR(optimizer["second"], 1.0)}

    fit = make_fit(Own(), token_rows(24), per_device_train_batch_size=4, max_steps=3, logging_steps=1)
    fit.train()
    logs = logs_of(fit)
    assert [log["learning_rate_first"] for log in logs] == pytest.approx([0.2, 0.1, 0.05])
    assert [log["learning_rate_second"] for log in logs] == pytest.approx([0.3] * 3)


def test_averages_evaluation_prediction_and_export(make_fit: MakeFit, tmp_path: Path) -> None:
    class Judged(Pair):
        def forward(self, noise: Tensor) -> Tensor:
            return self.generator(noise)

        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
            return (outputs - batch["real"]).square().mean()

    average = Average(decay=0.5)
    data = rows(20 * BATCH)
    fit = make_fit(
        Judged(), data, data[:7], per_device_train_batch_size=BATCH, max_steps=4, callbacks=[average],
        eval_strategy="steps", eval_steps=2
    )  # fmt: skip
    fit.train()
    module, batch = fit.module, {name: torch.stack([row[name] for row in data[:7]]) for name in data[0]}
    expected = (module.generator(batch["noise"]) - batch["real"]).square().mean().item()
    assert fit.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert fit.evaluate(weights=average)["eval_loss"] != pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(fit.predict(data[:7]).predictions, module.generator(batch["noise"]).detach())
    assert fit.export(tmp_path / "weights.safetensors").exists()


def test_a_second_run_and_a_trial_begin_anew(make_fit: MakeFit) -> None:
    data = rows(10 * BATCH)
    fit = make_fit(
        module_init=lambda trial: Pair(), train_data=data, module=None, per_device_train_batch_size=BATCH, max_steps=2
    )
    fit.train()
    first = weights_of(fit.module)
    fit.train(trial={"max_steps": 1})
    assert fit.state.global_step == 1
    fit.train()
    assert_same(first, weights_of(fit.module))


def test_a_turns_loss_may_log_beside_it(make_fit: MakeFit) -> None:
    class Telling(Pair):
        def generator_loss(self, batch: dict[str, Tensor]) -> Any:
            loss = super().generator_loss(batch)
            self.log("judged", -loss)
            return loss

    fit = make_fit(Telling(), rows(10 * BATCH), per_device_train_batch_size=BATCH, max_steps=2, logging_steps=1)
    fit.train()
    for log in logs_of(fit):
        assert log["judged"] == pytest.approx(-log["loss_generator"], rel=1e-6)


def test_numbers_of_all_rows_within_a_turns_loss(make_fit: MakeFit) -> None:
    class Gathering(Pair):
        def generator_loss(self, batch: dict[str, Tensor]) -> Any:
            return -self.gather(self.critic(self.generator(batch["noise"]))).mean()

    fits = [
        make_fit(kind(), rows(5 * BATCH), per_device_train_batch_size=BATCH, max_steps=1) for kind in (Pair, Gathering)
    ]
    for fit in fits:
        fit.train()
    assert_same(*(weights_of(fit.module) for fit in fits))


# Bad input.


def listing(*turns: Callable[[Pair], Turn]) -> Pair:
    """A pair with these turns."""

    class Listing(Pair):
        def turns(self) -> Sequence[Turn]:
            return [make(self) for make in turns]

    return Listing()


def critic(**options: Any) -> Callable[[Pair], Turn]:
    return lambda pair: Turn(**{"name": "critic", "loss": pair.critic_loss, "moves": "critic", **options})


def generator(**options: Any) -> Callable[[Pair], Turn]:
    return lambda pair: Turn(**{"name": "generator", "loss": pair.generator_loss, "moves": "generator", **options})


BAD: dict[str, tuple[list[Callable[[Pair], Turn]], dict[str, Any], str]] = {
    "two": ([critic(), generator(moves=["generator", "critic.0"])], {}, r"in two: critic.0.weight \('critic' and 'gen"),
    "nothing": ([critic(moves="critic.9"), generator()], {}, r"turn 'critic' moves 'critic.9', which matches no layer"),
    "names": ([critic(), critic(moves="generator")], {}, "more than one turn named 'critic'"),
    "every": ([critic(every=0)], {}, "Turn 'critic': every=0 must be a whole number of at least 1"),
    "in vain": ([critic(every=2), generator(every=3)], {}, "no turn that is made on each batch"),
    "name": ([critic(name="a b")], {}, "letters, digits and '_'. Received: 'a b'"),
    "rate": ([critic(learning_rate=-1.0), generator()], {}, r"(?s)Turn 'critic': .*learning_rate"),
    "optim": ([critic(optim="adamm"), generator()], {}, r"(?s)Turn 'critic': .*adamm"),
    "lomo": ([critic(optim="lomo", max_grad_norm=0), generator()], {}, "optim='lomo' in turn 'critic': it updates"),
    "update": ([critic(), generator()], {"torch_compile": "update"}, r"torch_compile='update' with .*turns\(\): makes"),
    "smooth": ([critic(), generator()], {"label_smoothing_factor": 0.1}, r"label_smoothing_factor=0.1 with"),
    "func": ([critic(), generator()], {"compute_loss_func": nn.functional.mse_loss}, r"compute_loss_func with"),
    "past": ([critic(), generator()], {"past_index": 1}, r"past_index=1 with"),
    "chunks": ([critic(), generator()], {"contrastive_chunks": 2}, r"contrastive_chunks=2 with"),
    **{
        name: ([critic(), generator()], {"strategy": name}, rf"strategy='{name}' with Listing.turns\(\): .*[uU]se ")
        for name in ("dp", "fsdp1", *(("deepspeed",) if find_spec("deepspeed") else ()))
    },
    "evaluates": (
        [critic(), generator()], {"eval_strategy": "epoch", "eval_data": rows(2)}, "Listing defines no forward"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_by_name(make_fit: MakeFit, case: str) -> None:
    turns, options, said = BAD[case]
    with pytest.raises((ValueError, TypeError), match=said):
        make_fit(listing(*turns), rows(5 * BATCH), per_device_train_batch_size=BATCH, max_steps=1, **options)


UNREACHED: dict[str, tuple[Callable[[Pair, Any], Any], str]] = {
    "detached": (lambda pair, batch: pair.critic(pair.generator(batch["noise"]).detach()).mean(), "generator.0.weight"),
    "input": (lambda pair, batch: (batch["real"].requires_grad_() ** 2).mean(), "generator.0.weight"),
}


@pytest.mark.parametrize("case", UNREACHED)
def test_a_loss_that_does_not_reach_its_parameters(make_fit: MakeFit, case: str) -> None:
    class Apart(Pair):
        def generator_loss(self, batch: Any) -> Any:
            return UNREACHED[case][0](self, batch)

    fit = make_fit(Apart(), rows(5 * BATCH), per_device_train_batch_size=BATCH, max_steps=1)
    said = (
        r"Apart.generator_loss, the loss of turn 'generator', doesn't reach what the turn moves: .* generator.0.weight"
    )
    with pytest.raises(ValueError, match=said):
        fit.train()


def test_what_no_turn_moves_is_named_and_stands_still(make_fit: MakeFit) -> None:
    module = listing(critic(), generator(moves="generator.*.weight"))
    before = weights_of(module)
    fit = make_fit(module, rows(5 * BATCH), per_device_train_batch_size=BATCH, max_steps=1)
    with pytest.warns(UserWarning, match="no turn moves generator.0.bias, generator.2.bias, so they aren't trained"):
        fit.train()
    still = {name for name, tensor in weights_of(module).items() if torch.equal(tensor, before[name])}
    assert still == {"generator.0.bias", "generator.2.bias", "critic.2.bias"}  # the last one has a gradient of 0


def test_other_refusals(make_fit: MakeFit) -> None:
    data, options = rows(5 * BATCH), {"per_device_train_batch_size": BATCH, "max_steps": 1}

    class Closures(Pair):
        def configure_optimizer(self, args: FitArguments) -> Any:
            return {
                "critic": torch.optim.LBFGS(self.critic.parameters()),
                "generator": torch.optim.SGD(self.generator.parameters(), 0.1),
            }

    class Missing(Pair):
        def configure_optimizer(self, args: FitArguments) -> Any:
            return {"critic": torch.optim.SGD(self.critic.parameters(), 0.1), "maker": None}

    class TooMuch(Pair):
        def configure_optimizer(self, args: FitArguments) -> Any:
            return {
                "critic": torch.optim.SGD(self.parameters(), 0.1),
                "generator": torch.optim.SGD(self.generator.parameters(), 0.1),
            }

    class Alone(Pair):
        def configure_optimizer(self, args: FitArguments) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    for kind, said in (
        (Closures, r"Turn 'critic': LBFGS evaluates the loss several times"),
        (Missing, r"lacks generator and has no turn for maker"),
        (TooMuch, r"optimizer of turn 'critic' also steps generator.0.bias"),
        (Alone, r"must return a mapping from the names of the turns"),
    ):
        with pytest.raises((ValueError, TypeError), match=said):
            make_fit(kind(), data, **options).train()
    with pytest.raises(ValueError, match="find_learning_rate raises one rate"):
        make_fit(Pair(), data, **options).find_learning_rate()
    with pytest.raises(ValueError, match="trained in turns and defines no forward"):
        make_fit(Pair(), data, **options).evaluate(data)

    class Overriding(Fit):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    with pytest.raises(ValueError, match=r"Overriding.compute_loss would not be called"):
        Overriding(Pair(), data, progress=False, report=False, loggers=(), save_strategy="no")


def test_a_module_without_turns_knows_nothing_of_them(make_fit: MakeFit) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = make_fit(Regressor(), [{"x": torch.ones(3), "y": torch.ones(1)}] * 4, max_steps=1, logging_steps=1)
        fit.train()
    assert fit.run.turns is None and list(fit.run.steppings) == [""]
    assert {"loss", "learning_rate"} <= {*logs_of(fit)[0]} and math.isfinite(logs_of(fit)[0]["loss"])


def test_patterns_stand_for_parts_of_names() -> None:
    name = "blocks.1.adapter.weight"
    assert [matches(name, each) for each in ("blocks", "blocks.*.adapter", "*.*.adapter.weight", "blocks.[01]")] == [
        True
    ] * 4
    assert not any(matches(name, each) for each in ("block", "adapter", "blocks.adapter", f"{name}.x", "*.adapter"))


class Logging(Pair):
    """Logs in both turns, and reads the update."""

    def critic_loss(self, batch: dict[str, Tensor]) -> Any:
        found = super().critic_loss(batch)
        self.log("penalty_again", found["penalty"])
        self.log("update", self.update_number)
        return found

    def generator_loss(self, batch: dict[str, Tensor]) -> Any:
        found = super().generator_loss(batch)
        self.log("score", -found)
        return found


class Clashing(Pair):
    def critic_loss(self, batch: dict[str, Tensor]) -> Any:
        self.log("loss_generator", 1.0)
        return super().critic_loss(batch)


def test_what_turns_log_is_one_mean_in_a_round(make_fit: MakeFit) -> None:
    fit = make_fit(Logging(), rows(60), max_steps=2, logging_steps=1, per_device_train_batch_size=BATCH)
    fit.train()
    logs = [log for log in fit.state.log_history if "loss" in log]
    for number, log in enumerate(logs):
        assert log["penalty_again"] == pytest.approx(log["penalty"])  # the mean over the critic's five batches
        assert log["score"] == pytest.approx(-log["loss_generator"])
        assert log["update"] == number  # a round is an update
    with pytest.raises(ValueError, match="'loss_generator' is logged by log"):
        make_fit(Clashing(), rows(30), max_steps=1, per_device_train_batch_size=BATCH).train()


def test_a_hook_that_raises_leaves_the_module_its_own_forward(make_fit: MakeFit) -> None:
    module = Pair()

    def accident(*call: Any) -> None:
        raise KeyError("the accident")

    handle = module.register_forward_pre_hook(accident)
    with pytest.raises(KeyError, match="the accident"):
        make_fit(module, rows(5 * BATCH), max_steps=1, per_device_train_batch_size=BATCH).train()
    handle.remove()
    assert "forward" not in vars(module)
