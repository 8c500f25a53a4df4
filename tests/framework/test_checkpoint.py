"""Checkpoints on disk: what they hold, what is refused, what is passed over, what stays; and nothing is unpickled."""

import hashlib
import json
import pickle
import resource
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stratagem import Callback, Fit, FitArguments, TrainModule
from stratagem.framework.checkpoint import CheckpointError, rotate
from stratagem.framework.checkpoint.directory import HISTORY, published
from tiny import Dropping, MakeFit, Regressor, StopAt, parameters_of, regression_rows
from torch import Tensor, nn

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 4}


@pytest.fixture
def run_dir(make_fit: MakeFit, tmp_path: Path) -> Path:
    """The directory of a finished run: checkpoint-2 and checkpoint-4."""
    torch.manual_seed(1)
    make_fit(Dropping(), regression_rows(22), **SAVING).train()
    return tmp_path / "output"


def files_in(checkpoint: Path) -> list[str]:
    return sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())


def tensors_in(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def checkpoints_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("checkpoint"))


# What it holds.


def test_the_manifest_lists_every_file_with_its_size_and_hash(run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoint-4"
    assert checkpoints_in(run_dir) == ["checkpoint-2", "checkpoint-4"]
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert sorted([*manifest["files"], "manifest.json", HISTORY]) == files_in(checkpoint)  # that one grows
    for name, entry in manifest["files"].items():
        content = (checkpoint / name).read_bytes()
        hashes = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if name.endswith(".safetensors"):
            header = content[8 : 8 + int.from_bytes(content[:8], "little")].rstrip(b" ")
            hashes["header"] = hashlib.sha256(header).hexdigest()
            assert json.loads((checkpoint / "tensors.json").read_text())[name] == json.loads(header)
        assert entry == hashes
    assert {name.split("/")[0] for name in manifest["files"]} == {
        "model",
        "optimizer",
        "random-00000.json",
        "state.json",
        "tensors.json",
    }


def test_the_tensors_are_the_runs_by_their_plain_names(make_fit: MakeFit, tmp_path: Path) -> None:
    fit = make_fit(Dropping(), regression_rows(22), **SAVING)
    fit.train()
    checkpoint = tmp_path / "output" / "checkpoint-4"
    expected = parameters_of(fit.module)
    del expected["third.weight"]  # tied to second.weight, and stored once
    torch.testing.assert_close(tensors_in(checkpoint / "model"), expected, rtol=0, atol=0)
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["tied"] == {"third.weight": "second.weight"}
    by_name = {
        f"{name}/{key}": value
        for name, parameter in fit.module.named_parameters()
        for key, value in fit.optimizer.state[parameter].items()
    }
    assert "norm.weight/exp_avg" in by_name
    torch.testing.assert_close(tensors_in(checkpoint / "optimizer"), by_name, rtol=0, atol=0)


def test_no_file_is_a_pickle(run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoint-4"
    for name in files_in(checkpoint):
        file = checkpoint / name
        assert file.suffix in (".json", ".jsonl", ".safetensors")
        assert not zipfile.is_zipfile(file)
        with pytest.raises(Exception), file.open("rb") as content:  # noqa: B017 (any error will do)
            pickle.load(content)
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".jsonl":
            assert [json.loads(line) for line in file.read_text().splitlines()]
        else:
            load_file(file)


def test_nothing_is_unpickled_to_resume(make_fit: MakeFit, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a checkpoint was unpickled")

    for holder, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(holder, name, refuse)
    fit = make_fit(Dropping(), regression_rows(22), **{**SAVING, "max_steps": 6, "save_strategy": "no"})
    assert fit.train(resume_from_checkpoint=run_dir / "checkpoint-4").global_step == 6


class Assorted(Regressor):
    """Buffers and parameters of every shape and dtype that is easy to lose."""

    def __init__(self, fill: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(fill)))
        self.none_of_it = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("rotary", torch.polar(torch.ones(2, 3), torch.full((2, 3), float(fill))))
        self.register_buffer("counter", torch.tensor(2**53 + fill))
        self.register_buffer("mask", torch.tensor([fill % 2 == 0, fill % 2 == 1]))
        self.register_buffer("small", torch.tensor([fill, -1], dtype=torch.int8))
        self.register_buffer("bytes", torch.tensor([fill, 255], dtype=torch.uint8))
        self.register_buffer("transposed", torch.full((3, 2), float(fill)).add(torch.arange(2.0)).T)
        both = torch.arange(4.0) + fill
        self.register_buffer("first_half", both[:2])  # two views of one storage
        self.register_buffer("second_half", both[2:])
        self.register_buffer("not_kept", torch.tensor([float(fill)]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def test_tensors_of_every_kind_come_back(make_fit: MakeFit, tmp_path: Path) -> None:
    saved, loaded = Assorted(3), Assorted(8)
    make_fit(saved, regression_rows(4), max_steps=2, save_strategy="steps").train()
    before = loaded.not_kept.clone()
    make_fit(loaded, regression_rows(4), max_steps=2).train(resume_from_checkpoint=True)
    torch.testing.assert_close(parameters_of(loaded), parameters_of(saved), rtol=0, atol=0)
    assert loaded.rotary.dtype == torch.complex64
    assert loaded.counter.item() == 2**53 + 3
    assert torch.equal(loaded.not_kept, before)


def test_tied_weights_stay_tied(make_fit: MakeFit, run_dir: Path) -> None:
    module = Dropping()
    make_fit(module, regression_rows(22), **SAVING).train(resume_from_checkpoint=True)
    assert module.third.weight is module.second.weight
    stored = tensors_in(run_dir / "checkpoint-4" / "model")["second.weight"]
    assert torch.equal(module.third.weight, stored)


def test_saving_by_hand_between_runs(make_fit: MakeFit, tmp_path: Path) -> None:
    fit = make_fit(Dropping(), regression_rows(22), **{**SAVING, "save_strategy": "no"})
    fit.train()
    path = fit.save_checkpoint()
    assert path == tmp_path / "output" / "checkpoint-4"
    first, state = tensors_in(path / "model"), (path / "state.json").read_text()
    (path / "model" / "old.txt").write_text("from the first time")
    fit.save_checkpoint()  # the same update again: replaced
    assert "model/old.txt" not in files_in(path)
    assert (path / "state.json").read_text() == state
    torch.testing.assert_close(tensors_in(path / "model"), first, rtol=0, atol=0)
    assert checkpoints_in(tmp_path / "output") == ["checkpoint-4"]


# What is refused.


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" ")


DAMAGES = {"flip": (flip, "altered"), "truncate": (truncate, "altered"), "lengthen": (lengthen, "altered")}
PARTS = ["state.json", "random-00000.json", "model", "optimizer"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", [*DAMAGES, "missing"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_is_taken(
    make_fit: MakeFit, run_dir: Path, capsys: pytest.CaptureFixture[str], part: str, damage: str
) -> None:
    [file] = [run_dir / "checkpoint-4" / name for name in files_in(run_dir / "checkpoint-4") if name.startswith(part)]
    if damage == "missing":
        file.unlink()
        complaint = "is missing"
    else:
        spoil, complaint = DAMAGES[damage]
        spoil(file)
    module = Dropping()
    before = parameters_of(module)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        make_fit(module, regression_rows(22), **SAVING).train(resume_from_checkpoint=run_dir / "checkpoint-4")
    assert str(file) in str(caught.value)
    torch.testing.assert_close(parameters_of(module), before, rtol=0, atol=0)

    capsys.readouterr()
    fit = make_fit(Dropping(), regression_rows(22), **{**SAVING, "save_strategy": "no"})
    assert fit.train(resume_from_checkpoint=True).global_step == 4
    said = capsys.readouterr().err
    assert "Passed over" in said
    assert str(file) in said
    # Two updates were done again, from checkpoint-2.
    stored = tensors_in(run_dir / "checkpoint-2" / "optimizer")["head.weight/step"].item()
    assert (stored, fit.optimizer.state[fit.module.head.weight]["step"].item()) == (2, 4)


def test_a_checkpoint_without_its_manifest_is_none(make_fit: MakeFit, run_dir: Path) -> None:
    (run_dir / "checkpoint-4" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-4 has no manifest\.json"):
        make_fit(Dropping(), regression_rows(22), **SAVING).train(resume_from_checkpoint=run_dir / "checkpoint-4")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", r"manifest\.json can't be read"),
        ('{"format": 99, "files": {}}', "has format 99; this version of stratagem reads formats 1 to 3"),
        ("[]", r"manifest\.json"),
        ('{"format": 1}', r"manifest\.json"),
    ],
)
def test_a_manifest_that_cant_be_read(make_fit: MakeFit, run_dir: Path, content: str, complaint: str) -> None:
    (run_dir / "checkpoint-4" / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=complaint):
        make_fit(Dropping(), regression_rows(22), **SAVING).train(resume_from_checkpoint=run_dir / "checkpoint-4")
    fit = make_fit(Dropping(), regression_rows(22), **SAVING)
    assert fit.train(resume_from_checkpoint=True).global_step == 4


def test_damaged_checkpoints_alone_are_an_error_and_never_a_fresh_start(make_fit: MakeFit, run_dir: Path) -> None:
    for step in (2, 4):
        flip(run_dir / f"checkpoint-{step}" / "state.json")
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is whole") as caught:
        make_fit(Dropping(), regression_rows(22), **SAVING).train(resume_from_checkpoint=True)
    for step in (2, 4):
        assert f"checkpoint-{step}/state.json" in str(caught.value)


def test_without_any_checkpoint_the_run_begins(make_fit: MakeFit, tmp_path: Path) -> None:
    fit = make_fit(Dropping(), regression_rows(22), **{**SAVING, "save_strategy": "no"})
    assert fit.train(resume_from_checkpoint=True).global_step == 4
    assert not (tmp_path / "output").exists()


def test_a_path_that_is_not_there(make_fit: MakeFit, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint-7 doesn't exist"):
        make_fit(Dropping(), regression_rows(22)).train(resume_from_checkpoint=tmp_path / "checkpoint-7")


def test_a_file_is_not_a_checkpoint(make_fit: MakeFit, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint-7"
    file.write_text("weights")
    with pytest.raises(CheckpointError, match=r"checkpoint-7 is a file; a checkpoint is a directory"):
        make_fit(Dropping(), regression_rows(22)).train(resume_from_checkpoint=str(file))


def test_an_output_dir_that_is_a_file(make_fit: MakeFit, tmp_path: Path) -> None:
    file = tmp_path / "taken"
    file.write_text("here first")
    with pytest.raises(ValueError, match=r"taken.* is a file"):
        make_fit(Dropping(), regression_rows(22), **SAVING, output_dir=str(file)).train()
    with pytest.raises(ValueError, match=r"taken.* is a file"):
        make_fit(Dropping(), regression_rows(22), loggers=["jsonl"], output_dir=str(file)).train()
    assert file.read_text() == "here first"


def test_a_checkpoint_of_another_model_lists_the_names(make_fit: MakeFit, run_dir: Path) -> None:
    class Other(Dropping):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 1, bias=False)
            self.extra = nn.Linear(1, 2)
            self.first = nn.Linear(4, 8)

    module = Other()
    before = parameters_of(module)
    with pytest.raises(CheckpointError, match="is a checkpoint of another model") as caught:
        make_fit(module, regression_rows(22), **SAVING).train(resume_from_checkpoint=True)
    message = str(caught.value)
    assert "the checkpoint lacks: extra.weight, extra.bias" in message
    assert "the model lacks: head.bias" in message
    assert "first.weight (8, 4) (checkpoint: (8, 3))" in message
    torch.testing.assert_close(parameters_of(module), before, rtol=0, atol=0)


def test_parameters_that_were_frozen_have_no_optimizer_state(make_fit: MakeFit, tmp_path: Path) -> None:
    saved, loaded = Dropping(), Dropping()
    saved.first.requires_grad_(False)
    make_fit(saved, regression_rows(22), **SAVING).train()
    before = parameters_of(loaded)
    with pytest.raises(
        CheckpointError, match=r"no optimizer state for first\.weight, first\.bias: it was saved with them frozen"
    ):
        make_fit(loaded, regression_rows(22), **SAVING).train(resume_from_checkpoint=True)
    torch.testing.assert_close(parameters_of(loaded), before, rtol=0, atol=0)


def test_parameters_may_be_frozen_when_a_run_is_resumed(make_fit: MakeFit, run_dir: Path) -> None:
    module = Dropping()
    module.first.requires_grad_(False)
    fit = make_fit(module, regression_rows(22), **{**SAVING, "max_steps": 6})
    fit.train(resume_from_checkpoint=True)
    stored = tensors_in(run_dir / "checkpoint-4" / "model")
    assert torch.equal(module.first.weight, stored["first.weight"])
    assert not torch.equal(module.head.weight, stored["head.weight"])
    assert fit.optimizer.state[module.head.weight]["step"].item() == 6


def test_another_optimizer_is_refused(make_fit: MakeFit, run_dir: Path) -> None:
    class WithSgd(Dropping):
        def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=args.learning_rate, momentum=0.9)

    module = WithSgd()
    before = parameters_of(module)
    with pytest.raises(CheckpointError, match=r"was saved with another optimizer: .*betas.* SGD are .*momentum"):
        make_fit(module, regression_rows(22), **SAVING).train(resume_from_checkpoint=True)
    torch.testing.assert_close(parameters_of(module), before, rtol=0, atol=0)


class Grouped(Regressor):
    """SGD with the two layers in one group or in two."""

    def __init__(self, *rates: float) -> None:
        super().__init__()
        self.rates = rates

    def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
        if len(self.rates) == 1:
            return torch.optim.SGD(self.parameters(), lr=self.rates[0], momentum=0.9)
        layers = (self.hidden, self.head)
        groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in zip(layers, self.rates, strict=True)]
        return torch.optim.SGD(groups, momentum=0.9)


def test_groups_that_are_cut_finer_find_their_options_by_name(make_fit: MakeFit) -> None:
    make_fit(Grouped(0.1), regression_rows(4), max_steps=1, save_strategy="steps").train()
    fit = make_fit(Grouped(0.5, 0.6), regression_rows(4), max_steps=1)
    fit.train(resume_from_checkpoint=True)
    assert [group["lr"] for group in fit.optimizer.param_groups] == [0.1, 0.1]


def test_groups_that_mix_saved_options_are_refused(make_fit: MakeFit) -> None:
    make_fit(Grouped(0.1, 0.2), regression_rows(4), max_steps=1, save_strategy="steps").train()
    with pytest.raises(CheckpointError, match=r"other parameter groups.*hidden\.weight.*were not one"):
        make_fit(Grouped(0.1), regression_rows(4), max_steps=1).train(resume_from_checkpoint=True)


# What stays.


def test_rotation_keeps_the_newest(make_fit: MakeFit, tmp_path: Path) -> None:
    options = {**SAVING, "save_steps": 1, "max_steps": 11, "save_total_limit": 3}
    make_fit(Dropping(), regression_rows(22), **options).train()
    # By number: as text, 9 would be the newest.
    assert checkpoints_in(tmp_path / "output") == ["checkpoint-10", "checkpoint-11", "checkpoint-9"]


def test_rotation_leaves_other_things_alone(tmp_path: Path) -> None:
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-x", "my-checkpoint-1", "checkpoint-1-old"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-0").write_text("a file")
    removed = rotate(published(tmp_path), 1)
    assert [path.name for path in removed] == ["checkpoint-1", "checkpoint-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-0",
        "checkpoint-1-old",
        "checkpoint-3",
        "checkpoint-x",
        "my-checkpoint-1",
    ]


def test_rotation_keeps_what_it_is_told_to(tmp_path: Path) -> None:
    for step in range(1, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate(published(tmp_path), 2, keep=[tmp_path / "checkpoint-2", tmp_path / "checkpoint-5"])
    assert checkpoints_in(tmp_path) == ["checkpoint-2", "checkpoint-5"]


def test_a_resumed_run_rotates_on(make_fit: MakeFit, tmp_path: Path) -> None:
    options = {**SAVING, "save_steps": 1, "max_steps": 6, "save_total_limit": 2}
    make_fit(Dropping(), regression_rows(22), callbacks=[StopAt(3)], **options).train()
    assert checkpoints_in(tmp_path / "output") == ["checkpoint-2", "checkpoint-3"]
    make_fit(Dropping(), regression_rows(22), **options).train(resume_from_checkpoint=True)
    assert checkpoints_in(tmp_path / "output") == ["checkpoint-5", "checkpoint-6"]


def test_what_a_killed_save_left_is_removed_by_the_next(make_fit: MakeFit, run_dir: Path) -> None:
    left = run_dir / "checkpoint-6.partial" / "model"
    left.mkdir(parents=True)
    (left / "shard-00001-model-00009-of-00009.safetensors").write_bytes(b"half")
    fit = make_fit(Dropping(), regression_rows(22), **{**SAVING, "max_steps": 6})
    fit.train(resume_from_checkpoint=True)
    assert checkpoints_in(run_dir) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    manifest = json.loads((run_dir / "checkpoint-6" / "manifest.json").read_text())
    assert sorted([*manifest["files"], "manifest.json", HISTORY]) == files_in(run_dir / "checkpoint-6")


# A save that fails.


def test_a_state_that_json_cant_hold_is_named_when_training_begins(make_fit: MakeFit, tmp_path: Path) -> None:
    class Stateful(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"where": Path("/")}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError("it was never saved")

    with pytest.raises(TypeError, match=r"Stateful-0 can't be saved in a checkpoint: where is a PosixPath"):
        make_fit(Dropping(), regression_rows(22), callbacks=[Stateful()], **SAVING).train()
    assert not (tmp_path / "output").exists() or checkpoints_in(tmp_path / "output") == []


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_fails_the_run_and_leaves_nothing_half_written(
    make_fit: MakeFit, tmp_path: Path, in_background: bool
) -> None:
    class Fill(Callback):
        """After the first checkpoint no file may grow beyond 2000 bytes, which the random state's text exceeds."""

        def on_save(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            if in_background:
                context["fit"].saver.finish()
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, unlimited[1]))

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = {**SAVING, "max_steps": 10, "async_save": in_background}
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            make_fit(Dropping(), regression_rows(22), callbacks=[Fill()], **options).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert checkpoints_in(tmp_path / "output") == ["checkpoint-2"]
    resumed = make_fit(Dropping(), regression_rows(22), **SAVING)
    assert resumed.train(resume_from_checkpoint=True).global_step == 4


# Export.


def test_export_gives_plain_whole_weights(make_fit: MakeFit, tmp_path: Path) -> None:
    module = Assorted(3)
    fit = make_fit(module, regression_rows(4), max_steps=2)
    fit.train()
    path = fit.export(tmp_path / "deep" / "model.safetensors")
    torch.testing.assert_close(load_file(path), parameters_of(module), rtol=0, atol=0)


def test_export_of_tied_weights_holds_them_once_and_loads(make_fit: MakeFit, tmp_path: Path) -> None:
    module = Dropping()
    fit = make_fit(module, regression_rows(22), max_steps=2)
    fit.train()
    weights = load_file(fit.export(tmp_path / "model.safetensors"))
    expected = parameters_of(module)
    del expected["third.weight"]
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    fresh = Dropping()
    missing = fresh.load_state_dict(weights, strict=False)
    assert missing.missing_keys == ["third.weight"]
    module.eval()
    fresh.eval()
    x = torch.randn(5, 3)
    assert torch.equal(fresh(x), module(x))


def test_export_needs_no_training(make_fit: MakeFit, tmp_path: Path) -> None:
    module = Regressor()
    path = make_fit(module).export(tmp_path / "model.safetensors")
    torch.testing.assert_close(load_file(path), parameters_of(module), rtol=0, atol=0)


def test_a_wrapped_models_names_are_its_own(make_fit: MakeFit, tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 1)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            outputs = self.net(x)
            return {"loss": nn.functional.mse_loss(outputs, y), "logits": outputs}

    fit = make_fit(TrainModule.wrap(Plain()), regression_rows(4), max_steps=1, save_strategy="steps")
    fit.train()
    assert set(load_file(fit.export(tmp_path / "model.safetensors"))) == {"net.weight", "net.bias"}
    assert set(tensors_in(tmp_path / "output" / "checkpoint-1" / "model")) == {"net.weight", "net.bias"}


def test_a_checkpoint_can_be_moved(make_fit: MakeFit, run_dir: Path, tmp_path: Path) -> None:
    shutil.move(run_dir / "checkpoint-4", tmp_path / "kept")
    fit: Fit = make_fit(Dropping(), regression_rows(22), **{**SAVING, "max_steps": 5, "save_strategy": "no"})
    assert fit.train(resume_from_checkpoint=tmp_path / "kept").global_step == 5
