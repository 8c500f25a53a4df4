"""A run's own line: rotation and resuming see its checkpoints alone; those of others and damaged ones are set aside."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback, Fit
from stratagem.framework.checkpoint import CheckpointError
from stratagem.framework.checkpoint.directory import hash_file
from stratagem.framework.checkpoint.verifying import verify
from stratagem.framework.uploading import Upload
from tiny import Dropping, MakeFit, Regressor, StopAt, parameters_of, regression_rows

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}


def fit_of(make_fit: MakeFit, max_steps: int, *callbacks: Callback, **options: Any) -> Fit:
    torch.manual_seed(1)
    given = {**SAVING, **options}
    return make_fit(Dropping(), regression_rows(22), max_steps=max_steps, callbacks=callbacks, **given)


def names_in(directory: Path) -> list[str]:
    """Of all that is called a checkpoint, by number."""
    found = [path.name for path in directory.iterdir() if path.name.startswith("checkpoint-")]
    return sorted(found, key=lambda name: (int(name.split("-")[1].split(".")[0]), name))


def run_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text())["run"]


def damage(checkpoint: Path, file: str = "model") -> None:
    """Change one byte of a file."""
    path = checkpoint / file if file.endswith("json") else next((checkpoint / file).glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def bytes_of(checkpoint: Path) -> dict[str, bytes]:
    return {str(f.relative_to(checkpoint)): f.read_bytes() for f in sorted(checkpoint.rglob("*")) if f.is_file()}


def change_state(checkpoint: Path, **changes: Any) -> None:
    """Write fields of state.json, or remove them (None), and list the file anew."""
    state = json.loads((checkpoint / "state.json").read_text()) | changes
    (checkpoint / "state.json").write_text(json.dumps({k: v for k, v in state.items() if v is not None}))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["state.json"] = hash_file(checkpoint / "state.json")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


# Damaged ones.


def test_what_was_just_saved_stays_where_the_newest_is_damaged(
    make_fit: MakeFit, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_of(make_fit, 12, StopAt(8)).train()
    damage(output / "checkpoint-8")
    seen = []

    class Look(Callback):
        def on_save(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            seen.append(names_in(output))

    fit_of(make_fit, 12, Look(), StopAt(10), save_total_limit=1).train(resume_from_checkpoint=True)
    # From 6, the newest whole one, on.
    assert seen == [["checkpoint-8", "checkpoint-8.damaged"], ["checkpoint-8.damaged", "checkpoint-10"]]
    said = capsys.readouterr().err
    assert f"Passed over a checkpoint: {output}/checkpoint-8" in said
    assert f"Renamed the damaged {output}/checkpoint-8 to checkpoint-8.damaged" in said
    verify(output / "checkpoint-10")


def test_nothing_is_renamed_where_none_is_whole(make_fit: MakeFit, output: Path) -> None:
    fit_of(make_fit, 4).train()
    for step in (2, 4):
        damage(output / f"checkpoint-{step}")
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is whole"):
        fit_of(make_fit, 6).train(resume_from_checkpoint=True)
    assert names_in(output) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("file", ["state.json", "manifest.json"])
def test_one_that_no_longer_tells_whose_it_is_is_damaged_and_not_foreign(
    make_fit: MakeFit, output: Path, file: str
) -> None:
    fit_of(make_fit, 4).train()
    damage(output / "checkpoint-4", file)
    fit_of(make_fit, 4).train(resume_from_checkpoint=True)
    assert names_in(output) == ["checkpoint-2", "checkpoint-4", "checkpoint-4.damaged"]
    for step in (2, 4):  # never a fresh start
        damage(output / f"checkpoint-{step}", file)
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is whole"):
        fit_of(make_fit, 6).train(resume_from_checkpoint=True)


def test_a_run_that_saves_nothing_renames_nothing(make_fit: MakeFit, output: Path) -> None:
    fit_of(make_fit, 4).train()
    damage(output / "checkpoint-4")
    before = sorted(path.name for path in output.iterdir())
    fit_of(make_fit, 3, save_strategy="no").train(resume_from_checkpoint=True)
    fit_of(make_fit, 3, save_strategy="no").train()
    assert sorted(path.name for path in output.iterdir()) == before


# Other runs.


def test_a_new_run_keeps_its_own_and_touches_no_older_ones(
    make_fit: MakeFit, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_of(make_fit, 40, save_steps=20).train()
    old = {step: bytes_of(output / f"checkpoint-{step}") for step in (20, 40)}
    capsys.readouterr()
    fit_of(make_fit, 40, StopAt(5), save_steps=1, save_total_limit=1).train()
    assert names_in(output) == ["checkpoint-5", "checkpoint-20.set-aside", "checkpoint-40.set-aside"]
    said = capsys.readouterr().err
    assert said.count("Set aside") == 1
    assert f"resume_from_checkpoint='{output}/checkpoint-40.set-aside'" in said
    resumed = fit_of(make_fit, 6, save_steps=1, save_total_limit=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6  # from 5: the old run's 40 would have ended at once
    assert names_in(output) == ["checkpoint-5", "checkpoint-6", "checkpoint-20.set-aside", "checkpoint-40.set-aside"]
    assert {step: bytes_of(output / f"checkpoint-{step}.set-aside") for step in (20, 40)} == old
    assert run_of(output / "checkpoint-5") == run_of(output / "checkpoint-6")
    assert run_of(output / "checkpoint-6")["id"] != run_of(output / "checkpoint-20.set-aside")["id"]


def test_going_back_sets_what_was_abandoned_aside(make_fit: MakeFit, output: Path) -> None:
    fit_of(make_fit, 12, save_steps=4).train()
    first = run_of(output / "checkpoint-4")
    fit_of(make_fit, 12, StopAt(6), save_total_limit=2).train(resume_from_checkpoint=output / "checkpoint-4")
    assert names_in(output) == ["checkpoint-4", "checkpoint-6", "checkpoint-8.set-aside", "checkpoint-12.set-aside"]
    second = run_of(output / "checkpoint-6")
    assert second == {"id": second["id"], "ancestors": [{"id": first["id"], "until": 4}]}
    resumed = fit_of(make_fit, 8, save_total_limit=2)
    resumed.train(resume_from_checkpoint=True)
    assert names_in(output) == ["checkpoint-6", "checkpoint-8", "checkpoint-8.set-aside", "checkpoint-12.set-aside"]
    assert run_of(output / "checkpoint-8") == second


def test_one_that_was_set_aside_can_be_gone_on_from(make_fit: MakeFit, output: Path) -> None:
    unbroken = fit_of(make_fit, 8)
    unbroken.train()
    fit_of(make_fit, 8, StopAt(2)).train()
    assert "checkpoint-6.set-aside" in names_in(output)
    # Killed, so to speak, before its first save: its next start begins where it began.
    fit_of(make_fit, 8, StopAt(7), save_steps=8).train(resume_from_checkpoint=output / "checkpoint-6.set-aside")
    assert "checkpoint-2.set-aside-2" in names_in(output)  # of the second run; the first one's has the plain ending
    again = fit_of(make_fit, 8)
    again.train(resume_from_checkpoint=True)
    for name, value in parameters_of(again.module).items():
        assert torch.equal(value, parameters_of(unbroken.module)[name]), name
    ancestors = run_of(output / "checkpoint-8")["ancestors"]
    assert ancestors == [{"id": run_of(output / "checkpoint-6.set-aside")["id"], "until": 6}]


def test_a_run_that_goes_on_from_elsewhere_is_a_new_one(make_fit: MakeFit, output: Path, tmp_path: Path) -> None:
    fit_of(make_fit, 4, output_dir=str(tmp_path / "first")).train()
    fit_of(make_fit, 4).train()
    own = bytes_of(output / "checkpoint-2")
    fit_of(make_fit, 6).train(resume_from_checkpoint=tmp_path / "first" / "checkpoint-4")
    assert names_in(output) == ["checkpoint-2.set-aside", "checkpoint-4.set-aside", "checkpoint-6"]
    assert bytes_of(output / "checkpoint-2.set-aside") == own
    assert names_in(tmp_path / "first") == ["checkpoint-2", "checkpoint-4"]
    parent = run_of(tmp_path / "first" / "checkpoint-4")
    assert run_of(output / "checkpoint-6")["ancestors"] == [{"id": parent["id"], "until": 4}]


def test_the_path_of_the_newest_goes_on_with_the_run(make_fit: MakeFit, output: Path) -> None:
    fit_of(make_fit, 8, StopAt(4)).train()
    fit_of(make_fit, 8).train(resume_from_checkpoint=output / "checkpoint-4")
    assert names_in(output) == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    assert len({run_of(output / name)["id"] for name in names_in(output)}) == 1


def test_true_begins_anew_and_says_so_where_only_others_are_left(
    make_fit: MakeFit, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_of(make_fit, 4).train()
    fit_of(make_fit, 4, StopAt(2)).train()
    shutil.rmtree(output / "checkpoint-2")
    capsys.readouterr()
    fit = fit_of(make_fit, 3, save_steps=1)
    fit.train(resume_from_checkpoint=True)
    assert (
        f"{output} holds no checkpoint of its last run, but checkpoint-2.set-aside, checkpoint-4.set-aside: this run "
        "begins anew. To go on from checkpoint-4.set-aside, pass its path: "
        f"resume_from_checkpoint='{output}/checkpoint-4.set-aside'."
    ) in capsys.readouterr().err
    assert names_in(output)[:2] == ["checkpoint-1", "checkpoint-2"]


def test_others_can_be_refused(make_fit: MakeFit, output: Path) -> None:
    fit_of(make_fit, 4).train()
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    with pytest.raises(ValueError, match=r"doesn't go on from: checkpoint-2, checkpoint-4\. Pass resume_from"):
        fit_of(make_fit, 4, other_checkpoints="refuse").train()
    with pytest.raises(ValueError, match=r"doesn't go on from: checkpoint-4\. "):
        fit_of(make_fit, 4, other_checkpoints="refuse").train(resume_from_checkpoint=output / "checkpoint-2")
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before
    fit_of(make_fit, 6, other_checkpoints="refuse").train(resume_from_checkpoint=True)
    assert names_in(output) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    with pytest.raises(ValueError, match="other_checkpoints='keep': must be one of 'set_aside', 'refuse'"):
        fit_of(make_fit, 4, other_checkpoints="keep")


def test_a_save_by_hand_claims_the_directory(make_fit: MakeFit, output: Path) -> None:
    fit_of(make_fit, 4).train()
    fit = fit_of(make_fit, 3, save_strategy="no")
    fit.train()
    assert names_in(output) == ["checkpoint-2", "checkpoint-4"]
    fit.save_checkpoint()
    assert names_in(output) == ["checkpoint-2.set-aside", "checkpoint-3", "checkpoint-4.set-aside"]


def test_a_save_by_hand_after_another_run_came_sets_that_aside(make_fit: MakeFit, output: Path) -> None:
    first = fit_of(make_fit, 2)
    first.train()
    fit_of(make_fit, 4).train()
    first.save_checkpoint()
    assert names_in(output) == [
        "checkpoint-2",
        "checkpoint-2.set-aside",
        "checkpoint-2.set-aside-2",
        "checkpoint-4.set-aside",
    ]
    verify(output / "checkpoint-2")


def test_what_was_copied_in_while_the_run_was_under_way_is_left_alone(
    make_fit: MakeFit, output: Path, tmp_path: Path
) -> None:
    fit_of(make_fit, 6, output_dir=str(tmp_path / "first")).train()

    class CopyIn(Callback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            if state.global_step == 3:
                for step in (2, 4, 6):
                    name = f"checkpoint-{step}"
                    shutil.copytree(tmp_path / "first" / name, output / name, dirs_exist_ok=step == 2)

    fit_of(make_fit, 6, CopyIn(), save_steps=3, save_total_limit=1).train()
    assert names_in(output) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-6.set-aside"]
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-6.set-aside"):
        assert bytes_of(output / name) == bytes_of(tmp_path / "first" / name.removesuffix(".set-aside"))


def test_checkpoints_from_before_runs_had_ids(make_fit: MakeFit, output: Path) -> None:
    fit_of(make_fit, 4).train()
    (output / "line.json").unlink()
    for step in (2, 4):
        change_state(output / f"checkpoint-{step}", run=None)
    fit = fit_of(make_fit, 8, save_total_limit=3)
    fit.train(resume_from_checkpoint=True)
    assert names_in(output) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]  # they count as the run's own
    assert run_of(output / "checkpoint-6")["ancestors"] == [{"id": "", "until": 4}]
    fit_of(make_fit, 2).train()
    assert names_in(output)[0] == "checkpoint-2"
    assert all(name.endswith(".set-aside") for name in names_in(output)[1:])


def test_without_a_marker_the_highest_number_is_taken(make_fit: MakeFit, output: Path, tmp_path: Path) -> None:
    fit_of(make_fit, 4, output_dir=str(tmp_path / "first")).train()
    output.mkdir()
    shutil.copytree(tmp_path / "first" / "checkpoint-4", output / "checkpoint-4")
    fit = fit_of(make_fit, 6)
    fit.train(resume_from_checkpoint=True)
    assert run_of(output / "checkpoint-6") == run_of(tmp_path / "first" / "checkpoint-4")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": "ab"}', '{"id": "ab", "ancestors": [3]}'])
def test_a_marker_that_cant_be_read_is_an_error(make_fit: MakeFit, output: Path, content: str) -> None:
    fit_of(make_fit, 4).train()
    (output / "line.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"line\.json"):
        fit_of(make_fit, 6).train(resume_from_checkpoint=True)
    fit_of(make_fit, 6).train(resume_from_checkpoint=output / "checkpoint-4")  # by path it goes on, and mends it
    assert names_in(output) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    fit_of(make_fit, 8).train(resume_from_checkpoint=True)


def test_ids_differ_though_seeds_dont_and_draw_on_no_generator(make_fit: MakeFit, tmp_path: Path) -> None:
    ids, ends = set(), []
    for name in ("first", "second"):
        fit = fit_of(make_fit, 2, output_dir=str(tmp_path / name))
        fit.train()
        ids.add(run_of(tmp_path / name / "checkpoint-2")["id"])
        ends.append(bytes_of(tmp_path / name / "checkpoint-2")["random-00000.json"])
    assert len(ids) == 2 and all(len(name) == 16 and int(name, 16) >= 0 for name in ids)
    assert ends[0] == ends[1]


def test_uploads_are_of_the_runs_own_line(make_fit: MakeFit, output: Path, tmp_path: Path) -> None:
    fit_of(make_fit, 4).train()
    fit_of(make_fit, 6).train(resume_from_checkpoint=output / "checkpoint-2")
    stray = tmp_path / "stray"
    fit_of(make_fit, 5, output_dir=str(stray), save_steps=5).train()
    shutil.copytree(stray / "checkpoint-5", output / "checkpoint-5")
    fit_of(make_fit, 6, Upload(f"file://{tmp_path}/away"), save_strategy="no").train(resume_from_checkpoint=True)
    assert names_in(tmp_path / "away") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


# The best.


class Scripted(Regressor):
    """Its evaluation loss is the next number of a script; its bias counts the updates."""

    def __init__(self, script: list[float]) -> None:
        super().__init__()
        self.script = iter(script)
        torch.nn.init.zeros_(self.head.bias)

    def loss(self, outputs: torch.Tensor, batch: dict[str, torch.Tensor]) -> Any:
        if not self.training:
            return torch.tensor(next(self.script))
        return self.head.bias.sum() * -10.0 + outputs.sum() * 0.0  # SGD at 0.1 adds 1 to the bias


def scripted_fit(make_fit: MakeFit, script: list[float], *callbacks: Callback, **options: Any) -> Fit:
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, **SAVING, **options}
    return make_fit(Scripted(script), regression_rows(25), regression_rows(1), callbacks=callbacks, **evaluated)


def test_the_best_of_the_moment_of_the_save_stays_until_its_successor_is_there(make_fit: MakeFit, output: Path) -> None:
    import threading

    better, seen = threading.Event(), {}

    class Slow(Callback):
        """checkpoint-4 is published, and then rotated, only when the evaluation at 6 was the best."""

        def checkpoint_published(self, path: Path) -> None:
            if path.name == "checkpoint-4":
                assert better.wait(30.0)
            seen[path.name] = names_in(output)

        def on_evaluate(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            if state.global_step == 8:  # note_evaluation follows on_evaluate: that of 6 is noted now
                better.set()

    options = {"async_save": True, "save_total_limit": 1, "load_best_model_at_end": True, "max_steps": 8}
    slow = Slow()

    class SaveLater(Callback):
        def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            control.should_save = control.should_save and state.global_step != 6

    fit = scripted_fit(make_fit, [1.0, 2.0, 0.5, 3.0], slow, SaveLater(), **options)
    with pytest.warns(UserWarning, match=r"best evaluation was at update 6, and there is no .*checkpoint-6"):
        fit.train()
    # At the rotation of 4 the run's best is 6 already, which has no checkpoint: that of 2 stays.
    assert seen["checkpoint-8"] == ["checkpoint-2", "checkpoint-4", "checkpoint-8"]


def test_a_best_checkpoint_that_is_missing_is_said(make_fit: MakeFit, output: Path) -> None:
    class Lose(Callback):
        def on_train_end(self, *_: Any, **context: Any) -> None:
            shutil.rmtree(output / "checkpoint-2")

    fit = scripted_fit(make_fit, [1.0, 2.0], Lose(), load_best_model_at_end=True, max_steps=4)
    with pytest.warns(
        UserWarning, match=r"load_best_model_at_end=True has no effect: the best evaluation was at update 2"
    ):
        fit.train()
    assert fit.module.head.bias.item() == pytest.approx(4)


def test_nothing_is_said_where_the_best_is_loaded_or_is_the_last(make_fit: MakeFit) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = scripted_fit(make_fit, [1.0, 2.0], load_best_model_at_end=True, max_steps=4)
        fit.train()
        assert fit.module.head.bias.item() == pytest.approx(2)
        scripted_fit(make_fit, [2.0, 1.0], load_best_model_at_end=True, max_steps=4).train()
