"""The examples of the gallery: what they print, draw and save is what was worked out without them."""

import math
import re
from pathlib import Path

import pytest
from PIL import Image
from running import EXAMPLES, run_program
from safetensors import safe_open

TWO_RANKS = ("--strategy=fsdp2", "--devices=2")


def cells(printed: str, row: str) -> list[str]:
    """What stands in a row of a printed table, after its name."""
    [line] = [line for line in printed.splitlines() if re.match(rf"│ {row} +│", line)]
    return [cell.strip() for cell in line.split("│")[2:-1]]


@pytest.mark.slow
def test_topics_of_texts_are_told(tmp_path: Path) -> None:
    printed = run_program(EXAMPLES / "classify_text.py", "--num_train_epochs=2", directory=tmp_path)
    found = re.search(r"held-out accuracy: ([\d.]+) of (\d+) texts", printed)
    assert found and float(found[1]) > 0.65 and int(found[2]) > 300  # the most frequent topic is a quarter
    rows = re.findall(r"│ (.+?) +│ (\w+) +│ (\w+) +│ ([\d.]+) +│", printed)
    assert len(rows) >= 14 and {is_about for _, is_about, _, _ in rows} >= {"mail", "numbers", "web"}


@pytest.mark.slow
def test_adapters_alone_are_trained_and_saved(tmp_path: Path) -> None:
    printed = run_program(EXAMPLES / "lora.py", "--max_steps=120", "--build.rank=4", directory=tmp_path)
    # Per layer four matrices of 64 x 64, and three between 64 and 128; an adapter has rank * (rows + columns) numbers.
    adapters = 2 * 4 * (4 * (64 + 64) + 3 * (64 + 128))
    whole, adapted = cells(printed, "all, on English"), cells(printed, "adapters, on French")
    assert adapted[0] == f"{adapters:,}"
    sizes = [int(row[1].replace(",", "")) for row in (whole, adapted)]
    assert 12 * adapters < sizes[1] < sizes[0] / 4  # weights and two moments of 4 bytes, and some files about them
    losses = [[float(cell.split(",")[0]) for cell in row[2:]] for row in (whole, adapted)]
    assert losses[0][0] < 0.2 and losses[0][1] > 3 and losses[1][1] < losses[0][1] / 4
    output = tmp_path / "output" / "lora"
    for path in (output / "adapters" / "adapter_model.safetensors", *output.glob("checkpoint-*/model/*.safetensors")):
        with safe_open(path, "pt") as file:
            assert all("lora_" in name for name in file.keys())  # noqa: SIM118 -- safe_open is no mapping
            assert sum(file.get_tensor(name).numel() for name in file.keys()) == adapters  # noqa: SIM118
    asked, answered = re.findall(r"^(\d{4}-\d\d-\d\d)=(.+)$", printed, flags=re.MULTILINE)
    assert asked[0] == answered[0] and asked[1].endswith(f", {asked[0][:4]}") and "," not in answered[1]


@pytest.mark.slow
def test_images_are_written_read_and_told_apart(tmp_path: Path) -> None:
    printed = run_program(EXAMPLES / "vit.py", "--num_train_epochs=4", directory=tmp_path)
    found = re.search(r"held-out accuracy: ([\d.]+) of (\d+) images", printed)
    assert found and float(found[1]) > 0.6 and 300 < int(found[2]) < 400
    files = list((tmp_path / "output" / "digit_images").glob("*/*.png"))
    assert len(files) == 1797 and {file.parent.name for file in files} == set("0123456789")
    assert not list((tmp_path / "output").glob("digit_images.*"))
    with Image.open(tmp_path / "output" / "vit" / "predictions.png") as picture:
        assert picture.width == 600


@pytest.mark.slow
def test_samples_of_two_sharded_ranks_are_read_as_what_was_asked_for(tmp_path: Path) -> None:
    options = (*TWO_RANKS, "--per_device_train_batch_size=64", "--max_steps=300", "--save_strategy=no")
    printed = run_program(EXAMPLES / "diffusion.py", *options, directory=tmp_path)
    shares = dict(re.findall(r"^(\w+) weights: ([\d.]+) of 500 samples", printed, flags=re.MULTILINE))
    assert list(shares) == ["last", "averaged"] and all(float(share) > 0.5 for share in shares.values())
    with Image.open(tmp_path / "output" / "diffusion" / "digits.png") as picture:
        assert picture.size == (10 * 10 * 4, 8 * 10 * 4)


@pytest.mark.slow
def test_forecasts_of_two_sharded_ranks_come_near_what_the_noise_leaves(tmp_path: Path) -> None:
    options = (*TWO_RANKS, "--per_device_train_batch_size=32", "--data.series=2000", "--num_train_epochs=6")
    printed = run_program(EXAMPLES / "time_series.py", *options, directory=tmp_path)
    rows = ("as a week ago", "this model", "all but the noise")
    week_ago, model, noise = (float(cells(printed, row)[0]) for row in rows)
    assert noise == pytest.approx(0.3 * math.sqrt(2 / math.pi), abs=1e-4)  # the mean of |N(0, 0.3)|
    assert week_ago > math.sqrt(2) * noise  # two noises, and a trend
    assert noise * 0.98 < model < 0.8 * week_ago
    found = re.search(r"in the band of 0.8: ([\d.]+) of the hours", printed)
    assert found and 0.7 < float(found[1]) < 0.9
    assert (tmp_path / "output" / "time_series" / "forecasts.png").read_bytes().startswith(b"\x89PNG")
