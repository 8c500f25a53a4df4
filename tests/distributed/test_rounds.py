"""Rounds on real ranks: whole runs of a module in turns compute what one process computes, whatever places them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from stratagem import Fit, TrainModule, Turn
from stratagem.framework.run.transaction import SkippedUpdatesError
from torch import Tensor, nn
from training import Tower, make_strategy

NOISE, DATA, WIDTH, BATCH, ROUNDS = 2, 3, 6, 8, 50
PLACEMENTS = ("ddp", "fsdp2", "tp")


class Wgan(TrainModule):
    """A critic that is made five times a round, with a gradient penalty, and its generator."""

    every = 5

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = Tower(NOISE, DATA, WIDTH, 2 * WIDTH), Tower(DATA, 1, WIDTH, 2 * WIDTH)

    def turns(self) -> list[Turn]:
        return [
            Turn("critic", self.critic_loss, "critic", optim="adam", learning_rate=1e-3),
            Turn("generator", self.generator_loss, "generator", every=self.every, optim="sgd", learning_rate=1e-2),
        ]

    def critic_loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        real, fake = batch["real"], self.generator(batch["noise"])
        between = (batch["mix"] * real + (1 - batch["mix"]) * fake).detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        return {"loss": self.critic(fake).mean() - self.critic(real).mean() + 10 * penalty, "penalty": penalty}

    def generator_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return -self.critic(self.generator(batch["noise"])).mean()

    def shard_units(self) -> list[nn.Module]:
        return [*self.generator.blocks, *self.critic.blocks]

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {"*.blocks.*.up": "colwise", "*.blocks.*.down": "rowwise"}


def rows(count: int, bad: tuple[int, ...] = ()) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(8)
    sizes = {"real": DATA, "noise": NOISE, "mix": 1}
    found = [{n: torch.rand(size, generator=generator) for n, size in sizes.items()} for _ in range(count)]
    for row in bad:
        found[row] = {**found[row], "real": torch.full((DATA,), torch.nan)}
    return found


def fit_of(
    strategy: str, path: Path | str, data: list[dict[str, Tensor]], module: type[TrainModule] = Wgan, **options: Any
) -> Fit:
    torch.manual_seed(3)
    placed = make_strategy(strategy, {})
    ranks = 1 if strategy in ("single", "tp") else 2
    rest = {
        "per_device_train_batch_size": BATCH // ranks, "progress": False, "report": False, "loggers": (),
        "save_strategy": "no", "shuffle": False, "lr_scheduler_type": "cosine", "max_grad_norm": 0.5,
        "output_dir": str(path), "logging_steps": 1,
    }  # fmt: skip
    return Fit(module(), data, strategy=placed, **{**rest, **options})


def trained(fit: Fit, path: Path | str, resume: Any = None) -> list[dict[str, float]]:
    """Train, write the weights, and give the logs."""
    fit.train(resume_from_checkpoint=resume)
    fit.export(Path(path) / "weights.safetensors")
    return [log for log in fit.state.log_history if "loss" in log]


def weights(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "weights.safetensors")


def train(
    strategy: str, path: str, count: int, bad: tuple[int, ...] = (), resume: str | None = None, **options: Any
) -> Any:
    return trained(fit_of(strategy, path, rows(count, tuple(bad)), **options), path, resume)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights and logs of fifty rounds in one process, which test_turns.py of one compares with a loop by hand."""
    path = tmp_path_factory.mktemp("alone")
    logs = train("single", str(path), 5 * ROUNDS * BATCH, max_steps=ROUNDS, precision="64-true")
    return weights(path), logs


@pytest.mark.slow
@pytest.mark.parametrize("strategy", PLACEMENTS)
def test_fifty_rounds_are_those_of_one_process(
    ranks: dict[int, Ranks], tmp_path: Path, strategy: str, alone: tuple[dict[str, Tensor], list[dict[str, float]]]
) -> None:
    options = {"max_steps": ROUNDS, "precision": "64-true"}
    logs, _ = ranks[2].run(train, strategy=strategy, path=str(tmp_path), count=5 * ROUNDS * BATCH, **options)
    expected, expected_logs = alone
    found = weights(tmp_path)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9)
    for log, other in zip(logs, expected_logs, strict=True):
        for name in ("loss", "loss_critic", "loss_generator", "penalty", "grad_norm_critic", "grad_norm_generator"):
            assert log[name] == pytest.approx(other[name], rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_unequal_ranks_and_rounds_that_are_cut_short(ranks: dict[int, Ranks], tmp_path: Path, strategy: str) -> None:
    """The last batch of an epoch has 3 samples of 16, so that a rank has a short micro-batch and a stand-in."""
    options = {"num_train_epochs": 2, "precision": "64-true", "gradient_accumulation_steps": 2}
    count = 16 * 6 + 3
    (tmp_path / "alone").mkdir()
    expected = train("single", str(tmp_path / "alone"), count, **options)
    logs, _ = ranks[2].run(train, strategy=strategy, path=str(tmp_path), count=count, **options)
    found = weights(tmp_path)
    for name, tensor in weights(tmp_path / "alone").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9)
    assert len(logs) == len(expected) == 4
    for log, other in zip(logs, expected, strict=True):
        assert log["loss"] == pytest.approx(other["loss"], rel=1e-6)


class Gathering(Wgan):
    """The generator's loss is of all ranks' rows."""

    def generator_loss(self, batch: dict[str, Tensor]) -> Tensor:
        judged = self.critic(self.generator(batch["noise"]))
        return nn.functional.softplus(self.gather(judged).std() - judged).mean()


def gather(strategy: str, path: str) -> None:
    trained(fit_of(strategy, path, rows(5 * 3 * BATCH), module=Gathering, precision="64-true", max_steps=3), path)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_rows_of_all_ranks_in_a_turns_loss(ranks: dict[int, Ranks], tmp_path: Path, strategy: str) -> None:
    (tmp_path / "alone").mkdir()
    gather("single", str(tmp_path / "alone"))
    ranks[2].run(gather, strategy=strategy, path=str(tmp_path))
    for name, tensor in weights(tmp_path / "alone").items():
        torch.testing.assert_close(weights(tmp_path)[name], tensor, rtol=1e-6, atol=1e-9)


class Padded(TrainModule):
    """Two taggers in turns, the second of which is told of the first one's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Tower(DATA, 4, WIDTH, 2 * WIDTH), Tower(DATA, 4, WIDTH, 2 * WIDTH)

    def turns(self) -> list[Turn]:
        return [
            Turn("first", self.first_loss, "first", optim="sgd"),
            Turn("second", self.second_loss, "second", optim="sgd", every=2),
        ]

    def first_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.first(batch["real"]), batch["labels"])

    def second_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.second(batch["real"]) + self.first(batch["real"]), batch["labels"])

    def shard_units(self) -> list[nn.Module]:
        return [*self.first.blocks, *self.second.blocks]


def tag(strategy: str, path: str) -> None:
    """Four batches of 8 rows; of the second one, only the first 4 rows have labels, and of the third one none."""
    data = [
        {"real": row["real"], "labels": torch.tensor([-100 if 12 <= number < 24 else number % 4])}
        for number, row in enumerate(rows(32))
    ]
    data = [{**row, "labels": row["labels"].squeeze(0)} for row in data]
    trained(fit_of(strategy, path, data, module=Padded, precision="64-true", max_steps=2, learning_rate=0.1), path)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_rank_whose_labels_are_all_padding(ranks: dict[int, Ranks], tmp_path: Path, strategy: str) -> None:
    (tmp_path / "alone").mkdir()
    tag("single", str(tmp_path / "alone"))
    ranks[2].run(tag, strategy=strategy, path=str(tmp_path))
    for name, tensor in weights(tmp_path / "alone").items():
        assert tensor.isfinite().all()
        torch.testing.assert_close(weights(tmp_path)[name], tensor, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_a_checkpoint_of_one_strategy_goes_on_under_another(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    count, options = 5 * 6 * BATCH, {"max_steps": 6, "precision": "64-true"}
    saving = {"save_strategy": "steps", "save_steps": 3}
    (tmp_path / "alone").mkdir()
    expected = train("single", str(tmp_path / "alone"), count, **options, **saving)
    ranks[2].run(train, strategy="ddp", path=str(tmp_path), count=count, **options, **saving)
    saved = str(tmp_path / "checkpoint-3")
    for strategy in PLACEMENTS:
        path = tmp_path / strategy
        path.mkdir()
        logs, _ = ranks[2].run(train, strategy=strategy, path=str(path), count=count, resume=saved, **options)
        for name, tensor in weights(tmp_path / "alone").items():
            torch.testing.assert_close(weights(path)[name], tensor, rtol=1e-6, atol=1e-9)
        assert logs[-1]["learning_rate_critic"] == pytest.approx(expected[-1]["learning_rate_critic"])


def fail(strategy: str, path: str) -> str:
    try:
        train(strategy, path, 10 * BATCH, tuple(range(5 * BATCH, 10 * BATCH)), max_steps=2, max_skipped_updates=4)
    except SkippedUpdatesError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_all_ranks_end_where_a_turn_is_left_out_too_often(
    ranks: dict[int, Ranks], tmp_path: Path, strategy: str
) -> None:
    one, other = ranks[2].run(fail, strategy=strategy, path=str(tmp_path))
    assert one and "turns 'critic' in a row were not made, up to update 2" in one
    assert other.partition("the order of epoch")[0] == one.partition("the order of epoch")[0]
