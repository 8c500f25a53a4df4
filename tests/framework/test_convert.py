"""``stratagem convert``: weights from and to every format, told apart by content, whole or not at all."""

import argparse
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from stratagem import convert
from stratagem.framework.command_line import main
from stratagem.framework.weights.opening import open_weights
from tiny import Dropping, MakeFit, parameters_of, regression_rows
from torch import Tensor, nn

State = dict[str, Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state() -> State:
    """A tied weight, an empty tensor, one number, and dtypes that few formats name alike."""
    tied = torch.randn(4, 5)
    return {
        "model.a.weight": tied,
        "model.b.weight": tied,
        "model.steps": torch.tensor(7),
        "model.none": torch.zeros(0, 3),
        "model.half": torch.randn(3).bfloat16(),
        "model.mask": torch.tensor([True, False]),
        "model.eight": torch.ones(3).to(torch.float8_e4m3fn),
        "model.row": torch.randn(6, 4)[:, 1],  # with strides
    }


def as_torch(tensors: State, path: Path) -> Path:
    torch.save(tensors, path / "weights.pt")
    return path / "weights.pt"


def as_nested(tensors: State, path: Path) -> Path:
    torch.save({"epoch": 3, "model": tensors, "optimizer": {"state": {}}}, path / "weights.pt")
    return path / "weights.pt"


def as_old_torch(tensors: State, path: Path) -> Path:
    torch.save(tensors, path / "weights.pt", _use_new_zipfile_serialization=False)
    return path / "weights.pt"


def as_lightning(tensors: State, path: Path) -> Path:
    """What Lightning 2.6's Trainer.save_checkpoint writes of a module with plain hyperparameters."""
    content = {
        "epoch": 3,
        "global_step": 120,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": tensors,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "x.ckpt", "best_k_models": {}}},
        "optimizer_states": [
            {"state": {0: {"exp_avg": torch.zeros(4, 5)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
        ],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"width": 32, "rate": 0.1},
    }
    torch.save(content, path / "epoch=3.ckpt")
    return path / "epoch=3.ckpt"


def as_dcp(tensors: State, path: Path) -> Path:
    dcp.save(
        {"model": tensors, "optim": {"lr": 0.1, "exp_avg": torch.ones(3)}}, checkpoint_id=path / "dcp", no_dist=True
    )
    return path / "dcp"


def as_torchtitan(tensors: State, path: Path) -> Path:
    """The model's names at the top, and the optimizer in an entry."""
    dcp.save({**tensors, "optimizer": {"state.x.exp_avg": torch.ones(3)}}, checkpoint_id=path / "titan", no_dist=True)
    return path / "titan"


def as_bin(tensors: State, path: Path) -> Path:
    """A directory of transformers' before safetensors, in two files."""
    directory = path / "old"
    directory.mkdir()
    names = list(tensors)
    files = {name: f"pytorch_model-0000{1 + (name in names[2:])}-of-00002.bin" for name in names}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in names if files[name] == file}, directory / file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    return directory


WRITERS: list[Callable[[State, Path], Path]] = [
    as_torch, as_nested, as_old_torch, as_lightning, as_dcp, as_torchtitan, as_bin,
]  # fmt: skip
sources = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert found[name].reshape(-1).tolist() == tensor.reshape(-1).tolist(), name


@sources
@pytest.mark.parametrize("to", ["torch", "dcp", "safetensors"])
def test_all_formats_become_all_others(tmp_path: Path, write: Callable[[State, Path], Path], to: str) -> None:
    expected, target = state(), tmp_path / "target"
    if write is as_old_torch:
        del expected["model.eight"]  # torch itself reads no such dtype there
    source = write(expected, tmp_path)
    convert(source, target, to)
    if to == "torch":
        found = torch.load(target, weights_only=True)
        mapped = torch.load(target, weights_only=True, mmap=True)
        assert_same(mapped, expected)
    elif to == "dcp":
        found = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
        dcp.load(found, checkpoint_id=target, no_dist=True)
    else:
        found = load_file(target)
        with safe_open(target, "pt") as file:
            metadata = file.metadata()
        assert metadata.pop("format") == "pt"
        found |= {name: found[first] for name, first in metadata.items()}
    assert_same(found, expected)
    convert(target, tmp_path / "again.pt")  # what was written is read, too
    assert_same(torch.load(tmp_path / "again.pt", weights_only=True), expected)


def test_names_of_one_tensor_stay_names_of_one_tensor(tmp_path: Path) -> None:
    source = as_torch(state(), tmp_path)
    assert convert(source, tmp_path / "a.safetensors").tensors == len(state()) - 1
    convert(tmp_path / "a.safetensors", tmp_path / "a.pt")
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert found["model.a.weight"].data_ptr() == found["model.b.weight"].data_ptr()
    assert (tmp_path / "a.pt").stat().st_size < source.stat().st_size  # and 24 numbers behind the strided 6

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4, bias=False), nn.Linear(5, 4, bias=False)
            self.b.weight = self.a.weight

    convert(source, tmp_path / "b.safetensors", rename=["model.*=*"], leave_out=["model.steps"])
    tied = Tied()
    missing, _ = load_model(tied, tmp_path / "b.safetensors", strict=False)  # as safetensors loads tied weights
    assert missing == set() and torch.equal(tied.a.weight, state_of(source)["model.a.weight"])


def state_of(path: Path) -> State:
    found: State = torch.load(path, weights_only=True)
    return found


def test_a_checkpoint_of_a_run_gives_its_weights(make_fit: MakeFit, tmp_path: Path) -> None:
    module = Dropping()
    fit = make_fit(module, regression_rows(16), max_steps=3, save_strategy="steps", save_steps=3)
    fit.train()
    done = convert(tmp_path / "output" / "checkpoint-3", tmp_path / "weights.pt")
    assert (done.source_format, done.format) == ("checkpoint", "torch")
    other = Dropping()
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))  # strict, tied names included
    assert_same(parameters_of(other), parameters_of(module))
    with pytest.raises(ValueError, match="holds checkpoints: give one of them"):
        open_weights(tmp_path / "output")
    shard = next((tmp_path / "output" / "checkpoint-3" / "model").iterdir())
    with pytest.raises(ValueError, match="one rank's pieces of a checkpoint"):
        open_weights(shard)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"{shard.name} was altered"):
        convert(tmp_path / "output" / "checkpoint-3", tmp_path / "other.pt")


@pytest.mark.slow
def test_a_transformers_directory(tmp_path: Path) -> None:
    from pretrained_models import tied_llama
    from transformers import AutoModelForCausalLM

    model = tied_llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "README.md").write_text("of the base")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    torch.save(
        {"state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()}}, tmp_path / "t.ckpt"
    )
    rename = ["module.*=*"]
    convert(
        tmp_path / "t.ckpt",
        tmp_path / "new",
        "transformers",
        config=tmp_path / "base",
        rename=rename,
        shard_size="20KB",
    )
    assert len(list((tmp_path / "new").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "new" / "tokenizer.json").exists() and not (tmp_path / "new" / "README.md").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    convert(tmp_path / "new", tmp_path / "half", "transformers", dtype="bfloat16")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.lm_head.weight, model.lm_head.weight.bfloat16())
    with pytest.raises(ValueError, match=r"don't fit the model of config.json: .*module\.model\.embed.*rename"):
        convert(tmp_path / "t.ckpt", tmp_path / "wrong", "transformers", config=tmp_path / "base" / "config.json")
    with pytest.raises(ValueError, match=r"needs the model's config\.json"):
        convert(tmp_path / "t.ckpt", tmp_path / "wrong", "transformers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "half", "new", "t.ckpt"]


def test_renaming_dtype_and_leaving_out(tmp_path: Path) -> None:
    source = as_nested(state(), tmp_path)
    done = convert(
        source, tmp_path / "w.safetensors",
        rename=["model.*=*", "*.weight=layers.*.w"], leave_out=["*.row", "*.a.*", "*.eight"], dtype="float16",
    )  # fmt: skip
    found = load_file(tmp_path / "w.safetensors")
    assert set(found) == {"layers.b.w", "steps", "none", "half", "mask"}
    assert found["layers.b.w"].dtype == found["half"].dtype == torch.float16
    assert (found["steps"].dtype, found["mask"].dtype) == (torch.int64, torch.bool)
    assert {"epoch", "optimizer", "model.row", "model.a.weight"} <= set(done.left_out)
    assert torch.equal(found["layers.b.w"], state_of(source)["model"]["model.a.weight"].half())  # type: ignore[index]


class Evil:
    """A pickle that would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.slow
def test_a_checkpoint_that_lightning_wrote(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Wrapped(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self, width: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = nn.Linear(3, width)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.model(batch[0]).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", **quiet)
    module = Wrapped()
    rows = torch.utils.data.TensorDataset(torch.randn(8, 3))
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    done = convert(tmp_path / "last.ckpt", tmp_path / "w.safetensors", rename=["model.*=*"])
    assert done.source_format == "lightning" and "hyper_parameters" in done.left_out
    assert_same(load_file(tmp_path / "w.safetensors"), dict(module.model.state_dict()))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(2)}
    torch.save({"state_dict": tensors, "hyper_parameters": argparse.Namespace(width=3)}, tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match=r"a.ckpt holds an object of argparse.Namespace.*weights_only=False.*save_hyper"
    ):
        convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    torch.save({"state_dict": tensors, "x": Evil(tmp_path / "evil")}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="nothing is unpickled"):
        convert(tmp_path / "b.pt", tmp_path / "b.safetensors")
    directory = as_dcp(tensors, tmp_path)
    (directory / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "evil")))
    with pytest.raises(ValueError, match=r"\.metadata can't be read: it names .*mkdir"):
        convert(directory, tmp_path / "c.safetensors")
    assert not (tmp_path / "evil").exists() and not list(tmp_path.glob("*.safetensors*"))


def damaged(kind: str, path: Path) -> Path:
    """A source with something wrong about it."""
    if kind == "cut off":
        source = as_torch({"w": torch.ones(5000)}, path)
        source.write_bytes(source.read_bytes()[:-9000])
    elif kind == "dcp cut off":
        source = as_dcp({"w": torch.ones(5000)}, path)
        file = source / "__0_0.distcp"
        file.write_bytes(file.read_bytes()[:-9000])
    elif kind == "dcp without a file":
        source = as_dcp({"w": torch.ones(5)}, path)
        (source / "__0_0.distcp").unlink()
    elif kind == "no tensors":
        source = path / "weights.pt"
        torch.save({"a": 1, "b": {"c": {"w": torch.ones(2)}}}, source)
    elif kind == "script":
        source = path / "weights.pt"
        torch.jit.script(nn.Linear(2, 2)).save(str(source))
    elif kind == "text":
        source = path / "weights.pt"
        source.write_text("these are no weights")
    elif kind == "gguf":
        source = path / "weights.bin"
        source.write_bytes(b"GGUF" + bytes(20))
    elif kind == "sparse":
        source = as_torch({"w": torch.eye(3).to_sparse()}, path)
    elif kind == "bin missing":
        source = as_bin(state(), path)
        (source / "pytorch_model-00002-of-00002.bin").unlink()
    else:
        source = path / "nowhere"
    return source


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut off", r"weights\.pt (can't be read|isn't)"),
        ("dcp cut off", "__0_0.distcp was cut off: .*w ends at"),
        ("dcp without a file", "has no __0_0.distcp"),
        ("no tensors", r"weights.pt has no state_dict.*'a', 'b'.*key="),
        ("script", "a program of TorchScript.*torch.jit.load"),
        ("text", "isn't a file of torch.save, .*these are no wei"),
        ("gguf", "is GGUF"),
        ("sparse", "weights.pt: w is .*sparse"),
        ("bin missing", "has no pytorch_model-00002-of-00002.bin, which pytorch_model.bin.index.json lists"),
        ("absent", "There is no file or directory"),
    ],
)
def test_a_source_that_cant_be_read_is_named(tmp_path: Path, kind: str, message: str) -> None:
    source = damaged(kind, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out.safetensors")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_key_says_where_the_weights_are(tmp_path: Path) -> None:
    torch.save({"ema": {"net": {"w": torch.ones(2)}}, "model": {"w": torch.zeros(2)}}, tmp_path / "w.pt")
    convert(tmp_path / "w.pt", tmp_path / "a.safetensors", key="ema.net")
    convert(tmp_path / "w.pt", tmp_path / "b.safetensors")
    assert (
        load_file(tmp_path / "a.safetensors")["w"].sum() == 2 and load_file(tmp_path / "b.safetensors")["w"].sum() == 0
    )
    with pytest.raises(ValueError, match=r"no 'emma'.*'ema', 'model'"):
        convert(tmp_path / "w.pt", tmp_path / "c.safetensors", key="emma")
    with pytest.raises(ValueError, match="key='ema' has no effect"):
        convert(tmp_path / "a.safetensors", tmp_path / "c.pt", key="ema")
    directory = tmp_path / "dcp"
    dcp.save({"ema": {"w": torch.ones(2)}, "model": {"w": torch.zeros(2)}}, checkpoint_id=directory, no_dist=True)
    convert(directory, tmp_path / "d.safetensors", key="ema")
    assert load_file(tmp_path / "d.safetensors")["w"].sum() == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "checkpoint"}, "a checkpoint holds a run .*fit.load_weights"),
        ({"to": "onnx"}, "to='onnx' is none of safetensors, torch, dcp, transformers"),
        ({"target": "weights"}, "doesn't say the format to write.*--to"),
        ({"dtype": "int8"}, "dtype='int8' is none of"),
        ({"rename": ["model"]}, "rename='model' isn't OLD=NEW"),
        ({"rename": ["net.*=*"]}, r"rename='net.\*=\*' fits no tensor of .*weights.pt, which holds model.a.weight"),
        ({"rename": ["model.*=w"]}, "would all be called w"),
        ({"leave_out": ["x*"]}, "fits no tensor"),
        ({"config": "config.json"}, "config='config.json' has no effect"),
        ({"target": "weights.pt", "force": True}, "would lie in, or replace, what is read"),
        (
            {"dtype": "float16", "source": "large"},
            r"w holds numbers beyond the range of torch.float16 .*as large as 1e\+06",
        ),
    ],
    ids=str,
)
def test_what_cant_be_converted_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source = as_torch(state(), tmp_path)
    if options.pop("source", None):
        torch.save({"a": torch.ones(2), "w": torch.tensor([1.0, 1e6])}, source)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / options.pop("target", "w.safetensors"), **options)
    assert sorted(tmp_path.iterdir()) == before


def test_a_target_is_replaced_by_force_alone_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = as_torch(state(), tmp_path), tmp_path / "w.safetensors"
    target.write_text("precious")
    with pytest.raises(ValueError, match=r"is there already.*--force"):
        convert(source, target)
    broken = tmp_path / "broken.pt"
    torch.save({"a": torch.ones(100), "z": torch.tensor([1e30])}, broken)
    with pytest.raises(ValueError, match=r"^z holds numbers beyond"):  # when a is written already
        convert(broken, target, dtype="float16", force=True)
    assert target.read_text() == "precious"
    convert(source, target, force=True)
    assert "model.half" in load_file(target)
    directory = tmp_path / "directory"
    directory.mkdir()
    (directory / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="a directory of other things"):
        convert(source, directory, "dcp", force=True)
    convert(source, tmp_path / "dcp", "dcp")
    convert(target, tmp_path / "dcp", "dcp", force=True)
    with pytest.raises(ValueError, match="would lie in, or replace"):
        convert(tmp_path / "dcp", tmp_path / "dcp" / "w.pt")
    names = ["broken.pt", "dcp", "directory", "w.safetensors", "weights.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


LARGE = """
import sys, threading, time
from pathlib import Path
from stratagem import convert

def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1024

directory = Path(sys.argv[1])
for kind in ("torch", "dcp", "safetensors"):  # imports, and what a first conversion allocates
    convert(directory / "small.pt", directory / f"small {kind}", kind)
before, most, done = anonymous(), 0.0, threading.Event()

def watch():
    global most
    while not done.wait(0.001):
        most = max(most, anonymous())

thread = threading.Thread(target=watch)
thread.start()
for name, to in (("w.pt", "safetensors"), ("w.safetensors", "torch"), ("w.pt", "dcp"), ("dcp", "torch")):
    most = 0.0
    convert(directory / name, directory / "target", to, force=True) if to != "dcp" else convert(
        directory / name, directory / "target dcp", to
    )
    print(most - before)
done.set()
thread.join()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux has it")
def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """192 MiB in tensors of 16; memory that is a file's own pages isn't counted: the system takes it when it wants."""
    tensors = {f"w{number}": torch.full((1 << 22,), float(number)) for number in range(12)}
    torch.save({"w": torch.ones(3)}, tmp_path / "small.pt")
    torch.save(tensors, tmp_path / "w.pt")
    save_file(tensors, tmp_path / "w.safetensors")
    dcp.save(tensors, checkpoint_id=tmp_path / "dcp", no_dist=True)
    command = [sys.executable, "-W", "ignore", "-c", LARGE, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    most = list(map(float, said.stdout.split()))
    print(most)
    assert max(most[:2]) < 48.0
    assert max(most[2:]) < 64.0  # a DCP file holds files of torch.save, each made in memory


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = as_lightning(state(), tmp_path)
    assert main(["convert", str(source), "--show", "--rename", "model.*=*"]) == 0
    shown = capsys.readouterr().out
    assert "a.weight  float32  [4, 5]\n" in shown and "b.weight  = a.weight\n" in shown
    target = tmp_path / "w.safetensors"
    assert main(["convert", str(source), str(target), "--rename", "model.*=*", "--leave-out", "*.mask"]) == 0
    printed = capsys.readouterr().out
    assert "w.safetensors: 6 tensors," in printed and "(lightning to safetensors)" in printed
    assert "Left out: epoch, global_step" in printed
    assert main(["convert", str(source), str(target)]) == 1
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", str(source)])
    assert "TARGET is missing" in capsys.readouterr().err


def test_any_part_of_pieces_can_be_read(tmp_path: Path) -> None:
    from stratagem.framework.weights.sources import Mapped, Pieces

    whole = torch.arange(6 * 5).view(6, 5)
    boxes = [((0, 0), whole[:4, :2]), ((0, 2), whole[:4, 2:]), ((4, 0), whole[4:])]
    pieces = Pieces("w", (6, 5), whole.dtype, tuple((begin, Mapped("w", box)) for begin, box in boxes))
    bounds = [(b, e) for b in range(7) for e in range(b, 7)]
    for first, last in bounds:
        for left, right in [pair for pair in bounds if pair[1] <= 5]:
            part = slice(first, last), slice(left, right)
            assert torch.equal(pieces.read(part), whole[part])
