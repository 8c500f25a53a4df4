"""Buffers that forward changes: the same on every rank wherever the model is evaluated, saved or exported; and
BatchNorm over all ranks.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from safetensors.torch import load_file
from stratagem import Callback, TrainModule, Turn
from torch import Tensor, nn
from training import make_fit

UPDATES = 6
PLACEMENTS: list[tuple[str, dict[str, Any]]] = [
    ("ddp", {}),
    ("fsdp1", {}),
    ("fsdp2", {}),
    ("fsdp2", {"tensor_parallel": 2}),
    ("deepspeed_stage_0", {}),
    ("deepspeed_stage_1", {}),
    ("deepspeed_stage_2", {}),
    ("deepspeed_stage_3", {}),
]
everywhere = pytest.mark.parametrize(
    ("strategy", "options"),
    [pytest.param(*where, marks=() if where == ("fsdp2", {}) else pytest.mark.slow) for where in PLACEMENTS],
)


class Normed(TrainModule):
    """Batch statistics, a moving average that forward uses (in place or anew), a flag, and a table that stays."""

    def __init__(self, anew: bool = False) -> None:
        super().__init__()
        self.anew = anew
        self.up, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("recent", torch.zeros(2), persistent=False)
        self.register_buffer("table", torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.up(x))
        if self.training:
            mean = hidden.detach().square().mean(0)
            if self.anew:
                self.average = 0.9 * self.average + 0.1 * mean
            else:
                self.average.mul_(0.9).add_(mean, alpha=0.1)
            self.recent.copy_(mean[:2])
        hidden = hidden + self.narrow(torch.tanh(self.wide(hidden)))
        return self.head(torch.tanh(hidden) - self.average + 0.01 * self.table)

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {"wide": "colwise", "narrow": "rowwise"}

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(outputs, batch["y"])


class Anew(Normed):
    """Its moving average is another tensor after each forward."""

    def __init__(self) -> None:
        super().__init__(anew=True)


def rows(count: int = 64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 4, generator=generator) * torch.linspace(0.2, 3.0, count)[:, None]
    return [{"x": row, "y": row.sum(0, keepdim=True)} for row in x]


def fit_of(module: TrainModule, **arguments: Any) -> Any:
    options = {"max_steps": UPDATES, "per_device_train_batch_size": 4, "learning_rate": 0.02, **arguments}
    return make_fit(module, rows(), rows(30), per_device_eval_batch_size=4, **options)


def buffers(fit: Any) -> dict[str, list[float]]:
    return {name: buffer.double().flatten().tolist() for name, buffer in fit.module.named_buffers()}


def train_and_resume(directory: str, module: type[TrainModule], **arguments: Any) -> dict[str, Any]:
    """A whole run, what it says at its end, and a run that goes on from its third update."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    saving = {"output_dir": directory, "save_strategy": "steps", "save_steps": 3}
    fit = fit_of(module(), **saving, **arguments)
    fit.train()
    after = buffers(fit)
    evaluated = fit.evaluate()["eval_loss"]
    fit.export(f"{directory}/whole.safetensors")
    losses = [log["loss"] for log in fit.state.log_history if "loss" in log]
    fit = fit_of(module(), **arguments)
    fit.train(resume_from_checkpoint=f"{directory}/checkpoint-3")
    fit.export(f"{directory}/resumed.safetensors")
    resumed = [log["loss"] for log in fit.state.log_history if "loss" in log]
    return {"buffers": after, "evaluated": evaluated, "losses": losses, "resumed": resumed}


@everywhere
@pytest.mark.parametrize("module", [pytest.param(Normed, marks=pytest.mark.slow), Anew])
def test_what_is_evaluated_is_what_is_exported_and_resumed(
    ranks: dict[int, Ranks], tmp_path: Path, strategy: str, options: dict[str, Any], module: type[TrainModule]
) -> None:
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    arguments = {"strategy": strategy, "options": options, "gradient_accumulation_steps": 2}
    world = 2 * options.get("tensor_parallel", 1)
    found = ranks[world].run(train_and_resume, directory=str(tmp_path), module=module, **arguments)
    assert found == [found[0]] * world  # buffers included, persistent or not
    exported = load_file(tmp_path / "whole.safetensors")
    alone = module()
    alone.load_state_dict(exported)
    alone.eval()
    with torch.no_grad():
        x, y = (torch.stack([row[key] for row in rows(30)]) for key in ("x", "y"))
        expected = float(nn.functional.mse_loss(alone(x), y))
    assert found[0]["evaluated"] == pytest.approx(expected, rel=1e-6)
    assert found[0]["resumed"] == found[0]["losses"]
    for name, tensor in load_file(tmp_path / "resumed.safetensors").items():
        assert torch.equal(tensor, exported[name]), name
    assert exported["norm.num_batches_tracked"] == 2 * UPDATES
    assert torch.equal(exported["table"], torch.arange(8.0))


def by_hand(world: int, accumulation: int) -> tuple[list[float], dict[str, Tensor]]:
    """The rule in one process: as many copies of the module as ranks, of which the first one's buffers win."""
    torch.manual_seed(0)
    copies = [Normed() for _ in range(world)]
    for copy in copies:
        copy.load_state_dict(copies[0].state_dict())
        copy.recent.copy_(copies[0].recent)
    optimizer = torch.optim.SGD(copies[0].parameters(), lr=0.02)
    data, losses, per_update = rows(), [], 4 * world * accumulation
    for update in range(4):
        chosen = data[update * per_update : (update + 1) * per_update]
        for copy in copies[1:]:
            for mine, first in zip(copy.buffers(), copies[0].buffers(), strict=True):
                mine.copy_(first)
            for mine, first in zip(copy.parameters(), copies[0].parameters(), strict=True):
                mine.data.copy_(first.data)
        total = 0.0
        for micro_batch in range(accumulation):
            for rank, copy in enumerate(copies):
                begin = 4 * (micro_batch * world + rank)
                x, y = (torch.stack([row[key] for row in chosen[begin : begin + 4]]) for key in ("x", "y"))
                loss = nn.functional.mse_loss(copy(x), y) / (world * accumulation)
                loss.backward()
                total += loss.item()
        for parameters in zip(*(copy.parameters() for copy in copies), strict=True):
            parameters[0].grad = torch.stack([p.grad for p in parameters]).sum(0)
            for parameter in parameters[1:]:
                parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, dict(copies[0].named_buffers())


def train_plainly(module: type[TrainModule] = Normed, **arguments: Any) -> dict[str, Any]:
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    options = {"max_steps": 4, "optim": "sgd", "lr_scheduler_type": "constant", "shuffle": False, "max_grad_norm": 0.0}
    fit = fit_of(module(), **options, **arguments)
    fit.train()
    shared = sorted(".".join(name).lstrip(".") for name in fit.strategy.buffers.shared)
    losses = [log["loss"] for log in fit.state.log_history if "loss" in log]
    return {"losses": losses, "buffers": buffers(fit), "shared": shared}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", pytest.param("fsdp1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_first_ranks_buffers_win_before_each_update(
    ranks: dict[int, Ranks], strategy: str, accumulation: int
) -> None:
    losses, expected = by_hand(2, accumulation)
    found = ranks[2].run(train_plainly, strategy=strategy, gradient_accumulation_steps=accumulation)
    assert found[1] == found[0]
    assert found[0]["losses"] == pytest.approx(losses, rel=1e-6)
    for name, buffer in expected.items():
        assert found[0]["buffers"][name] == pytest.approx(buffer.flatten().tolist(), rel=1e-5, abs=1e-7), name
    statistics = ["norm.num_batches_tracked", "norm.running_mean", "norm.running_var"]
    assert found[0]["shared"] == ["average", *statistics, "recent"]  # the table stays where it is


class Late(Normed):
    """From its third forward on, and on the last rank alone, one more buffer changes; and one has other shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = 0
        self.register_buffer("late", torch.zeros(3))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        rank = int(os.environ["RANK"])
        if self.training and self.forwards > 2 and rank:
            self.late += 1.0
        if self.training:
            self.cache = torch.ones(2 + rank)
        return super().forward(x) + 0.1 * self.late.sum()


class Watch(Callback):
    """Notes the buffer that changes late as each update finds it."""

    def __init__(self) -> None:
        self.late: list[float] = []

    def on_step_begin(self, *context: Any, fit: Any, **_: Any) -> None:
        self.late.append(fit.module.late.tolist()[0])


def train_late() -> dict[str, Any]:
    watch = Watch()
    with pytest.warns(UserWarning, match=r"other shapes or dtypes on other ranks: cache\."):
        found = train_plainly(Late, strategy="fsdp2", callbacks=[watch])
    return {**found, "late": watch.late, "cache": len(found["buffers"].pop("cache"))}


def test_a_change_on_one_rank_is_seen_by_all(ranks: dict[int, Ranks]) -> None:
    found = ranks[2].run(train_late)
    assert [result["late"] for result in found] == [[0.0] * 4] * 2
    assert found[0]["shared"] == found[1]["shared"]
    assert "late" in found[0]["shared"]
    assert [result["cache"] for result in found] == [2, 3]


class Still(Normed):
    """Nothing changes its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()  # type: ignore[assignment]
        self.wide = self.narrow = nn.Identity()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(x)) + 0.01 * self.table)


def count_broadcasts(strategy: str, module: type[TrainModule]) -> int:
    """Messages that a run sends for its buffers after it was placed."""
    calls = []
    send = dist._broadcast_coalesced

    def counted(group: Any, tensors: list[Tensor], *rest: Any) -> None:
        calls.append(len(tensors))
        send(group, tensors, *rest)

    class Begin(Callback):
        def on_train_begin(self, *context: Any, **_: Any) -> None:
            calls.clear()  # DDP's own, when it was made

    dist._broadcast_coalesced = counted
    try:
        train_plainly(module, strategy=strategy, callbacks=[Begin()])
    finally:
        dist._broadcast_coalesced = send
    return len(calls)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_buffers_that_stay_cost_no_message(ranks: dict[int, Ranks], strategy: str) -> None:
    assert ranks[2].run(count_broadcasts, strategy=strategy, module=Still) == [0, 0]
    assert ranks[2].run(count_broadcasts, strategy=strategy, module=Normed) == [5, 5]  # 3, 1 to compare, 1 at the end


class Joint(TrainModule):
    """BatchNorms of sequences and of rows, one with a mean that is large beside its deviation."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.lift, self.first = nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=momentum)
        self.second, self.head = nn.BatchNorm1d(3, affine=False), nn.Linear(6, 1)
        with torch.no_grad():
            self.lift.bias.fill_(30.0)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(self.lift(x)).view(-1, 3, 2)
        return self.head(torch.tanh(self.second(hidden)).flatten(1))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(outputs, batch["y"])


class Cumulative(Joint):
    """Its running statistics are plain means."""

    def __init__(self) -> None:
        super().__init__(momentum=None)


def train_jointly(module: type[TrainModule], path: str, **arguments: Any) -> dict[str, Any]:
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    options = {"max_steps": 5, "optim": "sgd", "shuffle": False, "num_train_epochs": 2, "logging_steps": 1}
    fit = make_fit(module(), rows(46), rows(30), **{"learning_rate": 0.02, **options, **arguments})
    fit.train()
    fit.export(path)
    logs = [log for log in fit.state.log_history if "loss" in log]
    found = {name: [log[name] for log in logs] for name in ("loss", "grad_norm")}
    return {**found, "eval": fit.evaluate()["eval_loss"]}


SYNCHRONIZED = ["ddp", "fsdp2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("fsdp1", "deepspeed_stage_2"))]


@pytest.mark.parametrize("strategy", SYNCHRONIZED)
@pytest.mark.parametrize("module", [Joint, Cumulative])
def test_batch_norm_over_all_ranks_is_one_devices(
    ranks: dict[int, Ranks], tmp_path: Path, strategy: str, module: type[TrainModule]
) -> None:
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    alone = train_jointly(module, str(tmp_path / "alone.safetensors"), per_device_train_batch_size=16)
    found = ranks[2].run(
        train_jointly,
        module=module,
        path=str(tmp_path / "ranks.safetensors"),
        strategy=strategy,
        options={"sync_batchnorm": True},
        per_device_train_batch_size=8,
    )
    assert found[1] == found[0]
    # The third batch is 14 samples, 8 and 6 of them: a rank's share counts by its samples.
    for name in alone:
        assert found[0][name] == pytest.approx(alone[name], rel=1e-5), name
    expected, weights = (load_file(tmp_path / f"{name}.safetensors") for name in ("alone", "ranks"))
    module().load_state_dict(weights)  # plain BatchNorms take it
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def normalize(sizes: list[int], double: bool) -> dict[str, Any]:
    """Output, gradients and statistics of one layer whose rank has so many samples; of one device on all of them."""
    from stratagem.strategies.batch_norm import separate, synchronize

    rank, dtype = dist.get_rank(), torch.float64 if double else torch.float32
    torch.manual_seed(3)
    everything = torch.randn(sum(sizes), 5, 2, 3, dtype=dtype) * 3 + 40
    upstream = torch.randn_like(everything)
    layer, plain = nn.BatchNorm2d(5, dtype=dtype), nn.BatchNorm2d(5, dtype=dtype)
    for one in (layer, plain):
        nn.init.normal_(one.weight, generator=torch.Generator().manual_seed(1))
    synchronize(layer, dist.group.WORLD)
    begin = sum(sizes[:rank])
    mine = everything[begin : begin + sizes[rank]].clone().requires_grad_()
    whole = everything.clone().requires_grad_()
    output, expected = layer(mine), plain(whole)
    (output * upstream[begin : begin + sizes[rank]]).sum().backward()
    (expected * upstream).sum().backward()
    gradients = torch.stack([layer.weight.grad, layer.bias.grad])
    dist.all_reduce(gradients)
    pairs = {
        "output": (output, expected[begin : begin + sizes[rank]]),
        "gradient": (mine.grad, whole.grad[begin : begin + sizes[rank]]),
        "parameters": (gradients, torch.stack([plain.weight.grad, plain.bias.grad])),
        "mean": (layer.running_mean, plain.running_mean),
        "variance": (layer.running_var, plain.running_var),
        "evaluated": (layer.eval()(mine), plain.eval()(mine)),
    }
    separate(layer)
    assert "forward" not in vars(layer)
    assert layer.num_batches_tracked == plain.num_batches_tracked == 1
    return {
        name: float((a - b).abs().max()) / float(b.abs().max()) if a.numel() else 0.0 for name, (a, b) in pairs.items()
    }


@pytest.mark.parametrize("sizes", [[4, 4], [1, 6], [0, 3]], ids=str)
def test_batch_norm_of_unequal_shares(ranks: dict[int, Ranks], sizes: list[int]) -> None:
    for double, tolerance in ((False, 2e-6), (True, 1e-13)):
        for found in ranks[2].run(normalize, sizes=sizes, double=double):
            assert all(error < tolerance for error in found.values()), (double, found)


def test_sync_batchnorm_without_batch_norm_is_refused() -> None:
    class Plain(Still):
        pass

    with pytest.raises(ValueError, match="sync_batchnorm=True has no effect: Plain has no BatchNorm layer"):
        train_plainly(Plain, strategy="ddp", options={"sync_batchnorm": True})


class Gan(TrainModule):
    """Its generator has a batch norm, and notes without telling, in its own turn alone, which samples it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.critic = nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(()))

    def turns(self) -> list[Turn]:
        critic = Turn("critic", self.critic_loss, "critic", optim="sgd")
        return [critic, Turn("generator", self.generator_loss, "generator", every=2, optim="sgd")]

    def critic_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.critic(self.generator(batch["x"])).mean() - self.critic(batch["x"]).square().mean()

    def generator_loss(self, batch: dict[str, Tensor]) -> Tensor:
        self.seen.data.add_(batch["x"].sum())  # which changes no version
        return -self.critic(self.generator(batch["x"])).mean()


def train_gan(strategy: str) -> dict[str, Any]:
    fit = make_fit(
        Gan(), rows(), strategy=strategy, max_steps=4, per_device_train_batch_size=2, shuffle=False, precision="64-true"
    )
    fit.train()
    return {name: buffer.double().flatten().tolist() for name, buffer in fit.module.named_buffers()}


def test_buffers_that_one_turn_changes_are_the_first_ranks(ranks: dict[int, Ranks]) -> None:
    found = [found for strategy in ("ddp", "fsdp2") for found in ranks[2].run(train_gan, strategy=strategy)]
    for other in found[1:]:
        for name, values in found[0].items():
            assert other[name] == pytest.approx(values, rel=1e-9), name
    assert found[0]["generator.1.num_batches_tracked"] == [3 * 4]  # two turns of the critic a round, one of its own
    batches = torch.stack([row["x"] for row in rows()]).double().split(4)  # of which the first rank has the first half
    assert found[0]["seen"] == pytest.approx([float(sum(batch[:2].sum() for batch in batches[1:8:2]))])
