"""Modules that are trained in turns: each with a loss, an optimizer and a schedule of its own."""

import copy
from typing import Any

import pytest
import torch
from stratagem import TrainModule, Turn
from tiny import MakeFit
from torch import Tensor, nn

FEATURES, NOISE, BATCH = 4, 3, 6


class Pair(TrainModule):
    """A generator of points and the critic that tells them from the data's, with a gradient penalty (WGAN-GP)."""

    every = 5
    options: dict[str, dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.critic = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 1))
        self.generator = nn.Sequential(nn.Linear(NOISE, 16), nn.Tanh(), nn.Linear(16, FEATURES))

    def turns(self) -> list[Turn]:
        own = {"critic": {"optim": "adam"}, "generator": {"optim": "sgd"}} | self.options
        return [
            Turn("critic", loss=self.critic_loss, moves="critic", learning_rate=2e-3, **own["critic"]),
            Turn("generator", self.generator_loss, "generator", self.every, learning_rate=1e-2, **own["generator"]),
        ]

    def critic_loss(self, batch: dict[str, Tensor]) -> Any:
        real, fake = batch["real"], self.generator(batch["noise"])
        between = (batch["mix"] * real + (1 - batch["mix"]) * fake.detach()).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        return {"loss": self.critic(fake).mean() - self.critic(real).mean() + 10 * penalty, "penalty": penalty}

    def generator_loss(self, batch: dict[str, Tensor]) -> Any:
        return -self.critic(self.generator(batch["noise"])).mean()


def rows(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(8)
    return [
        {
            "real": torch.randn(FEATURES, generator=generator) + 2.0,
            "noise": torch.randn(NOISE, generator=generator),
            "mix": torch.rand(1, generator=generator),
        }
        for _ in range(count)
    ]


def by_hand(module: Pair, batches: list[dict[str, Tensor]], rounds: int, max_norm: float = 0.0) -> list[list[float]]:
    """The losses of a hand-written loop: [critic's five times, generator's] of each round."""
    critic = torch.optim.Adam(module.critic.parameters(), lr=2e-3, fused=True)
    generator = torch.optim.SGD(module.generator.parameters(), lr=1e-2)
    found = []
    for number in range(rounds):
        losses = []
        for inner in range(5):
            batch = batches[(number * 5 + inner) % len(batches)]
            module.generator.requires_grad_(False)
            loss = module.critic_loss(batch)["loss"]
            loss.backward()
            if max_norm:
                nn.utils.clip_grad_norm_(module.critic.parameters(), max_norm)
            critic.step()
            critic.zero_grad()
            module.generator.requires_grad_(True)
            losses.append(loss.item())
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


def in_batches(data: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [
        {name: torch.stack([row[name] for row in data[first : first + BATCH]]) for name in data[0]}
        for first in range(0, len(data), BATCH)
    ]


CONSTANT = {"lr_scheduler_type": "constant", "weight_decay": 0.0, "shuffle": False}


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_fifty_rounds_are_those_of_a_hand_written_loop(make_fit: MakeFit, max_norm: float) -> None:
    data = rows(50 * BATCH)
    module = Pair()
    expected = copy.deepcopy(module)
    fit = make_fit(
        module,
        data,
        per_device_train_batch_size=BATCH,
        max_steps=50,
        max_grad_norm=max_norm,
        logging_steps=1,
        **CONSTANT,
    )
    fit.train()
    losses = by_hand(expected, in_batches(data), 50, max_norm)
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, module.get_parameter(name)), name
    logs = [log for log in fit.state.log_history if "loss_critic" in log]
    assert len(logs) == fit.state.global_step == 50
    for log, (*critic, generator) in zip(logs, losses, strict=True):
        assert log["loss_critic"] == pytest.approx(sum(critic) / 5, rel=1e-6)
        assert log["loss_generator"] == pytest.approx(generator, rel=1e-6)
        assert log["loss"] == pytest.approx(sum(critic) / 5 + generator, rel=1e-5)
    print(logs[-1])
