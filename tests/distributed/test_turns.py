"""Turns on real ranks: the weights are those of a loop by hand, and what a turn doesn't move costs no traffic."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import Ranks
from stratagem import TrainModule, Turn
from stratagem.precision import FP16Mixed, Precision
from stratagem.precision.registry import get_precision
from stratagem.strategies.base import Strategy
from stratagem.strategies.fsdp2.gradients_in_forward import CAN_DIFFERENTIATE_TWICE
from stratagem.strategies.joined_optimizer import JoinedOptimizer
from test_collectives import Message, Traffic
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from training import Tower, curves, make_fit, make_strategy

NOISE, DATA, WIDTH = 2, 3, 6
SAMPLES, ROUNDS, MICRO_BATCHES = 8, 6, 2  # of both ranks together; the generator moves in every other round
TURNS = "critic", "generator"


class Wgan(TrainModule):
    """A generator and a critic whose blocks are sharded by themselves; the root's parameters are of both turns."""

    penalty = 10.0

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = Tower(NOISE, DATA, WIDTH, 4 * WIDTH), Tower(DATA, 1, WIDTH, 4 * WIDTH)
        self.now: tuple[str, Tensor] = ("", torch.empty(0))

    def begin(self, turn: str, batch: Tensor) -> None:
        self.now = turn, batch

    def forward(self) -> Tensor:
        turn, batch = self.now
        real, noise, share = batch.split([DATA, NOISE, 1], dim=1)
        fake = self.generator(noise)
        if turn == "generator":
            return -self.critic(fake).mean()
        loss = self.critic(fake.detach()).mean() - self.critic(real).mean()
        if self.penalty:
            between = (share * real + (1 - share) * fake).detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
            loss = loss + self.penalty * (slope.norm(dim=1) - 1).square().mean()
        return loss + 0.1 * self.critic(fake.detach()).square().mean()

    def shard_units(self) -> list[nn.Module]:
        return [*self.generator.blocks, *self.critic.blocks]

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {"*.blocks.*.up": "colwise", "*.blocks.*.down": "rowwise"}


class Plain(Wgan):
    """Without gradients of gradients."""

    penalty = 0.0


class ByTorchsStyles(Wgan):
    """A plan of torch's own objects."""

    def tensor_parallel_plan(self) -> dict[str, Any]:
        return {"*.blocks.*.up": ColwiseParallel(), "*.blocks.*.down": RowwiseParallel()}


class Scale(nn.Module):
    """A tanh with a scale on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.3]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.scale) * self.scale


class ScaledOnCut(Wgan):
    """A whole parameter on cut features, of which the plan has to say it: the penalty reaches it by two ways."""

    def __init__(self) -> None:
        super().__init__()
        for block in (*self.generator.blocks, *self.critic.blocks):
            block.up = nn.Sequential(block.up, Scale())

    def tensor_parallel_plan(self) -> dict[str, str]:
        cut = {"*.blocks.*.up.0": "colwise", "*.blocks.*.down": "rowwise"}
        return {**cut, "*.blocks.*.up.1": "used_on_cut"}


def make(kind: type[Wgan]) -> Wgan:
    torch.manual_seed(3)
    return kind()


def moved_by(module: nn.Module) -> dict[str, list[str]]:
    return {turn: [name for name, _ in module.named_parameters() if name.startswith(turn)] for turn in TURNS}


def optimizers_of(module: nn.Module) -> JoinedOptimizer:
    named = dict(module.named_parameters())
    of = {turn: [named[name] for name in names] for turn, names in moved_by(module).items()}
    adam = torch.optim.Adam(of["critic"], lr=1e-2, betas=(0.5, 0.9), eps=1e-4)
    return JoinedOptimizer({"critic": adam, "generator": torch.optim.SGD(of["generator"], lr=0.1, momentum=0.9)})


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.rand(SAMPLES, DATA + NOISE + 1, generator=generator) for _ in range(ROUNDS)]


def by_hand(kind: type[Wgan], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The loop that a person would write, on one device."""
    module = make(kind).to(dtype)
    joined, named = optimizers_of(module), dict(module.named_parameters())
    for number, batch in enumerate(batches()):
        for turn in TURNS[: 1 + number % 2]:
            for part in batch.to(dtype).chunk(MICRO_BATCHES):
                module.begin(turn, part)
                (module() / MICRO_BATCHES).backward()
            moved = [named[name] for name in moved_by(module)[turn]]
            torch.nn.utils.clip_grad_norm_(moved, 0.7)
            joined.of(turn).step()
            module.zero_grad()
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def place(kind: type[Wgan], strategy: str, precision: str | Precision = "64-true", **options: Any) -> Strategy:
    placed = make_strategy(strategy, options)
    placed.set_up(get_precision(precision) if isinstance(precision, str) else precision)
    module = make(kind)
    placed.place(module, optimizers_of)
    placed.place_turns(moved_by(module))
    return placed


def take_turns(
    strategy: Strategy, look: Callable[[str], None] = lambda where: None, parts: int = MICRO_BATCHES
) -> dict[str, set[str]]:
    """What the framework's loop does; turn to the parameters that had a gradient."""
    module, found = strategy.module, {}
    for number, batch in enumerate(batches()):
        for turn in TURNS[: 1 + number % 2]:
            with strategy.turn(turn):
                look(f"{turn} {number}")
                for index, whole in enumerate(batch.chunk(parts), start=1):
                    part = whole.chunk(strategy.data_size)[strategy.data_rank]
                    module.begin(turn, strategy.precision.cast_batch(part))  # type: ignore[operator]
                    with strategy.accumulate(index == parts):
                        with strategy.forward_context():
                            loss = strategy.model()
                        strategy.backward(strategy.local_loss(loss) / parts)
                strategy.prepare_gradients()
                look("rest")
                found[turn] = {n for n, p in strategy.named_parameters().items() if p.grad is not None}
                strategy.clip_grad_norm(strategy.parameters_in_turn(turn), 0.7)
                strategy.step()
                for parameter in strategy.parameters_in_turn(turn):
                    parameter.grad = None
    assert all(p.requires_grad for p in strategy.named_parameters().values())
    return found


def compare(kind: str, strategy: str, options: dict[str, Any]) -> tuple[float, dict[str, list[str]]]:
    """The largest difference of a weight from the loop by hand, and what had gradients."""
    placed = place(globals()[kind], strategy, **options)
    found = take_turns(placed)
    expected = by_hand(globals()[kind])
    state = dict(placed.full_state())
    assert state.keys() == expected.keys()
    difference = max(float((state[name] - weight).abs().max()) for name, weight in expected.items())
    return difference, {turn: sorted(names) for turn, names in found.items()}


PLACES: list[tuple[int, str, dict[str, Any], type[Wgan]]] = [
    (2, "ddp", {}, Plain),
    (2, "ddp", {}, Wgan),
    (2, "ddp", {"static_graph": True}, Wgan),
    (2, "ddp", {"find_unused_parameters": True}, Wgan),
    (2, "fsdp2", {}, Plain),
    (2, "fsdp2", {}, Wgan),
    (2, "fsdp2", {"reshard_after_forward": False}, Wgan),
    (2, "fsdp2", {"find_unused_parameters": True}, Wgan),
    (2, "fsdp2", {"cpu_offload": True}, Wgan),
    (2, "tp", {}, Plain),
    (2, "tp", {}, Wgan),
    (2, "tp", {}, ByTorchsStyles),
    (2, "tp", {}, ScaledOnCut),
    (4, "fsdp2", {"tensor_parallel": 2}, Wgan),
    (4, "fsdp2", {"replicas": 2}, Wgan),
]


@pytest.mark.parametrize(
    ("world", "strategy", "options", "kind"), PLACES, ids=lambda part: getattr(part, "__name__", str(part))
)
def test_weights_are_those_of_a_loop_by_hand(
    ranks: dict[int, Ranks], world: int, strategy: str, options: dict[str, Any], kind: type[Wgan]
) -> None:
    if kind.penalty and (strategy == "tp" or "tensor_parallel" in options) and not CAN_DIFFERENTIATE_TWICE:
        pytest.skip("this torch has no gradients of gradients through cut layers")
    if options.get("find_unused_parameters") and strategy == "fsdp2" and torch.__version__ < "2.13":
        pytest.skip("an older torch is refused")
    moved = {turn: sorted(names) for turn, names in moved_by(make(kind)).items()}
    for difference, found in ranks[world].run(compare, kind=kind.__name__, strategy=strategy, options=options):
        assert found == moved
        assert difference < 1e-9


# Traffic.


def sizes(module: nn.Module, turn: str, units: bool) -> list[int]:
    """The numbers in a turn's gradients: in all, or those of each unit of its own that is sharded, and of the root."""
    own = {name: p.numel() for name, p in module.named_parameters() if name.startswith(turn)}
    if not units:
        return [sum(own.values())]
    blocks = [sum(n for name, n in own.items() if f".blocks.{i}." in name) for i in range(2)]
    return sorted([*blocks, sum(own.values()) - sum(blocks)])


def listen(strategy: str, options: dict[str, Any]) -> dict[str, list[Message]]:
    """What was reduced from a turn's first forward to its last backward."""
    traffic = Traffic()

    def look(where: str) -> None:
        traffic.where = where

    placed = place(Wgan, strategy, **options)
    with traffic:
        take_turns(placed, look)
    kinds = ("allreduce", "reduce_scatter_base")
    return {
        where: [message for message in messages if message[0] in kinds]
        for where, messages in traffic.messages.items()
        if where.startswith(TURNS)
    }


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"compress_gradients": "bf16"}], ids=str)
def test_ddp_reduces_what_the_turn_moves_once(ranks: dict[int, Ranks], options: dict[str, Any]) -> None:
    dtype = "bfloat16" if "compress_gradients" in options else "float64"
    for reduced in ranks[2].run(listen, strategy="ddp", options=options):
        assert len(reduced) == ROUNDS + ROUNDS // 2
        for where, messages in list(reduced.items())[3:]:  # with a static graph, torch learns it in a turn's first
            assert messages == [("allreduce", dtype, sizes(make(Wgan), where.split()[0], units=False)[0])], where


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}], ids=str)
def test_fsdp2_reduces_what_the_turn_moves_once(ranks: dict[int, Ranks], options: dict[str, Any]) -> None:
    """In shards that are padded to be equal: of a block's numbers at most one row of each parameter is added."""
    if options and torch.__version__ < "2.13":
        pytest.skip("an older torch is refused")
    for reduced in ranks[2].run(listen, strategy="fsdp2", options=options):
        assert len(reduced) == ROUNDS + ROUNDS // 2
        for where, messages in reduced.items():
            assert {name for name, _, _ in messages} == {"reduce_scatter_base"}
            found, expected = sorted(count for _, _, count in messages), sizes(make(Wgan), where.split()[0], units=True)
            assert len(found) == len(expected) == 3
            assert all(0 <= 2 * count - size <= 3 * WIDTH for count, size in zip(found, expected, strict=True)), where


# Loss scales, masters, other weights.


def overflow(strategy: str) -> tuple[dict[str, float], set[str]]:
    """The scales after a round in which the critic's gradients overflow on rank 1 alone, and what has moved."""
    placed = place(Plain, strategy, FP16Mixed(initial_scale=2.0**10))
    before = {name: tensor.clone() for name, tensor in placed.full_state()}
    for turn in TURNS:
        with placed.turn(turn):
            batch = batches()[0].chunk(2)[placed.data_rank]
            placed.module.begin(turn, batch * (1e30 if turn == "critic" and placed.rank else 1.0))  # type: ignore[operator]
            with placed.accumulate(True):
                with placed.forward_context():
                    loss = placed.model()
                placed.backward(loss)
            placed.prepare_gradients()
            placed.step()
            assert placed.step_was_skipped() == (turn == "critic")
            for parameter in placed.parameters_in_turn(turn):
                parameter.grad = None
    moved = {name.split(".")[0] for name, tensor in placed.full_state() if not torch.equal(tensor, before[name])}
    return placed.precision.log_values(), moved


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_all_ranks_skip_the_turn_that_overflowed_on_one(ranks: dict[int, Ranks], strategy: str) -> None:
    for scales, moved in ranks[2].run(overflow, strategy=strategy):
        assert scales == {"loss_scale_critic": 2.0**9, "loss_scale_generator": 2.0**10}
        assert moved == {"generator"}


def hold() -> None:
    """FSDP2 in 16 bits: float32 masters in the state of each turn's optimizer, and other weights for a while."""
    placed = place(Wgan, "fsdp2", "bf16-true")
    take_turns(placed)
    state, parameters = placed.optimizer_state(), placed.named_parameters()
    assert state.keys() == parameters.keys()
    for name, entries in state.items():
        assert entries["master_weight"].dtype == torch.float32
        assert torch.equal(entries["master_weight"].to_local().bfloat16(), parameters[name].to_local())
        assert ("exp_avg" in entries) == name.startswith("critic"), name
    held = placed.held_weights()
    own = {name: parameter.to_local().clone() for name, parameter in parameters.items()}
    with placed.with_weights({name: torch.zeros_like(part) for name, part in held.items()}):
        assert not any(part.any() for _, part in placed.full_state())
    assert all(torch.equal(parameter.to_local(), own[name]) for name, parameter in parameters.items())


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="bf16-true needs torch 2.10")
def test_masters_and_other_weights_are_of_all_turns(ranks: dict[int, Ranks]) -> None:
    ranks[2].run(hold)


# A parameter without a gradient.


class Idle(Plain):
    """The critic has a layer that it doesn't use."""

    def __init__(self) -> None:
        super().__init__()
        self.critic.register_parameter("idle", nn.Parameter(torch.zeros(3)))


def leave_out(strategy: str, options: dict[str, Any]) -> str:
    try:
        take_turns(place(Idle, strategy, **options))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_ddp_says_in_which_turn_no_gradient_came(ranks: dict[int, Ranks]) -> None:
    for said in ranks[2].run(leave_out, strategy="ddp", options={}):
        assert "no gradient reached critic.idle on rank" in said and "in this turn of 'critic'" in said
    assert ranks[2].run(leave_out, strategy="ddp", options={"find_unused_parameters": True}) == ["", ""]
    assert ranks[2].run(leave_out, strategy="fsdp2", options={}) == ["", ""]


# Sequences that ranks share.


class Attention(nn.Module):
    """Two causal heads, added to their input."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.join = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        heads = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.join(heads.transpose(1, 2).flatten(2))


class SequenceGan(TrainModule):
    """A generator of sequences and its critic."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, 8), Attention(), nn.Linear(8, 3))
        self.critic = nn.Sequential(nn.Linear(3, 8), Attention(), nn.Linear(8, 1))

    def forward(self, real: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.critic(real)

    def shard_units(self) -> list[nn.Module]:
        return [self.generator[1], self.critic[1]]

    def count_items(self, batch: dict[str, Tensor]) -> int:
        return batch["real"][..., 0].numel()

    def turns(self) -> list[Turn]:
        return [
            Turn("critic", self.critic_loss, "critic"),
            Turn("generator", self.generator_loss, "generator", every=2),
        ]

    def critic_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.critic(self.generator(batch["noise"])).mean() - self.critic(batch["real"]).square().mean()

    def generator_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return -self.critic(self.generator(batch["noise"])).mean()


def train_on_sequences(**arguments: Any) -> dict[str, list[Any]]:
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(8)
    sizes = {"real": (8, 3), "noise": (8, 2)}
    rows = [{name: torch.rand(size, generator=generator) for name, size in sizes.items()} for _ in range(24)]
    labelled = [{**row, "labels": torch.zeros(8, dtype=torch.long)} for row in rows]
    fit = make_fit(SequenceGan(), labelled, max_steps=3, optim="sgd", per_device_train_batch_size=4, **arguments)
    fit.train()
    return curves(fit)


def test_ranks_that_share_sequences_take_turns(ranks: dict[int, Ranks]) -> None:
    expected = train_on_sequences()
    for found in ranks[2].run(train_on_sequences, strategy="fsdp2", options={"context_parallel": 2}):
        for name in ("loss_critic", "loss_generator", "grad_norm_critic", "grad_norm_generator"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5), name
