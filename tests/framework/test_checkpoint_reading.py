"""Nothing in a checkpoint reaches a run unchecked: what can't be is refused by name, and nothing is changed then."""

import json
import shutil
from pathlib import Path
from typing import Any

import forging
import pytest
import torch
from forging import change_state, change_tensors, resume, save, seal, shard
from safetensors.torch import save_file
from stratagem import Callback, FitArguments, TrainModule
from stratagem.framework.checkpoint import CheckpointError
from tiny import Dropping, MakeFit, NumberStream, Regressor, parameters_of, regression_rows
from torch import Tensor, nn


@pytest.fixture
def checkpoint(make_fit: MakeFit) -> Path:
    return save(make_fit)


def refused(make_fit: MakeFit, checkpoint: Path, match: str, **arguments: Any) -> None:
    """Refused with that text, and the module is what it was."""
    module = Dropping()
    before = parameters_of(module)
    fit = make_fit(module, regression_rows(22), **{**forging.RUN, "max_steps": 9, "save_strategy": "no", **arguments})
    with pytest.raises(CheckpointError, match=match) as caught:
        fit.train(resume_from_checkpoint=checkpoint)
    assert str(checkpoint) in str(caught.value)
    forging.assert_equal(parameters_of(module), before)
    assert not fit.optimizer.state if fit.placed else True


# Shapes, dtypes and counters of the optimizer's state.


class Wide(Regressor):
    """A matrix large enough that a kernel which reads beyond a row of it would crash."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 4096)
        self.head = nn.Linear(4096, 1)

    def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=args.learning_rate, fused=True)


def test_a_moment_of_another_shape_never_reaches_a_fused_kernel(make_fit: MakeFit) -> None:
    arguments = {**forging.RUN, "max_steps": 1, "save_steps": 1}
    fit = make_fit(Wide(), regression_rows(4, 64), **arguments)
    fit.train()
    path = Path(fit.args.output_dir) / "checkpoint-1"

    def forge(tensors: dict[str, Tensor]) -> None:
        tensors["hidden.weight/exp_avg"] = tensors["hidden.weight/exp_avg"][:1].clone()

    change_tensors(path, forge)
    with pytest.raises(CheckpointError, match=r"hidden\.weight/exp_avg .*\(1, 64\).*\(4096, 64\)"):
        make_fit(Wide(), regression_rows(4, 64), **{**arguments, "max_steps": 2}).train(resume_from_checkpoint=path)


FORGED_ENTRIES = {
    "transposed": ("first.weight/exp_avg", lambda t: t.T.contiguous(), r"\(3, 8\).*\(8, 3\)"),
    "larger": ("first.weight/exp_avg_sq", lambda t: torch.cat([t, t]), r"\(16, 3\).*\(8, 3\)"),
    "flat": ("first.weight/exp_avg", lambda t: t.flatten(), r"\(24,\).*\(8, 3\)"),
    "0-dim": ("first.weight/exp_avg", lambda t: t.sum(), r"\(\).*\(8, 3\)"),
    "a step of 3": ("first.bias/step", lambda t: torch.ones(3, dtype=torch.int64), r"first\.bias/step .*\(3,\)"),
    "a step of another dtype": ("first.bias/step", lambda t: t.long(), r"first\.bias/step .*int64.*float32"),
    "float64": ("first.weight/exp_avg", lambda t: t.double(), r"float64.*float32"),
    "int32": ("first.weight/exp_avg", lambda t: t.int(), r"int32.*float32"),
    "a step of NaN": ("first.bias/step", lambda t: t * torch.nan, r"first\.bias/step is nan"),
    "a step below 0": ("first.bias/step", lambda t: t - 9, r"first\.bias/step is -6"),
    "half a step": ("first.bias/step", lambda t: t + 0.5, r"first\.bias/step is 3\.5"),
}


@pytest.mark.parametrize("name", FORGED_ENTRIES)
def test_an_entry_of_the_optimizer_that_it_could_not_have_is_refused(
    make_fit: MakeFit, checkpoint: Path, name: str
) -> None:
    key, forge, complaint = FORGED_ENTRIES[name]
    change_tensors(checkpoint, lambda tensors: tensors.update({key: forge(tensors[key])}))
    refused(make_fit, checkpoint, complaint)


def test_an_entry_that_is_missing_or_foreign_is_refused(make_fit: MakeFit, checkpoint: Path) -> None:
    kept = shutil.copytree(checkpoint, checkpoint.with_name("kept"))
    change_tensors(checkpoint, lambda tensors: tensors.pop("first.weight/exp_avg_sq"))
    refused(make_fit, checkpoint, r"lacks first\.weight/exp_avg_sq")
    shutil.rmtree(checkpoint)
    shutil.copytree(kept, checkpoint)
    change_tensors(checkpoint, lambda tensors: tensors.update({"first.weight/row": torch.ones(8)}))
    refused(make_fit, checkpoint, r"first\.weight/row .*has none there")


@pytest.mark.parametrize("optim", ["adafactor", "muon", "adalomo", "adamw_8bit", "schedule_free_adamw", "lion", "sgd"])
def test_a_trial_step_knows_the_state_of_any_optimizer(make_fit: MakeFit, optim: str) -> None:
    """Resumed, it equals the run that went on; and a factor, a scale or a moment that is one row short is refused."""
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    elif optim == "schedule_free_adamw":
        pytest.importorskip("schedulefree")
    elif optim == "lion":
        pytest.importorskip("lion_pytorch")
    momentum = {"optim_args": {"momentum": 0.9}} if optim == "sgd" else {}
    arguments = {"optim": optim, "lr_scheduler_type": "constant", "learning_rate": 0.01, **momentum}
    module = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 1))  # 5120 numbers: enough for 8 bits

    class Model(TrainModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(*module)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
            return nn.functional.mse_loss(outputs, batch["y"])

    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    rows = regression_rows(22, 64)
    given = {**forging.RUN, **arguments}
    longer = make_fit(Model(), rows, **{**given, "max_steps": 5})
    longer.train()
    expected = parameters_of(longer.module)
    module.load_state_dict(before)
    fit = make_fit(Model(), rows, **{**given, "max_steps": 5})
    path = Path(fit.args.output_dir) / f"checkpoint-{forging.SAVED_AT}"
    fit.train(resume_from_checkpoint=path)
    forging.assert_equal(parameters_of(fit.module), expected)

    stored = forging.load_file(shard(path, "optimizer"))
    for key in [key for key, tensor in stored.items() if tensor.ndim and "net.0.weight" in key]:
        kept = shutil.copytree(path, path.with_name("kept"))
        change_tensors(path, lambda tensors, key=key: tensors.update({key: tensors[key][:-1].clone()}))
        with pytest.raises(CheckpointError, match=key):
            make_fit(Model(), rows, **{**given, "max_steps": 5}).train(resume_from_checkpoint=path)
        shutil.rmtree(path)
        kept.rename(path)


# Files.


def test_a_file_that_is_not_listed_is_refused_by_name(make_fit: MakeFit, checkpoint: Path) -> None:
    for name in ("model/shard-00002-model-00001-of-00001.safetensors", "random-00001.json", "optimizer/notes.txt"):
        (checkpoint / name).write_bytes(b"another checkpoint's")
        refused(make_fit, checkpoint, name)
        (checkpoint / name).unlink()
    (checkpoint / ".DS_Store").write_bytes(b"a system's")
    resume(make_fit, checkpoint)


def test_a_manifest_must_list_what_a_checkpoint_has(make_fit: MakeFit, checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in manifest["files"].keys() - {"tensors.json"}:  # without it the headers themselves are read
        kept = (checkpoint / name).read_bytes()
        (checkpoint / name).unlink()
        seal(checkpoint)
        refused(make_fit, checkpoint, "lacks " + ("the shards of" if "/" in name else name))
        (checkpoint / name).write_bytes(kept)
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "files": {}}))
    refused(make_fit, checkpoint, "holds files that its manifest.json doesn't list")
    entry = manifest["files"]["state.json"]
    for name in ("../state.json", "/etc/passwd", "model/../state.json"):
        (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "files": {name: entry}}))
        refused(make_fit, checkpoint, "inside of the checkpoint")


def test_pieces_of_a_tensor_that_leave_a_hole_or_overlap_are_refused(make_fit: MakeFit, checkpoint: Path) -> None:
    file = shard(checkpoint, "model")
    tensors = forging.load_file(file)
    name = "first.weight"
    offsets = {key: {"saved_offsets": [0] * tensor.ndim} for key, tensor in tensors.items()}
    second = file.with_name("shard-00002-model-00001-of-00001.safetensors")
    for begin, rows, complaint in ((5, 3, "pieces are missing"), (3, 5, "holds a part of first.weight")):
        first = {**tensors, name: tensors[name][:4].clone()}
        save_file(first, file, {"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets)})
        save_file(
            {name: tensors[name][8 - rows :].clone()},
            second,
            {"format": "pt", "DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": [begin, 0]}})},
        )
        seal(checkpoint)
        refused(make_fit, checkpoint, complaint)


# state.json.


def at(state: dict[str, Any], *path: Any) -> Any:
    for key in path:
        state = state[key]
    return state


FORGED_FIELDS: list[tuple[tuple[Any, ...], Any, str]] = [
    (("progress", "global_step"), "3", r"progress\.global_step is \"3\""),
    (("progress", "global_step"), -1, r"progress\.global_step is -1"),
    (("progress", "global_step"), 2, r"scheduler\.last_epoch is 3"),
    (("scheduler", "last_epoch"), 10**18, r"scheduler\.last_epoch is 1000000000000000000"),
    (("scheduler", "base_lrs"), [], r"scheduler\.base_lrs has 0 values"),
    (("world_size",), -(10**9), r"world_size is -1000000000"),
    (("data_size",), 3, r"data_size is 3: it doesn't divide world_size"),
    (("parameter_groups", 0, "options", "betas"), [-1.0, 0.9], r"parameter_groups\[0\]\.options.*[Ii]nvalid beta"),
    (("parameter_groups", 0, "options", "lr"), float("nan"), r"parameter_groups\[0\]\.options\.lr is nan"),
    (("parameter_groups", 0, "options", "amsgrad"), "no", r"options\.amsgrad is 'no'"),
    (("data", "position"), 2000, "stands at 2000, and there are 22"),
    (("averages", "sums"), {"loss": ["a"]}, r"averages\.sums"),
    (("log_history", "bytes"), -1, r"log_history\.bytes is -1"),
    (("loss_scaling",), None, r"loss_scaling is null"),
]


@pytest.mark.parametrize(("path", "value", "complaint"), FORGED_FIELDS, ids=str)
def test_a_forged_field_is_named(
    make_fit: MakeFit, checkpoint: Path, path: tuple[Any, ...], value: Any, complaint: str
) -> None:
    change_state(checkpoint, lambda state: at(state, *path[:-1]).__setitem__(path[-1], value))
    refused(make_fit, checkpoint, complaint)


def test_a_removed_field_is_named(make_fit: MakeFit, checkpoint: Path) -> None:
    for section, field in (("progress", "global_step"), ("data", "position"), ("scheduler", "last_epoch")):
        kept = (checkpoint / "state.json").read_text()
        change_state(checkpoint, lambda state, s=section, f=field: state[s].pop(f))
        refused(make_fit, checkpoint, field)
        (checkpoint / "state.json").write_text(kept)
        seal(checkpoint)


def test_an_optimizer_folder_that_is_gone_is_no_fresh_optimizer(make_fit: MakeFit, checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "optimizer")
    change_state(checkpoint, lambda state: state.update(optimizer={}))
    refused(make_fit, checkpoint, "holds no state of the optimizer, which has made 3 updates")


def test_weights_of_another_kind_of_numbers_are_refused(make_fit: MakeFit, checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda t: t.update({"head.weight": t["head.weight"].int()}), "model")
    refused(make_fit, checkpoint, r"of another kind of numbers: head\.weight torch\.float32 \(checkpoint: torch\.int32")


def test_a_random_state_that_is_none_is_refused(make_fit: MakeFit, checkpoint: Path) -> None:
    file = checkpoint / "random-00000.json"
    kept = json.loads(file.read_text())
    numpy_position = [*kept["numpy"][:2], 10**6, *kept["numpy"][3:]]
    for change in ({"numpy": numpy_position}, {"torch": "AAAA"}, {"python": [3, [1, 2], None]}, {"torch": None}):
        file.write_text(json.dumps({**kept, **change}))
        seal(checkpoint)
        refused(make_fit, checkpoint, r"random-00000\.json was altered: " + next(iter(change)))


# What differs between the run and the checkpoint.


def test_arguments_that_a_resume_does_not_take_are_said(
    make_fit: MakeFit, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = resume(make_fit, checkpoint, learning_rate=0.5, adam_beta1=0.7)
    said = capsys.readouterr().err
    assert "learning_rate is 0.5 here, 0.1 in the checkpoint; adam_beta1 is 0.7 here, 0.9 in the checkpoint" in said
    assert "The checkpoint's count; resume_with='arguments'" in said
    assert fit.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert fit.optimizer.param_groups[0]["initial_lr"] == 0.1


def test_the_arguments_count_where_they_are_asked_to(make_fit: MakeFit, checkpoint: Path) -> None:
    rates = []

    class Rates(Callback):
        def on_pre_optimizer_step(self, *_: Any, fit: Any, **__: Any) -> None:
            rates.append((fit.optimizer.param_groups[0]["lr"], fit.optimizer.param_groups[0]["betas"]))

    arguments = {"learning_rate": 0.5, "adam_beta1": 0.7, "resume_with": "arguments", "max_steps": 5}
    fit = resume(make_fit, checkpoint, callbacks=[Rates()], **arguments)
    # Linear to 0 at update 5: update 4 is made at 2/5 of the peak, update 5 at 1/5.
    assert rates == [(pytest.approx(0.2), (0.7, 0.999)), (pytest.approx(0.1), (0.7, 0.999))]
    assert fit.optimizer.state[fit.module.head.weight]["step"].item() == 5  # the moments went on


def test_the_same_arguments_say_nothing(
    make_fit: MakeFit, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume(make_fit, checkpoint)
    assert capsys.readouterr().err == ""


def test_another_optimizer_of_the_same_options_is_refused(make_fit: MakeFit, checkpoint: Path) -> None:
    refused(make_fit, checkpoint, r"optim='adamw'; this run has optim='adam'", optim="adam")


OTHER_ORDERS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "data_seed": {"data_seed": 1},
    "shuffle": {"shuffle": False},
}


@pytest.mark.parametrize("name", OTHER_ORDERS)
def test_another_order_of_samples_in_mid_epoch_is_refused(
    make_fit: MakeFit, checkpoint: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(make_fit, checkpoint, r"another order of samples.*ignore_data_skip=True", **OTHER_ORDERS[name])
    resume(make_fit, checkpoint, **OTHER_ORDERS[name], ignore_data_skip=True)
    assert "another order of samples" in capsys.readouterr().err


def test_another_dataset_in_mid_epoch_is_refused(make_fit: MakeFit, checkpoint: Path) -> None:
    given = {**forging.RUN, "max_steps": 4, "save_strategy": "no"}
    other = regression_rows(22)
    other[21] = {**other[21], "x": other[21]["x"] + 1}
    for rows, complaint in ((regression_rows(30), "another number of samples.*30 here, 22"), (other, "last sample")):
        with pytest.raises(CheckpointError, match=complaint):
            make_fit(Dropping(), rows, **given).train(resume_from_checkpoint=checkpoint)
        fit = make_fit(Dropping(), rows, **given, ignore_data_skip=True)
        assert fit.train(resume_from_checkpoint=checkpoint).global_step == 4


def test_other_workers_of_an_iterable_in_mid_epoch_are_refused(make_fit: MakeFit, tmp_path: Path) -> None:
    class Counting(Regressor):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

        def loss(self, outputs: Tensor, batch: Any) -> Any:
            return outputs.square().mean()

    rows = [row["x"] for row in regression_rows(20)]

    class Rows(NumberStream):
        def __iter__(self) -> Any:
            return (rows[number] for number in super().__iter__())

    given = {"per_device_train_batch_size": 2, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make_fit(Counting(), Rows(20), **given, dataloader_num_workers=2).train()
    with pytest.raises(CheckpointError, match=r"another number of workers.*0 here, 2 in the checkpoint"):
        make_fit(Counting(), Rows(20), **{**given, "max_steps": 3}).train(resume_from_checkpoint=True)
    fit = make_fit(Counting(), Rows(20), **{**given, "max_steps": 3}, ignore_data_skip=True)
    assert fit.train(resume_from_checkpoint=True).global_step == 3


# Callbacks.


class Average(Callback):
    """A moving average of the weights, its updates, and a note."""

    def __init__(self) -> None:
        self.shadow: dict[str, Tensor] = {}
        self.history: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, fit: Any, **context: Any) -> None:
        for name, parameter in fit.module.named_parameters():
            mine = self.shadow.setdefault(name, parameter.detach().double().clone())
            mine.lerp_(parameter.detach().double(), 0.5)
        self.history.append([torch.tensor(state.global_step), "seen"])

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow, self.history = state["shadow"], state["history"]


def test_tensors_of_a_callback_come_back(make_fit: MakeFit) -> None:
    uninterrupted, resumed = Average(), Average()
    fit = make_fit(Dropping(), regression_rows(22), **{**forging.RUN, "max_steps": 5}, callbacks=[uninterrupted])
    fit.train()
    path = Path(fit.args.output_dir) / f"checkpoint-{forging.SAVED_AT}"
    resume(make_fit, path, callbacks=[resumed], max_steps=5)
    forging.assert_equal(resumed.shadow, uninterrupted.shadow)
    assert resumed.shadow["head.weight"].dtype == torch.float64
    assert resumed.history == uninterrupted.history
    stored = forging.load_file(shard(path, "callbacks"))
    assert stored["Average-0/shadow/head.weight"].shape == (1, 8)
    assert stored["Average-0/history/2/0"].item() == 3


def test_a_callback_on_one_side_only_is_said(make_fit: MakeFit, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(make_fit, callbacks=[Average()])
    resume(make_fit, path)
    assert "holds the state of Average-0, and this run has no such callback" in capsys.readouterr().err
    plain = save(make_fit)
    resume(make_fit, plain, callbacks=[Average()])
    assert "holds no state of Average-0, which begins anew" in capsys.readouterr().err


class Unsavable(Callback):
    def __init__(self, held: Any) -> None:
        self.held = held

    def state_dict(self) -> dict[str, Any]:
        return {"notes": [1, self.held]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("held", [{1, 2}, object(), {3: "three"}, b"bytes"], ids=lambda held: type(held).__name__)
def test_a_state_that_cant_be_saved_is_refused_when_training_begins(make_fit: MakeFit, held: Any) -> None:
    fit = make_fit(Dropping(), regression_rows(22), max_steps=1, callbacks=[Unsavable(held)])
    with pytest.raises(TypeError, match=r"state_dict\(\) of Unsavable-0 can't be saved in a checkpoint: notes/1 is a"):
        fit.train()
    assert fit.state.global_step == 0


def test_a_callback_that_cant_take_its_state_back_changes_nothing(make_fit: MakeFit) -> None:
    class Picky(Unsavable):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("colour")

    path = save(make_fit, callbacks=[Picky(2)])
    refused(make_fit, path, r"callbacks\.Picky-0 can't be loaded: KeyError: 'colour'", callbacks=[Picky(2)])
