"""What an output_dir may be and hold: links, strange entries, a home, a directory that can't be written to."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback, Fit, FitArguments
from stratagem.framework.checkpoint import CheckpointError, remote
from stratagem.framework.checkpoint.verifying import verify
from stratagem.framework.loggers.json_lines import JsonLinesLogger
from tiny import Dropping, MakeFit, StopAt, regression_rows

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}


def fit_of(make_fit: MakeFit, max_steps: int, *callbacks: Callback, **options: Any) -> Fit:
    torch.manual_seed(1)
    given = {**SAVING, **options}
    return make_fit(Dropping(), regression_rows(22), max_steps=max_steps, callbacks=callbacks, **given)


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("checkpoint-"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


# Links and strange entries.


def test_a_checkpoint_may_be_a_link_to_another_disk(make_fit: MakeFit, output: Path, tmp_path: Path) -> None:
    fit_of(make_fit, 4).train()
    disk = tmp_path / "disk"
    disk.mkdir()
    for step in (2, 4):
        (output / f"checkpoint-{step}").rename(disk / f"old-{step}")
        (output / f"checkpoint-{step}").symlink_to(disk / f"old-{step}")
    fit = fit_of(make_fit, 8, save_total_limit=1)
    fit.train(resume_from_checkpoint=True)
    assert names_in(output) == ["checkpoint-8"]
    for step in (2, 4):  # rotation took the links and left what they lead to
        verify(disk / f"old-{step}")
    fit_of(make_fit, 10).train(resume_from_checkpoint=True)


def test_a_link_is_replaced_by_a_checkpoint_of_the_same_update(make_fit: MakeFit, output: Path, tmp_path: Path) -> None:
    fit = fit_of(make_fit, 4)
    fit.train()
    (output / "checkpoint-4").rename(tmp_path / "elsewhere")
    (output / "checkpoint-4").symlink_to(tmp_path / "elsewhere")
    fit.save_checkpoint()
    assert not (output / "checkpoint-4").is_symlink()
    verify(output / "checkpoint-4")
    verify(tmp_path / "elsewhere")


def put(kind: str, place: Path, elsewhere: Path) -> None:
    """Something strange under a name."""
    elsewhere.mkdir(exist_ok=True)
    if kind == "file":
        place.write_text("of someone")
    elif kind == "empty directory":
        place.mkdir()
    else:
        place.symlink_to({"link to a directory": elsewhere, "broken link": elsewhere / "gone"}[kind])


@pytest.mark.parametrize("kind", ["file", "empty directory", "link to a directory", "broken link"])
@pytest.mark.parametrize(
    "name", ["checkpoint-6", "checkpoint-6.partial", "checkpoint-6.replaced", "checkpoint-2.partial"]
)
def test_strange_entries_end_neither_the_run_nor_a_later_resume(
    make_fit: MakeFit, output: Path, tmp_path: Path, kind: str, name: str
) -> None:
    class Put(Callback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            if state.global_step == 5:
                put(kind, output / name, tmp_path / "elsewhere")

    put(kind, tmp_path / "elsewhere-of-before", tmp_path / "elsewhere")
    fit_of(make_fit, 8, Put(), save_total_limit=2).train()
    assert {"checkpoint-6", "checkpoint-8"} <= set(names_in(output))
    for step in (6, 8):
        verify(output / f"checkpoint-{step}")
    if name == "checkpoint-6" and kind != "broken link":
        assert (output / "checkpoint-6.set-aside").exists()
    assert (tmp_path / "elsewhere").is_dir()
    # And they lie there when a run is resumed.
    for place in (output / "checkpoint-10", output / "checkpoint-10.partial", output / "checkpoint-8.replaced"):
        put(kind, place, tmp_path / "elsewhere")
    fit_of(make_fit, 10, save_total_limit=2).train(resume_from_checkpoint=True)
    assert {"checkpoint-8", "checkpoint-10"} <= set(names_in(output))
    assert not [entry for entry in names_in(output) if entry.endswith((".partial", ".replaced"))]
    verify(output / "checkpoint-10")


def test_other_names_are_nobodys(make_fit: MakeFit, output: Path) -> None:
    output.mkdir()
    names = ["checkpoint-best", "checkpoint-best.partial", "my-checkpoint-9", "checkpoint-9-old", "checkpoint-9.bak"]
    for name in names:
        (output / name).mkdir()
    fit_of(make_fit, 4, save_total_limit=1).train()
    fit_of(make_fit, 6, save_total_limit=1).train(resume_from_checkpoint=True)
    assert sorted(path.name for path in output.iterdir()) == sorted(
        [*names, "checkpoint-6", "config.yaml", "line.json"]
    )


# Where it is.


def test_a_home_is_found_for_checkpoints_and_logs(
    make_fit: MakeFit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    loggers = ["jsonl", "tensorboard", JsonLinesLogger("~/own.jsonl")]
    fit = fit_of(make_fit, 4, output_dir="~/runs/7", loggers=loggers, logging_steps=1)
    fit.train()
    run = tmp_path / "home" / "runs" / "7"
    assert {"checkpoint-2", "checkpoint-4", "log.jsonl", "train"} <= {path.name for path in run.iterdir()}
    assert (tmp_path / "home" / "own.jsonl").exists()
    assert not (tmp_path / "~").exists()
    resumed = fit_of(make_fit, 6, output_dir=str(run))
    resumed.train(resume_from_checkpoint="~/runs/7/checkpoint-4")
    assert resumed.state.global_step == 6
    assert json.loads((run / "checkpoint-4" / "state.json").read_text())["arguments"]["output_dir"] == str(run)
    assert fit.export("~/plain.safetensors") == tmp_path / "home" / "plain.safetensors"


def test_a_home_that_isnt_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"output_dir='~nobody-here/x': this user's home isn't known"):
        FitArguments(output_dir="~nobody-here/x")
    assert FitArguments(output_dir="./~x").output_dir == "./~x"


# Whether it can be written to.


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Any]:
    """Mounts a memory filesystem with some options."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"mount-{len(places)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting isn't allowed here: {done.stderr.decode().strip()}")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", place], check=True)


def test_a_read_only_directory_is_refused_when_the_fit_is_made(make_fit: MakeFit, mounted: Any) -> None:
    place = mounted("ro")
    for output_dir in (place, place / "deep" / "down"):
        with pytest.raises(ValueError, match=rf"output_dir='{output_dir}' can't be written to: Read-only file system"):
            fit_of(make_fit, 4, output_dir=str(output_dir))
    assert fit_of(make_fit, 4, output_dir=str(place), save_strategy="no").train().global_step == 4


def test_a_full_directory_is_refused_when_the_fit_is_made(make_fit: MakeFit, mounted: Any) -> None:
    place = mounted("size=16k")
    fit_of(make_fit, 4, output_dir=str(place))
    assert list(place.iterdir()) == []
    try:
        (place / "filling").write_bytes(bytes(20000))
    except OSError:
        assert (place / "filling").stat().st_size
    with pytest.raises(ValueError, match="can't be written to: No space left on device"):
        fit_of(make_fit, 4, output_dir=str(place))
    assert [path.name for path in place.iterdir()] == ["filling"]


def test_a_directory_of_the_system_is_refused_when_the_fit_is_made(make_fit: MakeFit) -> None:
    with pytest.raises(ValueError, match="output_dir='/proc/run' can't be written to"):
        fit_of(make_fit, 4, output_dir="/proc/run")


def test_making_a_fit_leaves_nothing_behind(make_fit: MakeFit, tmp_path: Path) -> None:
    fit_of(make_fit, 4, output_dir=str(tmp_path / "deep" / "down"))
    assert list(tmp_path.iterdir()) == []


# What comes from a URL.


def test_a_download_that_is_refused_leaves_nothing_and_publishes_nothing(
    make_fit: MakeFit, output: Path, tmp_path: Path
) -> None:
    fit_of(make_fit, 2).train()
    there = output / "checkpoint-2"
    shards = next((there / "model").iterdir())
    content = bytearray(shards.read_bytes())
    content[-1] ^= 1
    shards.write_bytes(content)
    into = tmp_path / "into"
    for complaint, spoil in (
        (r"shard-.*was altered", lambda: None),
        ("No such file|FileNotFound|doesn't exist|" + shards.name, shards.unlink),
    ):
        spoil()
        with pytest.raises(CheckpointError, match=complaint):
            remote.download(f"file://{there}", into)
        assert list(into.iterdir()) == []


def test_a_resumed_download_is_taken_again_after_a_stop(make_fit: MakeFit, output: Path, tmp_path: Path) -> None:
    fit_of(make_fit, 4).train()
    into = tmp_path / "into"
    url = f"file://{output}/checkpoint-2"
    fit_of(make_fit, 8, StopAt(6), output_dir=str(into)).train(resume_from_checkpoint=url)
    assert names_in(into) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    fit_of(make_fit, 8, output_dir=str(into)).train(resume_from_checkpoint=True)
    assert names_in(into) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
