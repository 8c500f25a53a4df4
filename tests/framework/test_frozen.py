"""Frozen parts on one device: what they keep, how they compute, what checkpoints and exports hold of them."""

import copy
import inspect
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stratagem import Average, Callback, TrainModule, frozen
from stratagem.precision.frozen import mark_of
from tiny import MakeFit, masters
from torch import Tensor, nn


def make_teacher() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))


class Taught(TrainModule):
    """A student with a norm of its own, and a teacher that loss calls; it notes the dtypes that it is given."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
        self.teacher = frozen(make_teacher(), **options)
        self.seen: set[Any] = set()
        self.teacher[3].register_forward_hook(lambda layer, inputs, out: self.seen.add((inputs[0].dtype, out.dtype)))

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(outputs, self.teacher(batch["x"]).to(outputs.dtype))


def rows(count: int = 24) -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(3, generator=torch.Generator().manual_seed(i))} for i in range(count)]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_it_stays_the_module_that_it_was_and_so_do_its_copies(copied: Any) -> None:
    plain = make_teacher()
    names = list(plain.state_dict())
    held = nn.ModuleDict({"teacher": frozen(plain, precision="bf16-true", saved="never")})
    for each in (held, copied(held)):
        teacher: Any = each["teacher"]
        assert type(teacher) is nn.Sequential and list(teacher.state_dict()) == names
        assert inspect.signature(teacher.forward) == inspect.signature(nn.Sequential().forward)
        each.train()
        assert each.training and not any(layer.training for layer in teacher.modules())
        assert not any(p.requires_grad for p in teacher.parameters())
        mark = mark_of(teacher)
        assert mark is not None and mark.module is teacher and mark.saved == "never"
        assert teacher(torch.randn(2, 3)).dtype == torch.float32


F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@pytest.mark.parametrize(
    ("own", "run", "parameters", "inputs", "outputs"),
    [
        ("bf16-true", "32-true", BF16, BF16, BF16),
        ("bf16-true", "bf16-mixed", BF16, BF16, BF16),
        ("bf16-true", "64-true", BF16, BF16, BF16),
        ("32-true", "bf16-mixed", F32, F32, F32),
        pytest.param("32-true", "bf16-true", F32, F32, F32, marks=masters),
        ("bf16-mixed", "32-true", F32, BF16, BF16),  # autocast's: those of the layer before
        pytest.param("bf16-mixed", "bf16-true", F32, BF16, BF16, marks=masters),
        ("64-true", "bf16-mixed", F64, F64, F64),
        (None, "bf16-mixed", F32, BF16, BF16),
        (None, "64-true", F64, F64, F64),
    ],
)
def test_it_computes_in_its_own_precision_whatever_the_runs_is(
    make_fit: MakeFit, own: Any, run: str, parameters: Any, inputs: Any, outputs: Any
) -> None:
    module = Taught(precision=own)
    before = {name: tensor.clone() for name, tensor in module.teacher.state_dict().items()}
    data = [{"x": row["x"].to(F64 if run == "64-true" else F32)} for row in rows(8)]
    make_fit(module, data, max_steps=2, precision=run, per_device_train_batch_size=4).train()
    assert {p.dtype for p in module.teacher.parameters()} == {parameters}
    assert module.seen == {(inputs, outputs)}
    for name, tensor in module.teacher.state_dict().items():  # its norm's statistics, too, to the bit
        assert torch.equal(tensor.to(F64), before[name].to(F64)), name


def test_gradients_go_through_it_where_that_is_asked_for_and_else_are_refused() -> None:
    plain = nn.Linear(3, 2)
    reference = copy.deepcopy(plain)
    x, same = torch.randn(4, 3, requires_grad=True), torch.zeros(4, 3)
    same = x.detach().clone().requires_grad_()
    with pytest.raises(ValueError, match=r"frozen Linear .* input_gradients=True.* input.detach\(\)"):
        frozen(plain)(x)
    assert not frozen(plain)(x.detach()).requires_grad
    frozen(plain, input_gradients=True)(x).square().sum().backward()
    reference(same).square().sum().backward()
    assert torch.equal(x.grad, same.grad) and plain.weight.grad is None  # type: ignore[arg-type]


class Follower(Callback):
    """Moves the teacher, as mean teachers do."""

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        with torch.no_grad():
            context["fit"].module.teacher[3].weight.add_(1.0)


def inode(path: Path) -> int:
    (file,) = path.glob("model/*-frozen-*")
    return file.stat().st_ino


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "async"])
def test_later_checkpoints_share_its_file_unless_it_has_changed(
    make_fit: MakeFit, tmp_path: Path, asynchronous: bool
) -> None:
    saves = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "async_save": asynchronous}
    for name, callbacks in (("still", []), ("moving", [Follower()])):
        fit = make_fit(Taught(), rows(), output_dir=str(tmp_path / name), callbacks=callbacks, **saves)
        fit.train()
        found = [tmp_path / name / f"checkpoint-{update}" for update in (1, 2, 3)]
        assert len({inode(path) for path in found}) == (1 if name == "still" else 3)
        resumed = make_fit(Taught(), rows(), output_dir=str(tmp_path / name), max_steps=3)
        resumed.train(resume_from_checkpoint=str(found[1]))
        resumed.close()
        weights = load_file(next(found[2].glob("model/*-frozen-*")))
        assert torch.equal(weights["teacher.3.weight"], fit.module.teacher[3].weight)


def test_without_hard_links_each_checkpoint_has_a_file(
    make_fit: MakeFit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    make_fit(Taught(), rows(), max_steps=2, save_strategy="steps", save_steps=1).train()
    found = [tmp_path / "output" / f"checkpoint-{update}" for update in (1, 2)]
    assert inode(found[0]) != inode(found[1])
    fit = make_fit(Taught(), rows(), max_steps=3)
    fit.train(resume_from_checkpoint=str(found[1]))


@pytest.mark.parametrize("saved", ["once", "always", "never"])
def test_what_is_saved_and_exported_of_it(make_fit: MakeFit, tmp_path: Path, saved: str) -> None:
    exported = saved == "always"
    torch.manual_seed(0)
    fit = make_fit(Taught(saved=saved, exported=exported), rows(), max_steps=1, save_strategy="steps", save_steps=1)
    fit.train()
    checkpoint = tmp_path / "output" / "checkpoint-1"
    files = [path for path in checkpoint.glob("model/*") if any(n.startswith("teacher.") for n in load_file(path))]
    assert len(files) == (saved != "never")
    names = load_file(fit.export(tmp_path / "weights.safetensors")).keys()
    assert {name.partition(".")[0] for name in names} == ({"student", "teacher"} if exported else {"student"})
    # Another teacher: the checkpoint's comes back, or it is an error that names what differs.
    torch.manual_seed(1)
    other = Taught(saved=saved)
    again = make_fit(other, rows(), max_steps=2)
    if saved == "never":
        with pytest.raises(ValueError, match=r"other values: teacher\.0\.weight, teacher\.0\.bias, teacher\.3"):
            again.train(resume_from_checkpoint=str(checkpoint))
    else:
        again.train(resume_from_checkpoint=str(checkpoint))
        assert torch.equal(other.teacher[0].weight, fit.module.teacher[0].weight)


def test_an_averages_batch_norm_leaves_the_teachers_alone(make_fit: MakeFit) -> None:
    module = Taught()
    module.teacher[1].running_mean.fill_(3.0)
    average = Average(0.5, batch_norm_batches=2)
    fit = make_fit(module, rows(), rows(8), max_steps=3, callbacks=[average])
    fit.train()
    fit.evaluate(weights=average)
    assert module.teacher[1].running_mean.tolist() == [3.0] * 8
    assert len(average._statistics) == 3  # the student's alone


def test_one_that_is_wider_now_is_compared_as_it_was(make_fit: MakeFit, tmp_path: Path) -> None:
    def taught(seed: int, **options: Any) -> Taught:
        torch.manual_seed(seed)
        return Taught(saved="never", **options)

    make_fit(taught(0, precision="bf16-true"), rows(), max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = str(tmp_path / "output" / "checkpoint-1")
    make_fit(taught(0, precision="32-true"), rows(), max_steps=2).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"other values: teacher\.0\.weight"):
        make_fit(taught(1), rows(), max_steps=2).train(resume_from_checkpoint=checkpoint)


def test_a_module_that_is_given_back_has_it_frozen_as_before(make_fit: MakeFit) -> None:
    module = Taught(precision="bf16-true")
    fit = make_fit(module, rows(), max_steps=2)
    fit.find_learning_rate(updates=10)
    mark = mark_of(module.teacher)
    assert mark is not None and mark.module is module.teacher and module.teacher[0].weight.dtype == BF16
    fit.train()
    assert module.student.training and not any(layer.training for layer in module.teacher.modules())


class Late(Taught):
    """The same, whose teacher is made where it is placed."""

    def __init__(self) -> None:
        super().__init__()
        del self.teacher

    def build(self) -> None:
        self.teacher = frozen(make_teacher(), precision="bf16-true")


def test_a_late_one_is_filled_in_its_own_precision(make_fit: MakeFit) -> None:
    module = Late()
    fit = make_fit(module, rows(), rows(8), max_steps=2)
    fit.train()
    fit.evaluate()
    weight = module.teacher[0].weight
    assert weight.dtype == BF16 and weight.abs().sum() > 0 and not weight.requires_grad


def test_what_cannot_work_is_refused(make_fit: MakeFit) -> None:
    with pytest.raises(ValueError, match=r"frozen\(precision=...\): Did you mean 'bf16-true'"):
        frozen(nn.Linear(1, 1), precision="bf16_true")
    with pytest.raises(ValueError, match=r"takes 'once', 'always', 'never'\. Received: 'sometimes'"):
        frozen(nn.Linear(1, 1), saved="sometimes")
    with pytest.raises(TypeError, match="takes a module"):
        frozen(nn.Linear)  # type: ignore[type-var]
    trains = Taught()
    trains.teacher[0].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"require a gradient: teacher\.0\.bias"):
        make_fit(trains, rows(), max_steps=1).train()
    with pytest.raises(ValueError, match=r"saved='always'.*'teacher'"):
        make_fit(Taught(saved="always"), rows(), max_steps=1, save_only_trainable=True).train()
    with pytest.raises(ValueError, match=r"strategy='dp' copies the module.*'teacher'"):
        make_fit(Taught(), rows(), max_steps=1, strategy="dp")
