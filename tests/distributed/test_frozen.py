"""Frozen teachers on ranks: a hand-written distillation's numbers, memory and files counted, and resumed to the bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankFailure, Ranks
from safetensors.torch import load_file
from stratagem import TrainModule, frozen
from stratagem.strategies.local_parts import local_part
from torch import Tensor, nn
from training import Block, make_fit

WIDTH, UPDATES, BATCH, RATE = 6, 6, 8, 0.01
PLACES = [(2, "ddp"), (2, "fsdp1"), (2, "fsdp2"), (2, "tp")]
everywhere = pytest.mark.parametrize(("world", "strategy"), PLACES, ids=str)


def make_teacher() -> nn.Module:
    """Everything that training would change although no parameter trains: dropout, and a norm's statistics."""
    torch.manual_seed(7)
    norm = nn.BatchNorm1d(WIDTH)
    norm.running_mean, norm.running_var = torch.randn(WIDTH), torch.rand(WIDTH) + 0.5
    return nn.Sequential(Block(), norm, nn.Dropout(0.5), nn.Linear(WIDTH, 400), nn.Tanh(), nn.Linear(400, 3))


class Distilled(TrainModule):
    """A student of blocks, and a teacher that forward or loss calls."""

    def __init__(self, precision: str | None = "bf16-true", saved: str = "once", in_loss: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)
        self.teacher = frozen(make_teacher(), precision=precision, saved=saved)
        self.in_loss = in_loss

    def forward(self, x: Tensor) -> Any:
        taught = None if self.in_loss else self.teacher(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x), taught

    def loss(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        answer, taught = outputs
        taught = self.teacher(batch["x"]) if taught is None else taught
        assert not taught.requires_grad
        return nn.functional.mse_loss(answer.float(), taught.float())

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}


class Bare(nn.Module):
    """The same student without stratagem."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Judged(TrainModule):
    """Blocks whose outputs a frozen part judges: gradients go through it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.judge = frozen(make_teacher(), precision="64-true", input_gradients=True)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.judge(x)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return outputs.square().mean()


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(WIDTH, generator=generator)} for _ in range(UPDATES * BATCH)]


def hand_written(dtype: torch.dtype = torch.bfloat16) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of a loop on one device."""
    student, teacher = Bare(), make_teacher().to(dtype).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    losses, data = [], torch.stack([row["x"] for row in rows()])
    for x in data.split(BATCH):
        with torch.no_grad():
            taught = teacher(x.to(dtype)).float()
        loss = nn.functional.mse_loss(student(x), taught)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, dict(student.state_dict())


def distill(
    strategy: str = "single",
    world: int = 1,
    module: dict[str, Any] | None = None,
    resume: Any = None,
    export: str | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """A run; its losses, and what this rank holds for the teacher."""
    fit = make_fit(
        Distilled(**(module or {})),
        rows(),
        strategy=strategy,
        per_device_train_batch_size=BATCH if strategy == "tp" else BATCH // world,
        **{
            "max_steps": UPDATES,
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "shuffle": False,
            **arguments,
        },
    )
    fit.train(resume_from_checkpoint=resume)
    named = fit.strategy.named_parameters()
    teacher = {name: p for name, p in named.items() if name.startswith("teacher.")}
    stepped = {id(p) for group in fit.optimizer.param_groups for p in group["params"]}
    found = {
        "losses": [log["loss"] for log in fit.state.log_history if "loss" in log],
        "bytes": sum(local_part(p.detach()).nbytes for p in teacher.values()),
        "dtypes": sorted({str(p.dtype) for p in teacher.values()}),
        "has": sorted(name for name, p in teacher.items() if p.grad is not None or p.requires_grad or id(p) in stepped),
        "state": sorted(name for name in fit.strategy.optimizer_state() if name.startswith("teacher.")),
        "training": any(layer.training for layer in fit.module.teacher.modules() if not list(layer.children())),
    }
    if export is not None:
        fit.export(export)
    fit.close()
    return found


def assert_weights(path: str, expected: dict[str, Tensor], tolerance: float) -> None:
    found = load_file(path)
    assert found.keys() == expected.keys()  # the teacher isn't exported
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=tolerance)


@pytest.mark.parametrize("in_loss", [True, False], ids=["loss", "forward"])
@everywhere
def test_distillation_is_that_of_a_loop_by_hand(
    ranks: dict[int, Ranks], tmp_path: Path, world: int, strategy: str, in_loss: bool
) -> None:
    losses, weights = hand_written()
    file = str(tmp_path / "student.safetensors")
    found = ranks[world].run(distill, strategy=strategy, world=world, module={"in_loss": in_loss}, export=file)
    numbers = sum(p.numel() for p in make_teacher().parameters())
    for each in found:
        assert each["losses"] == pytest.approx(losses, abs=1e-6)
        assert each["dtypes"] == ["torch.bfloat16"]
        assert each["has"] == each["state"] == []
        assert not each["training"]
    assert_weights(file, weights, 1e-6)
    held = [each["bytes"] for each in found]
    if strategy in ("ddp", "tp"):
        assert held == [2 * numbers] * world
    else:  # sharded, in two bytes a number
        assert sum(held) == 2 * numbers and max(held) < 1.2 * numbers


def test_on_one_device_it_is_the_loop_to_the_bit(tmp_path: Path) -> None:
    losses, weights = hand_written()
    file = str(tmp_path / "student.safetensors")
    assert distill(export=file)["losses"] == losses
    assert_weights(file, weights, 0.0)


def judged(strategy: str = "single", world: int = 1) -> list[float]:
    run = {"max_steps": UPDATES, "shuffle": False, "max_grad_norm": 0.0, "learning_rate": RATE}
    fit = make_fit(Judged(), rows(), strategy=strategy, per_device_train_batch_size=BATCH // world, **run)
    fit.train()
    assert all(p.grad is None for p in fit.module.judge.parameters())
    losses = [log["loss"] for log in fit.state.log_history if "loss" in log]
    fit.close()
    return losses


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_gradients_go_through_it_where_that_is_asked_for(ranks: dict[int, Ranks], strategy: str) -> None:
    bare, judge = Judged().blocks, make_teacher().double().eval()
    optimizer = torch.optim.AdamW(bare.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0 - update / UPDATES)
    losses = []
    for x in torch.stack([row["x"] for row in rows()]).split(BATCH):
        for block in bare:
            x = block(x)
        loss = judge(x.double()).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for found in ranks[2].run(judged, strategy=strategy, world=2):
        assert found == pytest.approx(losses, abs=1e-6) and losses[-1] < losses[0]


# Checkpoints.


def bytes_on_disk(directory: Path, pattern: str) -> int:
    """What files take, each counted once whatever names it has."""
    found = {(stat.st_dev, stat.st_ino): stat.st_size for path in directory.glob(pattern) for stat in [path.stat()]}
    return sum(found.values())


def saved_names(checkpoint: Path) -> set[str]:
    listed = json.loads((checkpoint / "state.json").read_text())["model"]
    return {name for name in listed if name.startswith("teacher.")}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "strategy"), [(2, "ddp"), (2, "fsdp1"), (2, "fsdp2")], ids=str)
def test_a_teacher_is_saved_once_and_resumed_from_any_checkpoint_that_is_left(
    ranks: dict[int, Ranks], tmp_path: Path, world: int, strategy: str
) -> None:
    there = tmp_path / "there"
    run: dict[str, Any] = {"strategy": strategy, "world": world, "output_dir": str(there)}
    saves = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    whole = ranks[world].run(distill, **run, **saves, export=str(tmp_path / "whole"))
    assert sorted(path.name for path in there.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    size = sum(tensor.nbytes for tensor in make_teacher().bfloat16().state_dict().values())
    on_disk = bytes_on_disk(there, "checkpoint-*/model/*-frozen-*")
    assert size <= on_disk < size + world * 2500  # headers
    assert saved_names(there / "checkpoint-5") == {f"teacher.{name}" for name in make_teacher().state_dict()}

    (there / "checkpoint-6").rename(tmp_path / "away")  # takes nothing from the other
    resumed = ranks[world].run(
        distill, **run, save_strategy="no", resume=str(there / "checkpoint-5"), export=str(tmp_path / "again")
    )
    assert [each["losses"] for each in resumed] == [each["losses"] for each in whole]
    first, again = load_file(tmp_path / "whole"), load_file(tmp_path / "again")
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())
    # One device goes on from it, too, and takes the teacher from there.
    alone = distill(resume=str(tmp_path / "away"), max_steps=UPDATES, save_strategy="no", output_dir=str(tmp_path))
    assert alone["losses"] == pytest.approx(whole[0]["losses"], abs=1e-6)


def resume_with_another_teacher(strategy: str, world: int, output_dir: str, resume: str) -> str:
    module = Distilled(saved="never")
    fit = make_fit(module, rows(), strategy=strategy, max_steps=UPDATES, shuffle=False, output_dir=output_dir)
    with torch.no_grad():
        module.teacher[3].bias.add_(1.0)
    with pytest.raises(ValueError) as caught:
        fit.train(resume_from_checkpoint=resume)
    fit.close()
    return str(caught.value)


@pytest.mark.parametrize(("world", "strategy"), [(2, "fsdp1"), (2, "fsdp2")], ids=str)
def test_a_teacher_that_is_never_saved_must_be_the_same_at_a_resume(
    ranks: dict[int, Ranks], tmp_path: Path, world: int, strategy: str
) -> None:
    run: dict[str, Any] = {"strategy": strategy, "world": world, "module": {"saved": "never"}}
    saves = {"save_strategy": "steps", "save_steps": 3, "output_dir": str(tmp_path)}
    whole = ranks[world].run(distill, **run, **saves)
    checkpoint = tmp_path / "checkpoint-3"
    assert saved_names(checkpoint) == set() and not list(checkpoint.glob("model/*-frozen-*"))
    resumed = ranks[world].run(distill, **run, save_strategy="no", output_dir=str(tmp_path), resume=str(checkpoint))
    assert [each["losses"] for each in resumed] == [each["losses"] for each in whole]
    for said in ranks[world].run(
        resume_with_another_teacher, strategy=strategy, world=world, output_dir=str(tmp_path), resume=str(checkpoint)
    ):
        assert "teacher.3.bias" in said and "other values" in said and "teacher.3.weight" not in said


# Other number formats, and DeepSpeed.


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "precision", "own"), [
    ("fsdp1", "bf16-mixed", "bf16-true"),
    ("fsdp2", "bf16-mixed", "bf16-true"),
    ("fsdp1", "bf16-true", "32-true"),
    ("fsdp2", "bf16-true", "32-true"),
    ("fsdp2", "bf16-mixed", "32-true"),
    ("fsdp1", "bf16-mixed", None),
    ("fsdp2", "bf16-mixed", None),
    ("ddp", "bf16-true", "bf16-mixed"),
    ("fsdp2", "bf16-mixed", "bf16-mixed"),
])  # fmt: skip
def test_its_own_precision_beside_the_runs(
    ranks: dict[int, Ranks], strategy: str, precision: str, own: str | None
) -> None:
    module = {"precision": own, "in_loss": False}
    alone = distill(precision=precision, module=module)
    for each in ranks[2].run(distill, strategy=strategy, world=2, precision=precision, module=module):
        assert each["losses"] == pytest.approx(alone["losses"], rel=1e-2)
        assert each["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-5)  # one batch in halves, so far
        assert each["dtypes"] == alone["dtypes"]
        assert each["dtypes"] == ["torch.bfloat16" if own == "bf16-true" else "torch.float32"]


@pytest.mark.parametrize("strategy", ["deepspeed_stage_0", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_deepspeed_distils_with_parameters_in_float32(ranks: dict[int, Ranks], tmp_path: Path, strategy: str) -> None:
    module = {"precision": "32-true"}
    losses, weights = hand_written(torch.float32)
    run: dict[str, Any] = {"strategy": strategy, "world": 2, "module": module, "output_dir": str(tmp_path)}
    saves = {"save_strategy": "steps", "save_steps": 2, "export": str(tmp_path / "student.safetensors")}
    found = ranks[2].run(distill, **run, **saves)
    for each in found:
        assert each["losses"] == pytest.approx(losses, abs=1e-6)
        assert each["state"] == [] and not each["training"]
    assert_weights(str(tmp_path / "student.safetensors"), weights, 1e-6)
    size = sum(tensor.nbytes for tensor in make_teacher().state_dict().values())
    assert size <= bytes_on_disk(tmp_path, "checkpoint-*/model/*-frozen-*") < size + 2 * 2500
    again = ranks[2].run(distill, **run, resume=str(tmp_path / "checkpoint-2"), save_strategy="no")
    assert [each["losses"] for each in again] == [each["losses"] for each in found]


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2"])
def test_deepspeed_refuses_other_parameters_by_name(ranks: dict[int, Ranks], strategy: str) -> None:
    with pytest.raises(RankFailure, match=r"'teacher' \(bf16-true\).*strategy='fsdp2' or 'ddp'"):
        ranks[2].run(distill, strategy=strategy, world=2)


class Late(Distilled):
    """Its teacher is made where it is placed, with values of a file."""

    def __init__(self) -> None:
        super().__init__()
        del self.teacher

    def build(self) -> None:
        self.teacher = frozen(nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 3)), precision="bf16-true")

    def initial_values(self, name: str, part: tuple[slice, ...]) -> Tensor | None:
        return torch.linspace(-1, 1, 48).view(6, 8)[:3].expand(3, 8)[part] if name == "teacher.2.weight" else None


def train_late(strategy: str = "single", world: int = 1) -> list[Any]:
    run = {"max_steps": 3, "shuffle": False, "max_grad_norm": 0.0, "learning_rate": RATE}
    fit = make_fit(Late(), rows(), rows(), strategy=strategy, per_device_train_batch_size=BATCH // world, **run)
    fit.train()
    found = [log["loss"] for log in fit.state.log_history if "loss" in log] + [fit.evaluate()["eval_loss"]]
    dtypes = {str(p.dtype) for name, p in fit.strategy.named_parameters().items() if name.startswith("teacher.")}
    fit.close()
    return [found, sorted(dtypes)]


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_a_late_teacher_is_filled_shard_by_shard(ranks: dict[int, Ranks], strategy: str) -> None:
    losses, _ = train_late()
    for found, dtypes in ranks[2].run(train_late, strategy=strategy, world=2):
        assert found == pytest.approx(losses, abs=1e-6) and dtypes == ["torch.bfloat16"]
