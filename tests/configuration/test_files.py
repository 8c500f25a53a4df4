"""Configuration files: what is read from them, what is wrong in them, and the one that a run leaves of itself."""

import dataclasses
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from stratagem import Callback, Fit, FitArguments
from stratagem.framework.configuration.configuration import Configuration
from stratagem.framework.configuration.entries import ConfigurationError, read_entries
from stratagem.framework.configuration.writing import text_of
from stratagem.precision import FP16Mixed
from stratagem.strategies import FSDP2
from tiny import MakeFit, Regressor, parameters_of, regression_rows
from torch import Tensor

PROGRAM = Path(__file__).with_name("program.py")
ROWS = regression_rows(24)


def written(tmp_path: Path, text: str, name: str = "run.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two modules' tensors are the same to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def problems_of(path: Path, **given: Any) -> list[str]:
    """What is wrong with a file, without its folder."""
    with pytest.raises(ConfigurationError) as caught:
        Fit.from_config(path, Regressor(), ROWS, **given)
    return [problem.replace(f"{path.parent}/", "") for problem in caught.value.problems]


# What is read.

YAML = """
learning_rate: 3e-4   # a number, also so

optim_args: {momentum: 0.9}
strategy:
  name: fsdp2
  replicas: 2
precision: bf16-mixed
max_steps: 5
"""
TOML = """
# a comment = 1
learning_rate = 3e-4
precision = "bf16-mixed"
optim_args.momentum = 0.9
max_steps = 5

[strategy]
name = "fsdp2"
replicas = 2
"""
JSON = '{"learning_rate": 3e-4, "optim_args": {"momentum": 0.9}, "strategy": {"name": "fsdp2", "replicas": 2}}'
CLASS_PATHS = """
strategy:
  class_path: stratagem.strategies.FSDP2
  init_args:
    replicas: 2
"""


def test_yaml_and_toml_are_read_with_lines(tmp_path: Path) -> None:
    found = {entry.key: (entry.value, entry.line) for entry in read_entries(written(tmp_path, YAML))}
    assert found == {
        "learning_rate": (0.0003, 2),
        "optim_args": ({"momentum": 0.9}, 4),
        "strategy": ("fsdp2", 6),
        "strategy.replicas": (2, 7),
        "precision": ("bf16-mixed", 8),
        "max_steps": (5, 9),
    }
    toml = {entry.key: (entry.value, entry.line) for entry in read_entries(written(tmp_path, TOML, "run.toml"))}
    assert {key: value for key, (value, _) in toml.items()} == {key: value for key, (value, _) in found.items()}
    assert {key: line for key, (_, line) in toml.items() if key != "optim_args"} == {
        "learning_rate": 3,
        "precision": 4,
        "max_steps": 6,
        "strategy": 9,
        "strategy.replicas": 10,
    }


@pytest.mark.parametrize("text", [JSON, CLASS_PATHS])
def test_json_and_class_paths_are_read(tmp_path: Path, text: str) -> None:
    arguments = Configuration.read(written(tmp_path, text)).fit_arguments({"module": Regressor()})
    assert type(arguments["strategy"]) is FSDP2 and arguments["strategy"].options.replicas == 2


def test_a_later_file_overrides_an_earlier_one_and_arguments_both(tmp_path: Path) -> None:
    first, second = written(tmp_path, YAML), written(tmp_path, "max_steps: 7\nseed: 3\n", "second.yaml")
    run = Configuration.read(first, second)
    args = run.fit_arguments({"module": Regressor(), "seed": 4, "strategy": "single"})
    assert (args["args"].max_steps, args["args"].learning_rate, args["args"].seed) == (7, 0.0003, 4)
    assert args["strategy"].name == "single"  # and what belonged to the other one is gone


def test_fields_of_a_class_of_ones_own_are_read(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine(FitArguments):
        beta: float = 0.5

    path = written(tmp_path, f"beta: 0.25\noutput_dir: {tmp_path}\nloggers: []\nsave_strategy: 'no'\n")
    fit = Fit.from_config(path, Regressor(), ROWS, args=Mine(), progress=False)
    assert isinstance(fit.args, Mine) and fit.args.beta == 0.25
    assert "no argument 'beta'" in problems_of(path)[0]


# What is wrong.

WRONG = """learning_rat: 1
lr: 3e-4
eval_strategy: sometimes
strategy:
  name: ddp
  static_grap: true
bf16: true
per_device_train_batch_size: 0
accelerator: gpu
build:
  width: 3
save_steps: 10
"""


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_all_that_is_wrong_is_said_together_with_lines(tmp_path: Path, suffix: str) -> None:
    lines = ["learning_rat = 1", 'eval_strategy = "sometimes"', "lr = 3e-4", "[strategy]", 'name = "ddp"', "x = 1"]
    text = WRONG if suffix == "yaml" else "\n".join(lines)
    found = problems_of(written(tmp_path, text, f"run.{suffix}"))
    if suffix == "toml":
        assert [line.partition(":")[0] for line in found] == [f"run.toml, line {n}" for n in (1, 3, 6, 2)]
        return
    assert found == [
        "run.yaml, line 1: Fit has no argument 'learning_rat'. Did you mean 'learning_rate'?",
        "run.yaml, line 2: Fit has no argument 'lr'. Write learning_rate.",
        "run.yaml, line 6: strategy='ddp' has no argument 'static_grap'. Did you mean 'static_graph'? Known: "
        "bucket_cap_mb, compress_gradients, find_unused_parameters, gradient_as_bucket_view, static_graph, "
        "sync_batchnorm, timeout.",
        "run.yaml, line 7: Fit has no argument 'bf16'. Write precision='bf16-mixed', '16-mixed', 'bf16-true', ...: "
        "how numbers are kept is one word of Fit's.",
        "run.yaml, line 9: Fit has no argument 'accelerator'. The accelerator that is there is used, else the CPU: "
        "leave it out.",
        "run.yaml, line 11: 'build.width' is an option of a function that nothing names. Write target: train.py:build.",
        "run.yaml, line 8: per_device_train_batch_size=0: must be at least 1",
        "run.yaml, line 3: eval_strategy='sometimes': must be one of 'no', 'steps', 'epoch'",
    ]


def test_a_word_that_isnt_there_hides_no_other_mistake(tmp_path: Path) -> None:
    text = "max_stepz: 5\nlearning_rate: fast\nstrategy: ddq\nprecision: bf17\n"
    found = problems_of(written(tmp_path, text))
    assert [line.partition(".")[0] for line in (each.partition("run.yaml, ")[2] for each in found)] == [
        "line 3: Unknown strategy 'ddq'",
        "line 4: Unknown precision 'bf17'",
        "line 1: Fit has no argument 'max_stepz'",
        "line 2: learning_rate='fast': must be float, not str",
    ]


def test_what_contradicts_itself_is_said_with_the_line_of_each(tmp_path: Path) -> None:
    text = "seed: 1\ntorch_compile_mode: max-autotune\ndataloader_prefetch_factor: 2\nload_best_model_at_end: true\n"
    found = problems_of(written(tmp_path, text))
    assert {problem.partition(":")[0] for problem in found} == {f"run.yaml, line {n}" for n in (2, 3, 4)}
    assert problems_of(written(tmp_path, "warmup_steps: -1\n"), max_grad_norm=-1.0) == [
        "run.yaml, line 1: warmup_steps=-1: must not be negative",
        "max_grad_norm=-1.0: must not be negative",
    ]


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("seed: 1\nseed: 2\n", "run.yaml", "run.yaml, line 2: 'seed' stands on line 1 already."),
        ("a:\n - [1\n", "run.yaml", "run.yaml, line 3: is no YAML"),
        ("- 1\n", "run.yaml", "run.yaml, line 1: holds [1], not names with values."),
        ("seed = \n", "run.toml", "run.toml: is no TOML: Invalid value (at line 1, column 8)"),
        ("strategy: ddq\n", "run.yaml", "run.yaml, line 1: Unknown strategy 'ddq'. Did you mean 'ddp'?"),
        ("precision: no.such.Class\n", "run.yaml", "run.yaml, line 1: 'no.such.Class' can't be imported"),
        ("strategy: pathlib.Path\n", "run.yaml", "run.yaml, line 1: pathlib.Path is no class of a Strategy."),
        ("target: nowhere.py:build\n", "run.yaml", "run.yaml, line 1: There is no file"),
        ("!!python/object/apply:os.system ['true']\n", "run.yaml", "run.yaml, line 1: is no YAML"),
    ],
)
def test_a_file_that_cant_be_read_is_said_with_the_line(tmp_path: Path, text: str, name: str, expected: str) -> None:
    assert problems_of(written(tmp_path, text, name))[0].startswith(expected)


def test_a_file_that_isnt_there(tmp_path: Path) -> None:
    assert problems_of(tmp_path / "absent.yaml")[0].startswith("absent.yaml can't be read: ")


@settings(deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_read_or_refused(text: str) -> None:
    for name in ("any.yaml", "any.toml"):
        path = Path(tempfile.gettempdir()) / f"{os.getpid()}-{name}"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            entries = read_entries(path)
        except ConfigurationError as error:
            assert error.problems and str(path) in error.problems[0]
        else:
            lines = text.count("\n") + text.count("\r") + 5
            assert all(0 <= entry.line <= lines + text.count("\x85") for entry in entries)
        finally:
            path.unlink()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(VALUES)
def test_what_is_written_is_read_again(value: Any) -> None:
    path = Path(tempfile.gettempdir()) / f"{os.getpid()}-written.yaml"
    try:
        path.write_text(text_of({"optim_args": value}), encoding="utf-8")
        [entry] = read_entries(path)
    finally:
        path.unlink()
    assert entry.value == value and type(entry.value) is type(value)


def test_numbers_are_numbers_to_every_yaml_reader(tmp_path: Path) -> None:
    numbers = {"learning_rate": 1e-08, "weight_decay": 1e20, "adam_epsilon": math.inf, "seed": 3, "eval_delay": 2.5e-7}
    assert yaml.safe_load(text_of(numbers)) == numbers


# A run's own file.


def test_a_run_leaves_a_file_that_repeats_it_to_the_bit(make_fit: MakeFit, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 8, "learning_rate": 0.3, "shuffle": True, "seed": 11, "loggers": ["jsonl"],
        "save_strategy": "steps", "lr_scheduler_type": "cosine", "precision": FP16Mixed(initial_scale=64.0),
    }  # fmt: skip
    torch.manual_seed(5)
    first = make_fit(Regressor(), ROWS, **options)
    first.train()
    file = tmp_path / "output" / "config.yaml"
    held = yaml.safe_load(file.read_text())
    assert held["precision"] == {"name": "16-mixed", "initial_scale": 64.0} and held["strategy"] == "single"
    assert {field.name for field in dataclasses.fields(FitArguments)} <= held.keys()
    assert held["given_by_program"] == ["module", "train_data"]
    torch.manual_seed(5)
    second = Fit.from_config(file, Regressor(), ROWS, output_dir=str(tmp_path / "again"))
    second.train()
    assert same(parameters_of(first.module), parameters_of(second.module))
    again = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    assert {**again, "output_dir": held["output_dir"]} == held


def test_an_unknown_argument_beside_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"Fit has no argument 'lr'\. Write learning_rate\."):
        Fit.from_config(written(tmp_path, "seed: 1\n"), Regressor(), ROWS, lr=0.1)


def test_what_a_program_gave_must_be_given_again(make_fit: MakeFit, tmp_path: Path) -> None:
    given = {"callbacks": [Callback()], "compute_loss_func": lambda outputs, labels: outputs.sum()}
    make_fit(Regressor(), ROWS, report=True, max_steps=1, **given).train()
    file = tmp_path / "output" / "config.yaml"
    assert "the run was given callbacks, compute_loss_func by its program" in problems_of(file)[0]
    Fit.from_config(file, Regressor(), ROWS, callbacks=(), compute_loss_func=None)


def test_a_run_that_writes_nothing_else_leaves_no_file(make_fit: MakeFit, tmp_path: Path) -> None:
    make_fit(Regressor(), ROWS, max_steps=1).train()
    assert not (tmp_path / "output").exists()


def test_a_file_that_cant_be_written_is_warned_of(make_fit: MakeFit, tmp_path: Path) -> None:
    (tmp_path / "output" / "config.yaml").mkdir(parents=True)
    fit = make_fit(Regressor(), ROWS, max_steps=2, save_strategy="steps")
    with pytest.warns(UserWarning, match=r"config\.yaml can't be written: .*The run goes on"):
        fit.train()
    assert (tmp_path / "output" / "checkpoint-2").is_dir()


def test_a_target_is_built_after_the_seed_and_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    text = f"target: {PROGRAM}:build\nbuild: {{width: 4}}\nloggers: []\nseed: 5\nprogress: false\n"
    path = written(tmp_path, text)
    results = []
    for number in range(3):
        torch.manual_seed(number)
        source = path if number < 2 else tmp_path / "1" / "config.yaml"
        fit = Fit.from_config(source, output_dir=str(tmp_path / str(number)))
        assert fit.module.layers[0].out_features == 4 and len(fit.train_data) == 56
        assert fit.train().global_step == 6  # the file's own ARGUMENTS
        results.append(parameters_of(fit.module))
    assert same(results[0], results[1]) and same(results[0], results[2])
    held = yaml.safe_load((tmp_path / "1" / "config.yaml").read_text())
    assert held["target"] == f"{PROGRAM}:build" and held["build"] == {"width": 4}
    assert "given_by_program" not in held
