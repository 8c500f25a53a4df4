"""Options on a command line: over files, by subject, with near names; and what other parsers make of FitArguments."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from stratagem import Fit, FitArguments, TrainModule, configure
from stratagem.framework.command_line import main
from stratagem.framework.commands.fit import command
from stratagem.framework.configuration.configuration import Configuration
from stratagem.framework.configuration.options import fit_options
from stratagem.framework.configuration.targets import parts_of
from stratagem.framework.fields.subjects import SUBJECTS, by_subject
from torch.utils.data import TensorDataset, random_split

PROGRAM = Path(__file__).with_name("program.py")
TARGET = f"{PROGRAM}:build"


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target's folder is put on the path for the time of a test alone."""
    monkeypatch.setattr("sys.path", [*sys.path])


def read(*words: str) -> Configuration:
    return command().read([TARGET, *words])


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command line is refused with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        command().read(list(words))
    assert caught.value.code == 2
    return capsys.readouterr().err


# What is read.


def test_every_field_is_an_option_and_flags_are_read_in_their_types() -> None:
    run = read(
        "--learning_rate", "3e-4", "--max-steps=7", "--optim_args", "momentum=0.9,nesterov=true", "--shuffle", "false",
        "--torch_compile", "--max_grad_norm", "null", "--loggers", "jsonl,tensorboard",
        "--strategy", "fsdp2", "--strategy.replicas", "2", "--precision", "16-mixed", "--precision.initial_scale", "8",
        "--devices", "2", "--build.width", "4", "--build.deep", "--tf32", "--resume",
    )  # fmt: skip
    values = run.values
    assert {field.name for field in fit_options()} <= values.keys()
    assert (values["learning_rate"], values["max_steps"], values["save_steps"]) == (0.0003, 7, 3)
    assert values["optim_args"] == {"momentum": 0.9, "nesterov": True}
    assert (values["shuffle"], values["torch_compile"], values["tf32"], values["max_grad_norm"]) == (
        False,
        True,
        True,
        None,
    )
    assert values["loggers"] == ["jsonl", "tensorboard"] and values["devices"] == 2 and run.resume is True
    assert run.section("strategy")["replicas"] == 2 and run.section("precision")["initial_scale"] == 8.0
    assert run.section("build") == {"width": 4, "deep": True}
    assert run.section("data") == {"rows": 64}  # width is one option of both functions


def test_options_override_files_and_files_the_programs_own(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.toml"
    first.write_text("learning_rate: 1e-3\nseed: 3\nstrategy: {name: ddp, bucket_cap_mb: 5}\nbuild: {width: 5}\n")
    second.write_text("seed = 4\n")
    values = read("--config", str(first), f"--config={second}", "--build.width", "6").values
    assert (values["max_steps"], values["learning_rate"], values["seed"], values["build.width"]) == (6, 0.001, 4, 6)
    assert (values["strategy"], values["strategy.bucket_cap_mb"], values["strategy.static_graph"]) == (
        "ddp",
        5.0,
        False,
    )


def test_another_strategy_drops_the_options_of_the_one_that_it_replaces(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("strategy: {bucket_cap_mb: 5, name: ddp}\nprecision: {name: 16-mixed, initial_scale: 8}\n")
    second.write_text("strategy: fsdp2\n")
    files = ["--config", str(first), "--config", str(second)]
    for words in (["--config", str(first), "--strategy", "fsdp2"], files):
        values = read(*words).values
        assert (
            values["strategy"] == "fsdp2"
            and values["strategy.replicas"] == 1
            and values["precision.initial_scale"] == 8
        )
        assert "strategy.bucket_cap_mb" not in values
    assert dict(Configuration.read(first, second).values)["strategy"] == "fsdp2"
    own = configure(lambda: None, None, {"strategy": "deepspeed", "strategy.stage": 3}, ["--strategy", "ddp"])
    assert own.values["strategy"] == "ddp" and "strategy.stage" not in own.values


def test_auto_has_options_and_is_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = read("--strategy", "auto", "--strategy.measure", "3")
    assert run.section("strategy") == {"measure": 3}
    strategy = run.fit_arguments({"module": TrainModule()})["strategy"]
    assert strategy.chooses and strategy.candidates_to_measure == 3
    with pytest.raises(SystemExit):
        read("--strategy", "auto", "--strategy.measure", "3", "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["strategy"] == {"name": "auto", "measure": 3}
    file = tmp_path / "run.yaml"
    file.write_text(f"target: {TARGET}\nstrategy: auto\n")
    assert read("--config", str(file)).section("strategy") == {"measure": 0}
    file.write_text(f"target: {TARGET}\nstrategy: {{name: auto, measure: 1}}\n")
    with pytest.raises(ValueError, match="Write 2 or more, or 0 to go by plans alone"):
        Fit.from_config(file)


def test_a_file_names_the_target(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"target: {TARGET}\nbuild: {{width: 3}}\n")
    run = command().read(["--config", str(file), "--resume", "there/checkpoint-3"])
    assert run.target is not None and run.target.build.__name__ == "build"
    assert run.values["build.width"] == 3 and run.resume == "there/checkpoint-3"


def test_the_printed_configuration_is_read_as_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--learning_rate", "3e-4", "--strategy", "fsdp2", "--strategy.replicas", "2", "--precision", "16-mixed"]
    with pytest.raises(SystemExit) as caught:
        command().read([TARGET, *words, "--print_config"])
    printed = capsys.readouterr().out
    assert not caught.value.code and yaml.safe_load(printed)["strategy"]["replicas"] == 2
    file = tmp_path / "run.yaml"
    file.write_text(printed)
    assert dict(command().read(["--config", str(file)]).values) == dict(read(*words).values)


def test_help_is_grouped_and_documented(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as caught:
        command().read([TARGET, "--strategy", "fsdp2", "--help"])
    printed = capsys.readouterr().out
    assert not caught.value.code and "__" not in printed and "<function" not in printed
    titles = [line[:-1] for line in printed.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[:4] == ["options", "this command", "your build()", "your data()"]
    assert set(titles) > {title for title, _ in SUBJECTS} and "options of strategy fsdp2" in titles
    assert "--build.width VALUE   features of the hidden layer. (type: int, default: 8)" in printed
    assert "updates to train for; -1 trains for num_train_epochs" in printed and "default: 6)" in printed
    assert printed.index("--strategy.replicas") > printed.index("options of strategy fsdp2:")


def test_every_subject_begins_with_a_field_and_every_field_has_a_subject() -> None:
    subjects = by_subject(FitArguments)
    assert list(subjects) == [title for title, _ in SUBJECTS]
    assert [first for _, first in SUBJECTS] == [names[0] for names in subjects.values()]


# What is wrong.


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--lr", "1"], "--lr: Fit has no argument 'lr'. Write learning_rate."),
        (["--max_epochs", "1"], "--max_epochs: Fit has no argument 'max_epochs'. Write num_train_epochs"),
        (["--learning_rte", "1"], "--learning_rte: Fit has no argument 'learning_rte'. Did you mean 'learning_rate'?"),
        (["--width", "1"], "--width: 'width' belongs to a section: write 'build.width'."),
        (["--build.widht", "1"], "--build.widht: build() has no argument 'widht'. Did you mean 'width'?"),
        (["--strategy", "ddp", "--strategy.replicas", "2"], "strategy='ddp' has no argument 'replicas'."),
        (["--strategy", "ddq"], "Unknown strategy 'ddq'. Did you mean 'ddp'?"),
        (["--learning_rate", "fast"], "--learning_rate='fast': must be float"),
        (["--debug", "all"], "--debug='all': must be one of '', 'underflow_overflow', 'ranks_agree'"),
        (["--build.width", "wide"], "--build.width='wide': must be int"),
        (["--warmup_steps", "-1"], "the command line: warmup_steps=-1.0: must not be negative"),
        (["--learning_rate"], "--learning_rate: expected one argument"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_write(
    capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    printed = refused(capsys, TARGET, *words)
    assert expected in printed and printed.endswith("All options: stratagem fit --help\n")
    assert len(printed) < 500  # near names, not all


def test_what_is_wrong_in_a_file_and_on_the_line_is_said_together(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("report_to: wandb\nbuild:\n  width: wide\n  depth: 2\nseed: -1\n")
    printed = refused(capsys, TARGET, "--config", str(file), "--fp16", "--seed", "-2")
    lines = [line.strip().replace(f"{tmp_path}/", "") for line in printed.splitlines() if line[:2] == "  "]
    assert [line.partition(": ")[0] for line in lines] == ["--fp16", *(f"run.yaml, line {n}" for n in (1, 4, 3, 5))]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "Name what builds the module: stratagem fit train.py:build"),
        (["absent.py:build"], "There is no file"),
        ([f"{PROGRAM}:absent"], "has no function absent()."),
        (["no_such_package.module:build"], "There is no module no_such_package"),
        (["train"], "Write path/to/file.py:function or package.module:function. Received: 'train'"),
        ([f"{PROGRAM}:whole"], "--build.rows is required: your function has no default."),
    ],
)
def test_a_target_that_isnt_there_is_refused(
    capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert expected in refused(capsys, *words)


def test_a_function_that_returns_something_else_is_refused(tmp_path: Path) -> None:
    for made, expected in (
        (3, r"returned a int\. Return a TrainModule, or a mapping of Fit's arguments"),
        ({"module": None, "learning_rate": 1.0}, r"returned 'learning_rate'.*ARGUMENTS = \{'learning_rate': \.\.\.\}"),
        ({"module": None}, r"gives no training data\. Write a function data\(\) beside it"),
    ):
        run = configure(lambda made=made: made, words=["--loggers", ""])
        with pytest.raises((TypeError, ValueError), match=expected):
            Fit.from_config(run, output_dir=str(tmp_path))


def test_parts_of_the_data_that_cannot_be_told_apart_are_refused() -> None:
    whole = TensorDataset(torch.zeros(4, 1))
    parts = random_split(whole, [3, 1])
    assert parts_of(tuple(parts)) == tuple(parts) and parts_of(whole) == (whole, None)
    assert parts_of([]) == ([], None) and parts_of([{"x": 1.0}]) == ([{"x": 1.0}], None)
    with pytest.raises(TypeError, match=r"returned a list of 2 datasets.*Return a tuple"):
        parts_of(parts)
    with pytest.raises(TypeError, match=r"returned a tuple of 3\. Return the training data, or two"):
        parts_of((whole, whole, whole))


def test_a_mapping_of_fits_arguments_is_taken(tmp_path: Path) -> None:
    run = command().read([f"{PROGRAM}:whole", "--build.rows", "32", "--output_dir", str(tmp_path), "--max_steps", "2"])
    fit = Fit.from_config(run, progress=False)
    assert (len(fit.train_data), len(fit.eval_data)) == (24, 8) and fit.train().global_step == 2


# The commands.


def test_completion_knows_options_and_their_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    tries = f'source {script}; try() {{ COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); COMPREPLY=(); _shtab_stratagem; '
    tries += 'echo "${COMPREPLY[@]}"; }; try stratagem f; try stratagem fit --strategy fs; try stratagem fit --learning'
    done = subprocess.run(["bash", "-c", tries], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["fit", "fsdp1 fsdp2 fsdp", "--learning_rate"]


@pytest.mark.slow
def test_a_command_without_jsonargparse_says_what_to_install() -> None:
    code = "import sys; sys.modules['jsonargparse'] = None; from stratagem.framework.command_line import main; "
    done = subprocess.run(
        [sys.executable, "-c", code + f"main(['fit', '{TARGET}'])"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, timeout=120,
    )  # fmt: skip
    assert done.returncode and "pip install 'stratagem[cli]'" in done.stderr.splitlines()[-1]


# Other parsers.


def train(args: FitArguments) -> FitArguments:
    return args


def test_jsonargparse_takes_fit_arguments_as_they_are(tmp_path: Path) -> None:
    from jsonargparse import ArgumentParser, auto_cli

    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 3e-4\nmax_steps: 5\noptim: sgd\noptim_args:\n  momentum: 0.9\n")
    words = ["--args", str(file), "--args.max_steps", "7", "--args.save_steps", "0.5"]
    made: Any = auto_cli(train, args=words, as_positional=False)
    assert (made.learning_rate, made.max_steps, made.save_steps) == (0.0003, 7, 0.5)
    assert made.optim_args == {"momentum": 0.9}
    words = ["--args.optim=sgd", "--args.optim_args=momentum=0.5"]
    assert auto_cli(train, args=words, as_positional=False).optim_args == {"momentum": 0.5}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FitArguments, "args")
    parsed = parser.instantiate_classes(parser.parse_args(["--args.learning_rate", "3e-4", "--args.shuffle", "false"]))
    assert parsed.args == FitArguments(learning_rate=3e-4, shuffle=False)


def test_the_class_stays_as_it_was_to_transformers_parser() -> None:
    from transformers import HfArgumentParser

    line = ["--learning_rate", "3e-4", "--optim_args", "momentum=0.9", "--tf32", "true", "--save_steps", "0.5"]
    [made] = HfArgumentParser(FitArguments).parse_args_into_dataclasses(line)
    assert made == FitArguments(learning_rate=3e-4, optim_args={"momentum": 0.9}, tf32=True, save_steps=0.5)
    with pytest.raises(TypeError, match="Write learning_rate"):
        FitArguments(lr=1.0)  # type: ignore[call-arg]
