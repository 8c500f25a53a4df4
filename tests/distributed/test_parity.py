"""Parity: strategies agree on a module that is right, and one that isn't is caught with the parameter's name."""

import dataclasses
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from rich.console import Console
from stratagem import TrainModule
from stratagem.framework.command_line import main
from stratagem.framework.commands.parity import parity_table
from stratagem.framework.configuration.targets import load_module_and_data
from stratagem.framework.parity.comparing import compare, default_tolerance
from stratagem.framework.parity.forward import FailedInLayer, difference, moments
from stratagem.framework.parity.ranks import Case, launch
from stratagem.framework.parity.recording import Recipe, Recording, record
from stratagem.strategies import Single, get_strategy
from torch import Tensor, nn
from torch.utils.data import TensorDataset

# What the ranks load from this file.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)
        self.up = nn.Linear(5, 8)
        self.down = nn.Linear(8, 5)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(torch.tanh(self.up(self.norm(x)))))


class Right(TrainModule):
    """Sizes that two ranks don't divide, but for those that tensor parallelism cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.mse_loss(outputs, batch[1])

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}


class Wrong(Right):
    """Rank 1 learns something else, from one bias; and there is no plan."""

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return super().loss(outputs, batch) + 0.1 * int(os.environ["RANK"]) * self.blocks[1].norm.bias.sum()

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {}


def right() -> Right:
    return Right()


def wrong() -> Wrong:
    return Wrong()


def parity_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(37, 5, generator=generator)
    return TensorDataset(x, x.sum(dim=1, keepdim=True).sin())


# Real ranks.


@pytest.mark.slow
def test_strategies_agree_with_one_rank(tmp_path: Path) -> None:
    recipe = Recipe(f"{__file__}:right")
    reference = record(right(), parity_data(), Single(device="cpu"), recipe, tmp_path)
    for name in ("ddp", "fsdp1", "fsdp2", "tp"):
        case = Case.named(name, ranks=2)
        run = launch(case, recipe, tmp_path / name, tmp_path / "checkpoint-0", timeout=300, most_ranks=2)
        tolerance = default_tolerance(recipe.precision, run.reorders_sums)
        assert tolerance == (1e-4 if name == "tp" else 1e-6)
        found = compare(reference, run, tolerance)
        assert found.is_tolerated, f"{name}: {found.diverges_at}"
        assert max(found.loss, found.gradient, found.norm) <= 1e-6, name


@pytest.mark.slow
def test_a_wrong_module_is_named_and_a_failing_strategy_shows_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    target = f"{__file__}:wrong"
    assert main(["parity", target, "--strategies", "single,ddp,tp", "--ranks", "2", "--updates", "2"]) == 1
    shown = capsys.readouterr()
    assert "blocks.1.norm.bias (1 of 14 gradients)" in shown.out
    assert "failed" in shown.out
    assert "ValueError: Tensor parallelism needs to know how Wrong is cut" in shown.err


# Planted faults, each of which is to be named where it begins.


class Planted(Right):
    """Right, but for one fault on the ranks of a group."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        if fault == "batch statistics":
            self.blocks[0].norm = nn.BatchNorm1d(5)
        if fault == "a gradient lost":
            self.blocks[1].up.weight.register_hook(lambda gradient: gradient * (rank_here() == 0))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x)
            if self.fault == "noise by rank" and number == 0:
                x = x * (1.0 + 0.1 * rank_here())
            if self.fault == "F.dropout":
                x = nn.functional.dropout(x, 0.5, training=self.training)
        if self.fault == "an error":
            x = self.blocks[1].down(x)  # of the wrong width
        return self.head(x)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        loss = super().loss(outputs, batch)
        return loss * len(outputs) if self.fault == "a sum" else loss


def rank_here() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


FAULTS = {
    "none": r"^$",
    "F.dropout": r"^$",
    # A norm takes the factor back, but for its epsilon: more than ddp's tolerance, less than tp's.
    "noise by rank": r"^input of blocks\.1 \(forward, by 1e-01; [35] of 12 layers\), .* gradients\)$",
    "batch statistics": r"^blocks\.0\.norm \(forward, by [^;]+; .* of 12 layers\), ",
    "a sum": r"^loss of update 1 \(forward agrees\), .* \(14 of 14 gradients\)$",
    "a gradient lost": r"^blocks\.1\.up\.weight \(1 of 14 gradients\)$",
    "an error": r"^in the forward of blocks\.1\.down: RuntimeError: mat1 and mat2 shapes cannot be multiplied",
}


def named_faults(directory: str, strategy: str, faults: list[str]) -> dict[str, str]:
    """What the comparison with one rank names, for each fault, under a strategy on these ranks."""
    named = {}
    for fault in faults:
        folder = Path(directory) / fault
        placed = get_strategy(strategy)
        own = folder / strategy
        recipe = Recipe("", updates=2)
        try:
            found = record(Planted(fault), parity_data(), placed, recipe, own, folder / "checkpoint-0")
        except FailedInLayer as error:
            named[fault] = str(error)
            continue
        if placed.is_main:
            tolerance = default_tolerance(recipe.precision, found.reorders_sums)
            named[fault] = compare(Recording.load(folder), found, tolerance).diverges_at
    return named


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2", "tp"])
def test_a_planted_fault_is_named_where_it_begins(strategy: str, ranks: dict[int, Ranks], tmp_path: Path) -> None:
    # The ranks of a tensor-parallel pair see one batch: what depends on the number of samples is no fault there.
    faults = list(FAULTS)[:-1] if strategy == "ddp" else ["none", "F.dropout", "noise by rank"]
    for fault in faults:
        torch.manual_seed(1)
        (tmp_path / fault).mkdir()
        recipe = Recipe("", updates=2)
        record(Planted(fault), parity_data(), Single(device="cpu"), recipe, tmp_path / fault).save(tmp_path / fault)
    named = ranks[2].run(named_faults, directory=str(tmp_path), strategy=strategy, faults=faults)[0]
    for fault in faults:
        assert re.search(FAULTS[fault], named[fault]), f"{fault}: {named[fault]!r}"


def test_an_error_is_told_with_its_layer(tmp_path: Path) -> None:
    module = Planted("an error")
    with pytest.raises(FailedInLayer, match=FAULTS["an error"]):
        record(module, parity_data(), Single(device="cpu"), Recipe("", updates=1), tmp_path)


def test_the_title_shows_names_with_colons_and_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=140).print(parity_table(Recipe("models.py:llama:[bold]"), []))
    assert "models.py:llama:[bold]: 20 updates of 8 samples in 32-true" in capsys.readouterr().out


def test_parts_of_a_tensor_on_several_ranks_are_compared_with_the_whole() -> None:
    whole = torch.randn(4, 6)
    parts = torch.stack([moments(whole[:, :2]), moments(whole[:, 2:])])
    repeated = torch.stack([moments(whole), moments(whole * 1.001)])
    reference = moments(whole)[None]
    assert difference(reference, parts) < 1e-12
    assert difference(reference, repeated) == pytest.approx(1e-3, rel=0.7)
    assert difference(reference, moments(whole.flip(0))[None]) > 0.1
    assert difference(reference, moments(whole[:, :5])[None]) == 0.0  # of another size: nothing can be said
    totals = moments(whole.reshape(8, 3))[None]
    assert difference(reference, totals) < 1e-12


# The comparison, without ranks.


def run(module: TrainModule, directory: Path) -> Recording:
    torch.manual_seed(0)
    return record(module, parity_data(), Single(device="cpu"), Recipe("", updates=6, batch_size=10), directory)


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    torch.manual_seed(1)
    return run(Right(), tmp_path)


def test_a_recording_holds_every_update_and_whole_tensors(recording: Recording, tmp_path: Path) -> None:
    module = Right()
    assert len(recording.losses) == len(recording.norms) == 6
    assert list(recording.gradients) == [name for name, _ in module.named_parameters()]
    assert {name: t.shape for name, t in recording.weights.items()} == {
        name: t.shape for name, t in module.state_dict().items()
    }
    norm = torch.cat([gradient.flatten() for gradient in recording.gradients.values()]).norm()
    assert norm.item() == pytest.approx(recording.norms[0], rel=1e-6)
    recording.save(tmp_path)
    read = Recording.load(tmp_path)
    assert (read.losses, read.norms, read.first) == (recording.losses, recording.norms, 1)
    assert list(read.gradients) == list(recording.gradients)
    assert all(torch.equal(read.weights[name], tensor) for name, tensor in recording.weights.items())


def test_two_runs_are_equal_although_the_module_has_dropout(recording: Recording, tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = Right()
    again = record(
        module, parity_data(), Single(device="cpu"), Recipe("", updates=6, batch_size=10, seed=42), tmp_path / "again"
    )
    found = compare(recording, again, 1e-12)
    assert (found.loss, found.gradient, found.norm, found.diverges_at) == (0.0, 0.0, 0.0, "")
    assert module.blocks[0].drop.p == 0.0


def changed(recording: Recording, **changes: Any) -> Recording:
    return dataclasses.replace(recording, **changes)


def test_the_first_gradient_to_diverge_is_sought_from_the_loss_backwards(recording: Recording) -> None:
    gradients = dict(recording.gradients)
    for name in ("blocks.0.up.weight", "blocks.1.up.weight"):
        gradients[name] = gradients[name] * 1.01
    found = compare(recording, changed(recording, gradients=gradients), 1e-6)
    assert found.diverges_at == "blocks.1.up.weight (2 of 14 gradients)"
    whole = math.sqrt(sum(float(g.square().sum()) for g in recording.gradients.values()))
    part = max(float(recording.gradients[f"blocks.{i}.up.weight"].norm()) for i in (0, 1))
    assert found.gradient == pytest.approx(0.01 * part / whole, rel=1e-3)


def test_an_absent_gradient_is_zero(recording: Recording) -> None:
    gradients = dict(recording.gradients)
    del gradients["head.weight"]
    assert compare(recording, changed(recording, gradients=gradients), 1e-6).diverges_at.startswith("head.weight")
    zeros = {**gradients, "head.weight": torch.zeros(1, 5)}
    assert compare(changed(recording, gradients=zeros), changed(recording, gradients=gradients), 1e-6).is_tolerated


def test_another_optimizer_is_told_by_the_weights(recording: Recording) -> None:
    losses = [*recording.losses[:3], *(loss * 1.001 for loss in recording.losses[3:])]
    weights = {**recording.weights, "head.bias": recording.weights["head.bias"] + 1.0}
    found = compare(recording, changed(recording, losses=losses, weights=weights), 1e-6)
    assert found.diverges_at == "loss of update 4, head.bias after update 1 (1 of 14 weights)"
    assert found.loss == pytest.approx(0.001)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_diverges(recording: Recording, wrong: float) -> None:
    losses = [*recording.losses[:-1], wrong]
    assert compare(recording, changed(recording, losses=losses), 1e-6).loss == math.inf
    gradients = {**recording.gradients, "head.bias": torch.full((1,), wrong)}
    found = compare(recording, changed(recording, gradients=gradients), 1e-6)
    assert found.diverges_at.startswith("head.bias")


def test_a_wrong_norm_diverges_though_all_gradients_agree(recording: Recording) -> None:
    norms = [recording.norms[0] * 1.01, *recording.norms[1:]]
    found = compare(recording, changed(recording, norms=norms), 1e-6)
    assert found.diverges_at.startswith("gradient norm of update 1, by 1.0e-02")


def test_tolerances_grow_with_the_rounding_of_the_format() -> None:
    assert default_tolerance("32-true", False) == 1e-6
    assert default_tolerance("32-true", True) == 1e-4
    assert default_tolerance("bf16-mixed", False) == pytest.approx(1e-6 * 2**16)
    assert default_tolerance("bf16-mixed", True) == 0.1


def test_a_combination_takes_more_ranks() -> None:
    case = Case.named("fsdp2xtp", 3)
    assert (case.strategy, case.ranks, case.make().options.tensor_parallel) == ("fsdp2", 6, 2)
    assert Case.named("single", 3).ranks == 1


def test_a_batch_that_ranks_cannot_share_and_a_loader_are_refused(tmp_path: Path) -> None:
    strategy = Single(device="cpu")
    strategy.data_size = 3
    with pytest.raises(ValueError, match="3 data-parallel ranks or devices can't share a batch of 8 evenly"):
        record(Right(), parity_data(), strategy, Recipe("", batch_size=8), tmp_path)
    loader = torch.utils.data.DataLoader(parity_data())
    with pytest.raises(TypeError, match="returned a DataLoader; return its dataset"):
        record(Right(), loader, Single(device="cpu"), Recipe(""), tmp_path)


def test_functions_are_found_or_their_absence_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    for given in ("parity_data", ""):
        module, data = load_module_and_data(f"{__file__}:right", given)
        assert type(module).__name__ == "Right" and len(data) == 37
    program = Path(__file__).parents[1] / "configuration" / "program.py"  # it has no parity_data(), but data()
    assert len(load_module_and_data(f"{program}:build")[1]) == 56
    with pytest.raises(ValueError, match=r"has no function absent\(\)"):
        load_module_and_data(f"{__file__}:absent")
    with pytest.raises(ValueError, match="There is no file"):
        load_module_and_data(f"{tmp_path}/absent.py:build")
    with pytest.raises(ValueError, match=r"Write path/to/file\.py:function"):
        load_module_and_data("no_colon")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategies", "single,ddq"], "Unknown strategy 'ddq'. Did you mean 'ddp'?"),
        (["--ranks", "0"], "--ranks: invalid positive int value: '0'"),
        (["--precision", "31"], "--precision: invalid choice"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["parity", "nothing.py:build", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
