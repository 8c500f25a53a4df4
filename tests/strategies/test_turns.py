"""Turns on one device, and the optimizers of turns as one."""

from typing import Any

import pytest
import torch
from stratagem import TrainModule
from stratagem.precision import FP16Mixed, Full, Precision
from stratagem.precision.registry import get_precision
from stratagem.strategies import Single
from stratagem.strategies.joined_optimizer import JoinedOptimizer
from torch import Tensor, nn

MOVED = {"critic": ["critic.0.weight", "critic.0.bias", "critic.2.weight"], "generator": ["generator.weight"]}


class Pair(TrainModule):
    """A generator and its critic; the critic's last bias is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.generator = nn.Linear(2, 3, bias=False)
        self.critic = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.critic[2].bias.requires_grad_(False)

    def loss_of(self, turn: str, batch: Tensor) -> Tensor:
        """The critic's loss has a gradient penalty, and so gradients of gradients."""
        fake = self.generator(batch[:, :2])
        if turn == "generator":
            return -self.critic(fake).mean()
        between = (0.3 * batch + 0.7 * fake.detach()).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        return self.critic(fake).mean() - self.critic(batch).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()


def optimizers_of(module: Pair, **options: Any) -> JoinedOptimizer:
    named = dict(module.named_parameters())
    of = {turn: [named[name] for name in names] for turn, names in MOVED.items()}
    return JoinedOptimizer(
        {
            "critic": torch.optim.Adam(of["critic"], lr=1e-2, **options),
            "generator": torch.optim.SGD(of["generator"], lr=1e-1, momentum=0.9, **options),
        }
    )


def place(precision: str | Precision = "32-true", module: Pair | None = None, **options: Any) -> Single:
    strategy = Single(device="cpu")
    strategy.set_up(get_precision(precision) if isinstance(precision, str) else precision)
    strategy.place(module or Pair(), lambda module: optimizers_of(module, **options))
    strategy.place_turns(MOVED)
    return strategy


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(6, 3, generator=generator) for _ in range(count)]


def make(strategy: Single, turn: str, batch: Tensor, refused: Tensor | None = None) -> bool:
    """One turn, as a loop makes it; whether its step was made, as far as the precision says."""
    with strategy.turn(turn):
        with strategy.forward_context():
            loss = strategy.module.loss_of(turn, strategy.precision.cast_batch(batch))
        strategy.backward(loss)
        strategy.prepare_gradients()
        strategy.clip_grad_norm(strategy.parameters_in_turn(turn), 1.0)
        strategy.step(refused)
        for parameter in strategy.parameters_in_turn(turn):
            parameter.grad = None
        return not strategy.step_was_skipped()


def test_weights_are_those_of_a_loop_by_hand_to_the_bit() -> None:
    strategy, expected = place(), Pair()
    named = dict(expected.named_parameters())
    held = {turn: [named[name] for name in names] for turn, names in MOVED.items()}
    critic = torch.optim.Adam(held["critic"], lr=1e-2)
    generator = torch.optim.SGD(held["generator"], lr=1e-1, momentum=0.9)
    for number, batch in enumerate(batches(10)):
        for turn, optimizer in (("critic", critic), ("generator", generator)):
            if turn == "critic" or number % 2:
                make(strategy, turn, batch)
                expected.loss_of(turn, batch).backward()
                torch.nn.utils.clip_grad_norm_(held[turn], 1.0)
                optimizer.step()
                expected.zero_grad()
    for name, weight in expected.state_dict().items():
        assert torch.equal(strategy.module.state_dict()[name], weight), name


def test_what_a_turn_does_not_move_stands_still_and_gets_no_gradient() -> None:
    strategy = place()
    named = dict(strategy.module.named_parameters())
    before = {name: parameter.requires_grad for name, parameter in named.items()}
    for turn, names in MOVED.items():
        with strategy.turn(turn):
            assert {name for name, parameter in named.items() if parameter.requires_grad} == set(names)
            assert strategy.optimizer_in_turn is strategy.optimizer.of(turn)  # type: ignore[union-attr]
            strategy.backward(strategy.module.loss_of(turn, batches(1)[0]))
            assert {name for name, parameter in named.items() if parameter.grad is not None} == set(names)
        assert {name: parameter.requires_grad for name, parameter in named.items()} == before
        strategy.module.zero_grad()


def test_an_error_in_a_turn_leaves_all_as_it_was() -> None:
    strategy = place()
    with pytest.raises(ZeroDivisionError), strategy.turn("critic"):
        raise ZeroDivisionError
    assert strategy.module.generator.weight.requires_grad and strategy.turn_now is None
    assert strategy.optimizer_in_turn is strategy.optimizer


def test_joined_groups_and_state_are_the_optimizers_own() -> None:
    strategy = place()
    for batch in batches(2):
        make(strategy, "critic", batch)
    joined = strategy.optimizer
    assert isinstance(joined, JoinedOptimizer)
    critic, generator = joined.of("critic"), joined.of("generator")
    assert [id(group) for group in joined.param_groups] == [id(g) for o in (critic, generator) for g in o.param_groups]
    assert set(strategy.optimizer_state()) == set(MOVED["critic"])  # the generator hasn't been stepped
    make(strategy, "generator", batches(1)[0])
    saved = {
        name: {key: value.clone() if isinstance(value, Tensor) else value for key, value in entries.items()}
        for name, entries in strategy.optimizer_state().items()
    }
    assert set(saved) == {name for names in MOVED.values() for name in names}
    other = place(module=Pair())
    other.module.load_state_dict(strategy.module.state_dict())
    other.load_optimizer_state(saved)
    assert len(other.optimizer.state) == len(joined.state) == 4  # type: ignore[union-attr]
    for batch in batches(3):
        for turn in MOVED:
            make(strategy, turn, batch)
            make(other, turn, batch)
    for name, weight in strategy.module.state_dict().items():
        assert torch.equal(other.module.state_dict()[name], weight), name


def test_state_of_a_parameter_that_no_optimizer_holds_is_refused() -> None:
    joined = optimizers_of(Pair())
    with pytest.raises(KeyError):
        joined.state[torch.zeros(2)] = {}


def test_a_parameter_belongs_to_one_optimizer() -> None:
    layer = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"'critic' and 'generator' hold the same parameter, of shape \(3, 2\)"):
        JoinedOptimizer(
            {
                "critic": torch.optim.SGD(layer.parameters(), lr=1.0),
                "generator": torch.optim.SGD([layer.weight], lr=1.0),
            }
        )


def test_other_weights_for_a_while_reach_all_turns() -> None:
    strategy = place()
    for turn in MOVED:
        make(strategy, turn, batches(1)[0])
    held = strategy.held_weights()
    assert set(held) == {name for names in MOVED.values() for name in names}
    with strategy.with_weights({name: torch.zeros_like(part) for name, part in held.items()}):
        assert not any(p.any() for p in strategy.module.parameters() if p.requires_grad)
    assert all(p.any() for p in strategy.module.parameters() if p.requires_grad)


# Number formats.


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="bf16-true needs torch 2.10")
def test_bfloat16_steps_on_masters_that_each_optimizer_keeps() -> None:
    strategy, expected = place("bf16-true"), Pair().bfloat16()
    named = {name: parameter for name, parameter in expected.named_parameters() if parameter.requires_grad}
    masters = {name: nn.Parameter(parameter.detach().float()) for name, parameter in named.items()}
    critic = torch.optim.Adam([masters[name] for name in MOVED["critic"]], lr=1e-2)
    generator = torch.optim.SGD([masters[name] for name in MOVED["generator"]], lr=1e-1, momentum=0.9)
    for batch in batches(5):
        for turn, optimizer in (("critic", critic), ("generator", generator)):
            make(strategy, turn, batch)
            expected.loss_of(turn, batch.bfloat16()).backward()
            for name in MOVED[turn]:
                masters[name].grad = named[name].grad.float()
            torch.nn.utils.clip_grad_norm_([masters[name] for name in MOVED[turn]], 1.0)
            optimizer.step()
            expected.zero_grad()
            for name in MOVED[turn]:
                named[name].data.copy_(masters[name].data)
    state = strategy.optimizer_state()
    for name, master in masters.items():
        assert torch.equal(state[name]["master_weight"], master), name
        assert torch.equal(strategy.held_weights()[name], master)
        assert torch.equal(strategy.named_parameters()[name], named[name])


def test_an_overflow_in_one_turn_leaves_the_scale_of_the_other_alone() -> None:
    strategy = place(FP16Mixed(initial_scale=2.0**10))
    before = {name: p.detach().clone() for name, p in strategy.named_parameters().items()}
    first = strategy.precision.state_dict()
    assert set(first) == {"turns"} and set(first["turns"]) == set(MOVED)
    batch = batches(1)[0]
    assert not make(strategy, "critic", batch * 1e30)
    assert make(strategy, "generator", batch)
    assert strategy.precision.log_values() == {"loss_scale_critic": 2.0**9, "loss_scale_generator": 2.0**10}
    still = {name for name, p in strategy.named_parameters().items() if torch.equal(p, before[name])}
    assert still == {*MOVED["critic"], "critic.2.bias"}
    saved = strategy.precision.state_dict()
    assert saved["turns"]["critic"]["scale"] == 2.0**9 and saved["turns"]["generator"]["_growth_tracker"] == 1
    strategy.precision.load_state_dict(first)
    assert strategy.precision.state_dict() == first
    other = place("16-mixed")
    other.precision.load_state_dict(saved)
    assert other.precision.state_dict() == saved


def test_the_saved_scale_of_a_run_without_turns_is_as_it_was() -> None:
    strategy = Single(device="cpu")
    strategy.set_up(get_precision("16-mixed"))
    assert strategy.precision.state_dict() == torch.amp.GradScaler("cpu").state_dict()


@pytest.mark.parametrize("precision", [Full(), FP16Mixed(initial_scale=1.0)])
def test_a_flag_on_the_device_leaves_the_turns_own_parameters_alone(precision: Precision) -> None:
    """torch's fused SGD leaves its momentum without values in a first step that is refused: the critic's state must not
    be taken for the generator's.
    """
    strategy = place(precision, fused=True)
    batch = batches(1)[0]
    make(strategy, "critic", batch)
    before = strategy.module.generator.weight.detach().clone()
    make(strategy, "generator", batch, refused=torch.ones(()))
    assert torch.equal(strategy.module.generator.weight, before)
    assert "generator.weight" not in strategy.optimizer_state()
    make(strategy, "generator", batch, refused=torch.zeros(()))
    moved = strategy.optimizer_state()["generator.weight"]["momentum_buffer"]
    assert moved.isfinite().all() and not torch.equal(strategy.module.generator.weight, before)


def test_what_cannot_take_turns_says_so() -> None:
    class Refusing(Single):
        refused_turns = "it copies the module in every forward. Use strategy='ddp'"

    strategy = Refusing(device="cpu")
    strategy.set_up(get_precision("32-true"))
    strategy.place(Pair(), optimizers_of)
    with pytest.raises(ValueError, match="can't train a module in turns: it copies the module in every forward"):
        strategy.place_turns(MOVED)
