"""Checkpoints with a name, which rotation leaves and a resume finds; and the k best, which rotation leaves too."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback, Fit
from stratagem.framework.checkpoint import CheckpointError
from stratagem.framework.checkpoint.directory import hash_file
from tiny import Dropping, MakeFit, Regressor, StopAt, regression_rows


def fit_of(make_fit: MakeFit, max_steps: int, *callbacks: Callback, **options: Any) -> Fit:
    torch.manual_seed(1)
    given: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4, **options}
    return make_fit(Dropping(), regression_rows(22), max_steps=max_steps, callbacks=callbacks, **given)


def names_in(directory: Path) -> list[str]:
    """Of all that is called a checkpoint, by number."""
    found = [path.name for path in directory.iterdir() if path.name.startswith("checkpoint-")]
    return sorted(found, key=lambda name: (int(name.split("-")[1].split(".")[0]), name))


def run_of(checkpoint: Path) -> dict[str, Any]:
    return state_of(checkpoint)["run"]


def damage(checkpoint: Path) -> None:
    """Change one byte of a file."""
    path = next((checkpoint / "model").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_state(checkpoint: Path, **changes: Any) -> None:
    """Write fields of state.json, and list the file anew."""
    (checkpoint / "state.json").write_text(json.dumps(state_of(checkpoint) | changes))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["state.json"] = hash_file(checkpoint / "state.json")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


class Scripted(Regressor):
    """Its evaluation loss is the next number of a script."""

    def __init__(self, script: list[float]) -> None:
        super().__init__()
        self.script = iter(script)

    def loss(self, outputs: torch.Tensor, batch: dict[str, torch.Tensor]) -> Any:
        return super().loss(outputs, batch) if self.training else torch.tensor(next(self.script))


def run(make_fit: MakeFit, script: list[float], resume: bool = False, **options: Any) -> Fit:
    """25 updates, evaluated and saved each 5."""
    defaults: dict[str, Any] = {
        "max_steps": 25, "per_device_train_batch_size": 1, "eval_strategy": "steps", "eval_steps": 5,
        "save_strategy": "steps", "save_steps": 5,
    }  # fmt: skip
    fit = make_fit(Scripted(script), regression_rows(25), regression_rows(1), **{**defaults, **options})
    fit.train(resume_from_checkpoint=resume)
    return fit


def kept(fit: Fit) -> set[int]:
    return {int(path.name.rpartition("-")[2]) for path in Path(fit.args.output_dir).glob("checkpoint-*")}


class Name(Callback):
    """Saves the run under a name after an update."""

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names
        self.began: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.began = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, *, fit: Fit, **context: Any) -> None:
        if state.global_step in self.names:
            fit.save_checkpoint(name=self.names[state.global_step])


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


def state_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text())


@pytest.mark.parametrize("in_background", [False, True])
def test_rotation_leaves_a_named_one_and_does_not_count_it(
    make_fit: MakeFit, output: Path, in_background: bool
) -> None:
    """At 3 nothing else is saved; at 6 the cadence saves the same update again."""
    names = {3: "before-surgery", 6: "v1.0_final"}
    fit_of(make_fit, 14, Name(names), save_total_limit=2, async_save=in_background).train()
    assert names_in(output) == ["checkpoint-3", "checkpoint-6", "checkpoint-12", "checkpoint-14"]
    assert state_of(output / "checkpoint-3")["names"] == ["before-surgery"]
    assert state_of(output / "checkpoint-6")["names"] == ["v1.0_final"]
    assert "names" not in state_of(output / "checkpoint-12")


def test_a_name_is_resumed_from(make_fit: MakeFit, output: Path) -> None:
    whole = fit_of(make_fit, 8, Name({3: "early"}), save_total_limit=1)
    whole.train()
    before = run_of(output / "checkpoint-8")["id"]
    naming = Name({})
    resumed = fit_of(make_fit, 8, naming, save_total_limit=1)
    resumed.train(resume_from_checkpoint="early")
    assert naming.began == 3
    for mine, theirs in zip(resumed.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    # It was not the newest of its line: this is a new run, and the other's last checkpoint is set aside.
    assert run_of(output / "checkpoint-8")["ancestors"] == [{"id": before, "until": 3}]
    assert names_in(output) == ["checkpoint-3", "checkpoint-8", "checkpoint-8.set-aside"]


def test_a_named_one_can_be_the_newest(make_fit: MakeFit, output: Path) -> None:
    fit_of(make_fit, 20, Name({5: "last"}), StopAt(5)).train()
    naming = Name({})
    fit_of(make_fit, 7, naming).train(resume_from_checkpoint=True)
    assert naming.began == 5 and len({run_of(output / name)["id"] for name in names_in(output)}) == 1


def test_a_name_outside_of_training(make_fit: MakeFit, output: Path) -> None:
    fit = fit_of(make_fit, 4, save_strategy="no")
    fit.train()
    assert fit.save_checkpoint(name="done") == output / "checkpoint-4"
    assert fit.save_checkpoint(name="really-done") == output / "checkpoint-4"  # both stay its names
    assert state_of(output / "checkpoint-4")["names"] == ["done", "really-done"]
    for name in ("done", "really-done"):
        again = fit_of(make_fit, 4, save_strategy="no")
        assert again.train(resume_from_checkpoint=name).global_step == 4


def test_a_name_is_of_one_update(make_fit: MakeFit, output: Path) -> None:
    """In one run, and in a later part of it, which reads of the first from the disk."""
    with pytest.raises(CheckpointError, match=r"checkpoint-2 of this run has that name. Write another, .*'kept-4'"):
        fit_of(make_fit, 8, Name({2: "kept", 4: "kept"})).train()
    with pytest.raises(CheckpointError, match="checkpoint-2 of this run has that name"):
        fit_of(make_fit, 8, Name({6: "kept"})).train(resume_from_checkpoint=True)
    assert state_of(output / "checkpoint-2")["names"] == ["kept"]


def test_a_run_that_passes_the_update_again_saves_it_again(make_fit: MakeFit, output: Path) -> None:
    fit_of(make_fit, 20, Name({4: "kept"}), StopAt(6)).train()
    damage(output / "checkpoint-6")
    damage(output / "checkpoint-4")
    fit_of(make_fit, 8, Name({4: "kept"})).train(resume_from_checkpoint=True)  # from 2
    assert state_of(output / "checkpoint-4")["names"] == ["kept"]
    assert "checkpoint-4.damaged" in names_in(output)


def test_the_name_of_one_that_was_set_aside_is_found(make_fit: MakeFit, output: Path) -> None:
    fit_of(make_fit, 4, Name({3: "mine"})).train()
    fit_of(make_fit, 2).train()  # another run
    assert "checkpoint-3.set-aside" in names_in(output)
    naming = Name({5: "mine"})  # it isn't of the new run's line, in which the name is free
    fit_of(make_fit, 6, naming).train(resume_from_checkpoint="mine")
    assert naming.began == 3
    again = Name({})
    fit_of(make_fit, 6, again).train(resume_from_checkpoint="mine")
    assert again.began == 5  # the one in its place comes first


def test_a_name_that_is_not_there(make_fit: MakeFit, output: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"no such path, and no checkpoint of that name in .*None there has a name"
    ):
        fit_of(make_fit, 4).train(resume_from_checkpoint="surgery")
    fit_of(make_fit, 4, Name({1: "one", 3: "three"})).train()
    with pytest.raises(CheckpointError, match="The names there are three, one"):
        fit_of(make_fit, 4).train(resume_from_checkpoint="surgery")


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "checkpoint-3", "ü", "a" * 101, "a b", 3])
def test_what_cannot_be_a_name(make_fit: MakeFit, output: Path, name: Any) -> None:
    fit = fit_of(make_fit, 2, save_strategy="no")
    fit.train()
    with pytest.raises(ValueError, match="a name is made of at most 100 letters"):
        fit.save_checkpoint(name=name)
    assert not [*output.glob("checkpoint-*")]


@pytest.mark.parametrize("names", ["kept", [3], {"kept": 1}, [["kept"]]])
def test_forged_names_are_refused(make_fit: MakeFit, output: Path, names: Any) -> None:
    fit_of(make_fit, 2).train()
    change_state(output / "checkpoint-2", names=names)
    with pytest.raises(CheckpointError, match=r"state.json was altered: names"):
        fit_of(make_fit, 4).train(resume_from_checkpoint=output / "checkpoint-2")
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is whole"):
        fit_of(make_fit, 4).train(resume_from_checkpoint=True)


# The k best.


@pytest.mark.parametrize(
    ("script", "best", "limit", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0], 2, 2, {5, 10, 25}),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 3, 1, {5, 10, 15, 25}),
        ([5.0, 1.0, 4.0, 2.0, 3.0], 2, 2, {10, 20, 25}),
        ([5.0, 4.0, 3.0, 2.0, 1.0], 2, 1, {20, 25}),
        ([2.0, 2.0, 2.0, 2.0, 2.0], 2, 1, {5, 10, 25}),  # of equal ones the earlier
        ([math.nan, 3.0, math.nan, 4.0, math.nan], 2, 1, {10, 20, 25}),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 9, 1, {5, 10, 15, 20, 25}),
    ],
)
@pytest.mark.parametrize("in_background", [False, True])
def test_the_k_best_stay(
    make_fit: MakeFit, script: list[float], best: int, limit: int, expected: set[int], in_background: bool
) -> None:
    fit = run(make_fit, script, save_best_limit=best, save_total_limit=limit, async_save=in_background)
    assert kept(fit) == expected


def test_more_may_be_better(make_fit: MakeFit) -> None:
    fit = run(
        make_fit, [1.0, 5.0, 2.0, 4.0, 3.0], save_best_limit=2, save_total_limit=1, metric_for_best_model="loss",
        greater_is_better=True,
    )  # fmt: skip
    assert kept(fit) == {10, 20, 25}


def test_evaluations_without_a_checkpoint_take_no_place(make_fit: MakeFit) -> None:
    """Evaluated at 5, 10, 15, 20, 25, saved at 10, 20 and 25: the best two that were saved stay."""
    fit = run(make_fit, [1.0, 4.0, 1.0, 5.0, 9.0], save_best_limit=2, save_total_limit=1, save_steps=10)
    assert kept(fit) == {10, 20, 25}  # 25 is the end of the run


def test_a_resumed_run_knows_the_k_best(make_fit: MakeFit) -> None:
    options = {"save_best_limit": 2, "save_total_limit": 1}
    run(make_fit, [2.0, 1.0, 5.0], callbacks=[StopAt(15)], **options)
    fit = run(make_fit, [3.0, 4.0], resume=True, **options)
    assert kept(fit) == {5, 10, 25}
    assert fit.state.evaluations == {"5": 2.0, "10": 1.0, "15": 5.0, "20": 3.0, "25": 4.0}
    assert fit.state.best_global_step == 10


def test_best_saves_what_is_among_the_k_best(make_fit: MakeFit) -> None:
    fit = run(make_fit, [3.0, 4.0, 5.0, 1.0, 2.0], save_strategy="best", save_best_limit=2)
    assert kept(fit) == {5, 10, 20, 25}  # 15 was the third best
    assert fit.state.best_global_step == 20


def test_a_limit_of_the_best_without_effect_is_refused(make_fit: MakeFit) -> None:
    for options, why in (
        ({"save_total_limit": 2}, "save_best_limit=2: needs evaluations"),
        ({"eval_strategy": "steps"}, "save_best_limit=2: has no effect where nothing is removed"),
    ):
        with pytest.raises(ValueError, match=why):
            fit_of(make_fit, 2, save_best_limit=2, **options)
    with pytest.raises(ValueError, match="save_best_limit=0: must be at least 1"):
        fit_of(make_fit, 2, save_best_limit=0)
