"""Checkpoints go to a URL in the background: whole ones, all of them, and nothing local is removed before."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from stratagem import Callback, Fit
from stratagem.framework.checkpoint import remote
from stratagem.framework.checkpoint.directory import HISTORY, CheckpointError
from stratagem.framework.checkpoint.verifying import verify
from stratagem.framework.uploading import Upload, UploadWarning
from tiny import Dropping, MakeFit, StopAt, logs_of, parameters_of, regression_rows


class Scripted(LocalFileSystem):
    """The local disk under a protocol of its own, with something done before each copy."""

    protocol = "scripted"
    puts: list[str] = []
    before_put: Any = None  # (the number of the copy, the local file) -> None

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return LocalFileSystem._strip_protocol(str(path).removeprefix("scripted://"))

    def put_file(self, local: str, path: str, *arguments: Any, **options: Any) -> None:
        Scripted.puts.append(local)
        if Scripted.before_put is not None:
            Scripted.before_put(len(Scripted.puts), Path(local))
        super().put_file(local, path, *arguments, **options)


fsspec.register_implementation("scripted", Scripted, clobber=True)


@pytest.fixture(autouse=True)
def unscripted() -> None:
    Scripted.puts, Scripted.before_put = [], None


def fit_of(make_fit: MakeFit, *callbacks: Callback, **options: Any) -> Fit:
    torch.manual_seed(5)
    defaults: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
    }
    return make_fit(Dropping(), regression_rows(22), callbacks=callbacks, **{**defaults, **options})


def steps_in(directory: Path) -> set[int]:
    return {int(path.name.removeprefix("checkpoint-")) for path in directory.glob("checkpoint-*")}


def local_of(fit: Fit) -> Path:
    return Path(fit.args.output_dir)


@pytest.mark.parametrize("in_background", [False, True])
def test_every_checkpoint_is_there_whole_when_training_has_ended(
    make_fit: MakeFit, tmp_path: Path, in_background: bool
) -> None:
    def is_published(number: int, local: Path) -> None:
        checkpoint = next(parent for parent in local.parents if parent.name.startswith("checkpoint-"))
        assert checkpoint.name.removeprefix("checkpoint-").isdigit()  # no .partial
        assert (checkpoint / "manifest.json").exists()

    Scripted.before_put = staticmethod(is_published)
    away = tmp_path / "away" / "run"
    fit = fit_of(make_fit, Upload(f"scripted://{away}"), async_save=in_background, save_total_limit=1)
    fit.train()
    assert steps_in(away) == {1, 2, 3}
    for step in (1, 2, 3):
        verify(away / f"checkpoint-{step}")
    assert steps_in(local_of(fit)) == {3}


def test_memory_holds_the_same_bytes(make_fit: MakeFit) -> None:
    fit = fit_of(make_fit, Upload("memory://runs/7"))
    fit.train()
    there = fsspec.filesystem("memory")
    for step in (1, 2, 3):
        local = local_of(fit) / f"checkpoint-{step}"
        names = {str(file.relative_to(local)) for file in local.rglob("*") if file.is_file()}
        target = f"/runs/7/{local.name}"
        assert {path.removeprefix(f"{target}/") for path in there.find(target)} == names
        assert all(there.cat_file(f"{target}/{name}") == (local / name).read_bytes() for name in names - {HISTORY})
        assert (local / HISTORY).read_bytes().startswith(there.cat_file(f"{target}/{HISTORY}"))  # it has grown since


def test_a_run_resumes_from_a_url_bit_for_bit(make_fit: MakeFit, tmp_path: Path) -> None:
    fit = fit_of(make_fit, Upload(f"file://{tmp_path}/away"))
    fit.train()
    elsewhere = str(tmp_path / "elsewhere")
    resumed = fit_of(make_fit, Upload(f"file://{tmp_path}/away"), output_dir=elsewhere)
    resumed.train(resume_from_checkpoint=f"file://{tmp_path}/away/checkpoint-1")
    expected = parameters_of(fit.module)
    for name, value in parameters_of(resumed.module).items():
        assert torch.equal(value, expected[name]), name
    assert steps_in(tmp_path / "elsewhere") == {1, 2, 3}


def test_a_url_without_a_whole_checkpoint(make_fit: MakeFit, tmp_path: Path) -> None:
    fit = fit_of(make_fit, Upload(f"file://{tmp_path}/away"))
    fit.train()
    (tmp_path / "away" / "checkpoint-2" / "manifest.json").unlink()
    again = fit_of(make_fit, output_dir=str(tmp_path / "elsewhere"))
    with pytest.raises(CheckpointError, match=r"checkpoint-2 can't be resumed from.*manifest\.json"):
        again.train(resume_from_checkpoint=f"file://{tmp_path}/away/checkpoint-2")
    state = tmp_path / "away" / "checkpoint-3" / "state.json"
    state.write_text(state.read_text().replace("0", "1"))
    with pytest.raises(CheckpointError, match=r"state\.json was altered"):
        again.train(resume_from_checkpoint=f"file://{tmp_path}/away/checkpoint-3")


def test_rotation_waits_for_uploads(make_fit: MakeFit, tmp_path: Path) -> None:
    may_go_on, seen = threading.Event(), []
    Scripted.before_put = staticmethod(lambda number, local: may_go_on.wait(30.0))

    class Look(Callback):
        def on_save(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            seen.append(steps_in(Path(args.output_dir)))
            if state.global_step == 4:
                may_go_on.set()

    fit = fit_of(make_fit, Upload(f"scripted://{tmp_path}/away"), Look(), save_total_limit=2, max_steps=5)
    fit.train()
    assert seen[:4] == [{1}, {1, 2}, {1, 2, 3}, {1, 2, 3, 4}]
    assert steps_in(local_of(fit)) == {4, 5}
    assert steps_in(tmp_path / "away") == {1, 2, 3, 4, 5}


def test_one_that_waits_displaces_no_other(make_fit: MakeFit, tmp_path: Path) -> None:
    # Only checkpoint-1 fails, each time: beside it, the two newest stay.
    def fail(number: int, local: Path) -> None:
        if "checkpoint-1/" in str(local):
            raise OSError("the disk is on fire")

    Scripted.before_put = staticmethod(fail)
    fit = fit_of(make_fit, Upload(f"scripted://{tmp_path}/away"), save_total_limit=2, max_steps=5)
    with pytest.warns(UploadWarning, match=r"checkpoint-1 could not be uploaded.*the disk is on fire"):
        fit.train()
    assert steps_in(local_of(fit)) == {1, 4, 5}
    assert not (tmp_path / "away" / "checkpoint-1" / "manifest.json").exists()
    assert fit.state.global_step == 5


def test_a_failed_upload_is_reported_and_tried_again(make_fit: MakeFit, tmp_path: Path) -> None:
    def fail_once(number: int, local: Path) -> None:
        if number == 2:
            raise OSError("no route to host")

    Scripted.before_put = staticmethod(fail_once)
    upload = Upload(f"scripted://{tmp_path}/away")

    class Wait(Callback):  # so that the log after each save knows how its upload went
        def on_save(self, *args: Any, **context: Any) -> None:
            assert upload.wait(30.0)

    fit = fit_of(make_fit, upload, Wait(), max_steps=4, save_total_limit=1)
    with pytest.warns(UploadWarning, match=r"checkpoint-1 could not be uploaded to scripted://.*no route to host"):
        fit.train()
    # It fails after the first log; the second tells; by the third it is made good.
    assert [log.get("failed_uploads") for log in logs_of(fit)] == [None, 1, 0, None]
    assert steps_in(tmp_path / "away") == {1, 2, 3, 4}
    for step in (1, 2, 3, 4):
        verify(tmp_path / "away" / f"checkpoint-{step}")
    assert steps_in(local_of(fit)) == {4}


def test_a_target_that_cant_be_written_ends_nothing(make_fit: MakeFit, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fit = fit_of(make_fit, Upload(f"file://{tmp_path}/file/run"), save_total_limit=1)
    with pytest.warns(UploadWarning, match=r"could not be uploaded to file://.*It stays there; training goes on"):
        fit.train()
    assert fit.state.global_step == 3
    assert steps_in(local_of(fit)) == {1, 2, 3}
    assert fit.state.log_history[-1]["failed_uploads"] == 3  # the totals, or a log after them


@pytest.mark.parametrize("hangs", [False, True])
def test_an_exception_in_training_ends_it(make_fit: MakeFit, tmp_path: Path, hangs: bool) -> None:
    class Fail(Callback):
        def on_save(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            if state.global_step == 2:
                raise RuntimeError("of the user")

    let_go = threading.Event()
    if hangs:
        Scripted.before_put = staticmethod(lambda number, local: let_go.wait(60.0))
    upload = Upload(f"scripted://{tmp_path}/away", grace=0.3 if hangs else 30.0)
    fit = fit_of(make_fit, upload, Fail(), save_total_limit=1)
    began = time.monotonic()
    if hangs:
        with pytest.warns(UploadWarning, match="training ended"), pytest.raises(RuntimeError, match="of the user"):
            fit.train()
        assert steps_in(local_of(fit)) == {1, 2}
        let_go.set()
        assert upload.wait(30.0)
    else:
        with pytest.raises(RuntimeError, match="of the user"):
            fit.train()
        assert {path.parent.name for path in (tmp_path / "away").glob("*/manifest.json")} == {
            "checkpoint-1",
            "checkpoint-2",
        }
    assert time.monotonic() - began < 20


def test_a_resumed_run_uploads_what_was_left(make_fit: MakeFit, tmp_path: Path) -> None:
    fit_of(make_fit, StopAt(2), max_steps=4).train()  # nothing was uploaded
    fit = fit_of(make_fit, Upload(f"scripted://{tmp_path}/away"), max_steps=4, save_total_limit=1)
    fit.train(resume_from_checkpoint=True)
    assert steps_in(tmp_path / "away") == {1, 2, 3, 4}
    assert steps_in(local_of(fit)) == {4}


# One copy.


@pytest.fixture
def checkpoint(make_fit: MakeFit) -> Path:
    fit = fit_of(make_fit, max_steps=1)
    fit.train()
    return local_of(fit) / "checkpoint-1"


def test_what_is_there_already_is_not_copied_again(checkpoint: Path, tmp_path: Path) -> None:
    filesystem, folder = remote.open_filesystem(f"scripted://{tmp_path}/away")
    remote.upload(checkpoint, filesystem, folder)
    copied = len(Scripted.puts)
    assert copied == len([*json.loads((checkpoint / "manifest.json").read_text())["files"], HISTORY])
    remote.upload(checkpoint, filesystem, folder)
    assert len(Scripted.puts) == copied


def test_a_copy_of_another_is_not_whole_while_it_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    filesystem, folder = remote.open_filesystem(f"scripted://{tmp_path}/away")
    remote.upload(checkpoint, filesystem, folder)
    manifest = tmp_path / "away" / "checkpoint-1" / "manifest.json"
    manifest.write_text("{}")  # as of another run
    strays = [manifest.parent / name for name in ("model/shard-00002.safetensors", "random-00001.json")]
    for stray in strays:
        stray.write_bytes(b"the other run's")
    seen: list[bool] = []
    Scripted.before_put = staticmethod(lambda number, local: seen.append(manifest.exists()))
    remote.upload(checkpoint, filesystem, folder)
    assert seen and not any(seen)
    verify(manifest.parent)
    assert not any(stray.exists() for stray in strays)


def test_one_that_is_replaced_meanwhile_is_not_published(checkpoint: Path, tmp_path: Path) -> None:
    filesystem, folder = remote.open_filesystem(f"scripted://{tmp_path}/away")

    def replace(number: int, local: Path) -> None:
        if number == 2:
            (checkpoint / "manifest.json").write_text("{}")

    Scripted.before_put = staticmethod(replace)
    with pytest.raises(CheckpointError, match="was replaced while it was uploaded"):
        remote.upload(checkpoint, filesystem, folder)
    assert not list((tmp_path / "away").rglob("manifest.json*"))


def test_a_copy_that_came_out_short_is_not_published(checkpoint: Path, tmp_path: Path) -> None:
    class Short(Scripted):
        protocol = "short"

        def put_file(self, local: str, path: str, *arguments: Any, **options: Any) -> None:
            Path(path).write_bytes(Path(local).read_bytes()[:-1])

    with pytest.raises(CheckpointError, match=r"bytes after the upload instead of"):
        remote.upload(checkpoint, Short(), str(tmp_path / "away"))
    assert not list((tmp_path / "away").rglob("manifest.json*"))


def test_a_manifest_leads_nowhere_else(tmp_path: Path) -> None:
    source = tmp_path / "away" / "checkpoint-1"
    source.mkdir(parents=True)
    files = {"../../stolen": {"bytes": 1, "sha256": 64 * "0"}}
    (source / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    with pytest.raises(CheckpointError, match=r"\.\./\.\./stolen.*inside of the checkpoint"):
        remote.download(f"file://{source}", tmp_path / "output")


def test_an_unknown_protocol_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"'gopher://x' can't be opened.*s3://"):
        Upload("gopher://x")


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ValueError, match=r"fsspec, which isn't installed.*pip install 'stratagem\[upload\]'"):
        Upload("memory://x")


STRIDE = 3


@pytest.mark.slow
def test_a_killed_upload_leaves_no_copy_that_looks_whole(tmp_path: Path) -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(here.parent)])}
    done = subprocess.run(
        [sys.executable, str(here / "killed_uploads.py"), str(tmp_path), str(STRIDE)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    kills = result["kills"]
    published = [
        i for i, operation in enumerate(result["operations"]) if operation == "os.rename manifest.json.partial"
    ]
    assert len(published) == 2
    for point, killed in zip(range(0, len(result["operations"]), STRIDE), kills, strict=True):
        # A copy looks whole, and is, once its manifest has its name; the program has compared every file.
        assert killed["whole"] == [step for step, last in zip((2, 4), published, strict=True) if last < point], killed
        assert killed["resumed"] == [2, 4], killed
    assert any(killed["parts"] for killed in kills)
