"""The examples: they run from the command line, continue, learn, and hold what they promise of their parts."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"

MODEL = {"build.layers": 1, "build.width": 32, "build.heads": 2, "build.context": 32}
CADENCE = {"logging_steps": 2, "eval_steps": 4, "save_steps": 4, "data.eval_windows": 8, "sample.length": 8}
SIZES = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
TINY = {**MODEL, **CADENCE, **SIZES, "warmup_steps": 2}


def run_example(name: str, *options: object, directory: Path) -> str:
    """What an example prints, run in ``directory`` on one thread; both its outputs are shown where it fails."""
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, options)],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def run_gpt(directory: Path, *flags: str, **options: object) -> str:
    """What examples/gpt.py prints with a tiny model."""
    chosen = TINY | options
    return run_example("gpt.py", *(f"--{n}={value}" for n, value in chosen.items()), *flags, directory=directory)


def bits_per_byte(printed: str) -> float:
    found = re.search(r"held-out loss: ([\d.]+) bits per byte", printed)
    assert found, printed
    return float(found[1])


def read_log(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def gpt() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpt_example", EXAMPLES / "gpt.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_gpt_trains_and_leaves_its_files(tmp_path: Path) -> None:
    printed = run_gpt(tmp_path, max_steps=8, output_dir="run")
    run = tmp_path / "run"
    assert "update 8/8" in printed and "tokens/s" in printed
    assert 3 < bits_per_byte(printed) < 9
    assert "\ndef " in printed  # the sample
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    assert list((run / "train").glob("events.out.tfevents.*"))
    assert [row["step"] for row in read_log(run) if "eval_loss" in row] == [4, 8, 8]
    assert (run / "weights.safetensors").is_file()


@pytest.mark.slow
def test_gpt_resumed_ends_where_an_unbroken_run_ends(tmp_path: Path) -> None:
    whole = run_gpt(tmp_path, max_steps=8, output_dir="whole")
    parts = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole", parts)
    shutil.rmtree(parts / "checkpoint-8")  # as if it had been killed between updates 4 and 8
    resumed = run_gpt(tmp_path, "--resume", max_steps=8, output_dir="parts")
    assert "update 2/8" not in resumed and "update 6/8" in resumed
    assert resumed.partition("held-out")[2] == whole.partition("held-out")[2]
    begun = [(row["event"], row["step"]) for row in read_log(parts) if row.get("event") in ("begin", "resume")]
    assert begun == [("begin", 0), ("resume", 4)]
    longer = run_gpt(tmp_path, "--resume", max_steps=10, output_dir="parts")
    assert "update 6/" not in longer and "update 10/10" in longer


@pytest.mark.slow
def test_gpt_on_two_sharded_ranks_ends_where_one_rank_ends(tmp_path: Path) -> None:
    one = run_gpt(tmp_path, max_steps=4, output_dir="one")
    two = run_gpt(tmp_path, max_steps=4, output_dir="two", strategy="fsdp2", devices=2, per_device_train_batch_size=2)
    assert bits_per_byte(two) == pytest.approx(bits_per_byte(one), abs=0.002)
    assert two.partition("byte\n")[2] == one.partition("byte\n")[2]  # the sample


@pytest.mark.slow
def test_gpt_explains_every_option(tmp_path: Path) -> None:
    printed = run_example("gpt.py", "--help", directory=tmp_path)
    options = re.findall(r"^  (--[\w.]+)(.*\n(?: {10,}.*\n)*)", printed, flags=re.MULTILINE)
    assert len(options) > 80 and {"--learning_rate", "--build.width", "--sample.prompt"} <= {
        flag for flag, _ in options
    }
    for flag, rest in options:
        assert re.search(r'[a-z"]{3,},? ["a-z]', rest) and "of your function" not in rest, f"{flag} has no help"


def test_gpt_sees_no_later_byte(gpt: ModuleType) -> None:
    model = gpt.build(context=16, layers=2, width=32, heads=2).eval()
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_gpt_ties_its_head_and_names_its_blocks(gpt: ModuleType) -> None:
    model = gpt.build(context=16, layers=3, width=32, heads=2)
    assert model.head.weight is model.embedding.weight
    assert model.shard_units() == list(model.blocks) and len(model.blocks) == 3
    with pytest.raises(ValueError, match="width=30, heads=4"):
        gpt.build(width=30, heads=4)


def test_gpt_holds_out_whole_files_the_same_ones_each_time(gpt: ModuleType) -> None:
    train, held_out = gpt.data(context=64, eval_windows=50)
    again = gpt.data(context=64, eval_windows=50)
    assert torch.equal(train.text, again[0].text) and torch.equal(held_out.text, again[1].text)
    assert len(train) > 50_000 and len(held_out) == 50
    assert 0.02 < len(held_out.text) / len(train.text) < 0.1
    first, second = held_out[0], held_out[1]
    assert first["tokens"].shape == first["labels"].shape == (64,)
    assert torch.equal(first["tokens"][1:], first["labels"][:-1])
    assert not torch.equal(first["tokens"], second["tokens"])
    files = {part: set(bytes(data.text.tolist()).split(b"\0")) for part, data in (("train", train), ("held", held_out))}
    shared = {content for content in files["train"] & files["held"] if len(content) > 200}
    assert not shared


def test_windows_cover_the_text_once(gpt: ModuleType) -> None:
    windows = gpt.Windows(bytes(range(11)), context=3)
    assert [windows[index]["tokens"].tolist() for index in range(len(windows))] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert windows[2]["labels"].tolist() == [7, 8, 9]
    assert len(gpt.Windows(bytes(12), context=3, limit=2)) == 2


@pytest.mark.slow
def test_digits_are_read(tmp_path: Path) -> None:
    printed = run_example("digits.py", directory=tmp_path)
    found = re.search(r"held-out accuracy: ([\d.]+)", printed)
    assert found and float(found[1]) > 0.97


@pytest.mark.slow
def test_a_student_on_two_sharded_ranks_learns_from_its_teacher(tmp_path: Path) -> None:
    printed = run_example("distillation.py", "--strategy=fsdp2", "--devices=2", directory=tmp_path)
    lines = re.findall(r"^(.+): held-out accuracy ([\d.]+)", printed, re.MULTILINE)
    found = {name: float(accuracy) for name, accuracy in lines}
    assert list(found) == ["teacher", "student", "its average"]
    assert found["teacher"] > 0.96 and found["student"] > 0.85 and found["its average"] > 0.88
    first, second = sorted((tmp_path / "output" / "distillation").glob("checkpoint-*"))
    assert {file.stat().st_ino for file in first.glob("model/*-frozen-*")} == {
        file.stat().st_ino for file in second.glob("model/*-frozen-*")
    }


@pytest.mark.slow
def test_a_generator_and_its_critic_take_turns(tmp_path: Path) -> None:
    first, rest = (f"--max_steps={updates}" for updates in (40, 160))
    run_example("gan.py", first, "--save_steps=40", "--logging_steps=20", directory=tmp_path)
    printed = run_example("gan.py", rest, "--resume", "--save_steps=50", "--logging_steps=20", directory=tmp_path)
    found = re.search(r"distance of the mean image: ([\d.]+)", printed)
    assert found and float(found[1]) < 0.12  # an untrained generator's is above 0.3
    logs = [row for row in read_log(tmp_path / "output" / "gan") if "loss_critic" in row]
    assert [row["step"] for row in logs][-1] == 160 and all("loss_generator" in row for row in logs)
    assert (tmp_path / "output" / "gan" / "digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_best_arguments_found_beat_the_defaults(tmp_path: Path) -> None:
    printed = run_example("search.py", "--search.trials=5", "--num_train_epochs=4", directory=tmp_path)
    assert len(re.findall(r"^trial \d+ \(\d/5\) \| (?:complete|pruned)", printed, flags=re.MULTILINE)) == 5
    rows = re.findall(r"^ *(defaults|best found) +([\d.]+) ", printed, re.MULTILINE)
    losses = {name: float(loss) for name, loss in rows}
    assert losses["best found"] < 0.8 * losses["defaults"]


@pytest.mark.slow
def test_a_large_model_runs_tiny_and_says_what_it_would_take(tmp_path: Path) -> None:
    printed = run_example("pretrain_large.py", directory=tmp_path)
    losses = [row["loss"] for row in read_log(tmp_path / "output" / "large") if "loss" in row]
    assert "update 60/60" in printed and losses[-1] < losses[0] - 0.5
    printed = run_example("pretrain_large.py", "--size=8b", "--ranks=16", "--dry-run", directory=tmp_path)
    assert "8,030,261,248 parameters, 501,891,328 on each of 16 ranks" in printed  # those of Llama 3 8B
    assert "7.5 GiB a rank" in printed


@pytest.mark.slow
def test_lower_halves_of_digits_are_found_by_two_ranks_in_pieces(tmp_path: Path) -> None:
    options = ("--strategy=ddp", "--devices=2", "--per_device_train_batch_size=128", "--contrastive_chunks=2")
    printed = run_example("contrastive.py", *options, "--num_train_epochs=20", directory=tmp_path)
    found = re.search(r"among 300: ([\d.]+) at once, ([\d.]+) among the first five", printed)
    assert found and float(found[1]) > 0.12 and float(found[2]) > 0.4  # chance is 0.003 and 0.017
    picture = (tmp_path / "output" / "contrastive" / "found.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and picture[16:24] == (384).to_bytes(4, "big") + (720).to_bytes(4, "big")
