"""One checkpoint for all: between XLA devices and the strategies that torch itself runs, in another environment."""

import sys
from pathlib import Path
from typing import Any

import pytest
from environments import run
from safetensors.torch import load_file
from training import train

UPDATES, SAVED = 10, 5
ELSEWHERE = {"single": 1, "ddp": 2, "fsdp2": 2}


def arguments_of(directory: Path, **more: Any) -> dict[str, Any]:
    return {"max_steps": UPDATES, "save_strategy": "steps", "save_steps": SAVED, "output_dir": str(directory), **more}


@pytest.fixture(scope="module")
def xla(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """A run on four devices, saved half way, and its curves."""
    directory = tmp_path_factory.mktemp("xla")
    options = {"mesh": {"fsdp": 2, "tensor": 2}}
    arguments = arguments_of(directory, strategy="xla", options=options, per_device_train_batch_size=8)
    return directory, train(export=directory / "end.safetensors", **arguments)


@pytest.mark.parametrize("strategy", ELSEWHERE)
def test_both_ways(tmp_path: Path, xla: tuple[Path, dict[str, list[Any]]], strategy: str) -> None:
    """Weights, moments, steps and groups, buffers, the schedule and the order of samples: the curves go on alike."""
    saved, expected = xla
    ranks = ELSEWHERE[strategy]
    there: dict[str, Any] = {"strategy": strategy, "per_device_train_batch_size": 16 // ranks}
    there |= {"devices": ranks} if ranks > 1 else {}
    going_on = arguments_of(tmp_path / "to", resume=str(saved / f"checkpoint-{SAVED}"), **there)
    end = tmp_path / "end.safetensors"
    resumed, whole = run([{**going_on, "export": str(end)}, arguments_of(tmp_path / "from", **there)])
    assert resumed["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert whole["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    own, others = load_file(saved / "end.safetensors"), load_file(end)
    assert own.keys() == others.keys()
    for name, tensor in own.items():
        assert (tensor - others[name]).abs().max() < 1e-4, name

    mesh = {"strategy": "xla", "options": {"mesh": {"fsdp": 4}}, "per_device_train_batch_size": 4}
    back = arguments_of(tmp_path / "back", resume=tmp_path / f"from/checkpoint-{SAVED}", **mesh)
    assert train(**back)["loss"] == pytest.approx(whole["loss"], rel=1e-5)


@pytest.mark.parametrize("devices", [1, 2])
def test_other_numbers_of_devices(tmp_path: Path, xla: tuple[Path, dict[str, list[Any]]], devices: int) -> None:
    saved, expected = xla
    there: dict[str, Any] = {"strategy": "xla", "per_device_train_batch_size": 16 // devices}
    going_on = arguments_of(tmp_path, resume=str(saved / f"checkpoint-{SAVED}"), **there)
    found = run([going_on], Path(sys.executable), {"CPU_NUM_DEVICES": str(devices)})[0]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_devices_that_divide_neither_weights_nor_batches() -> None:
    """Three devices, and micro-batches of 8 at the end of the data: 203 are 13 of 15, and 8."""
    on_three = {"strategy": "xla", "per_device_train_batch_size": 5, "max_steps": 15}
    on_one = {"per_device_train_batch_size": 15, "max_steps": 15}
    found, expected = run([on_three, on_one], Path(sys.executable), {"CPU_NUM_DEVICES": "3"})
    assert found["epoch"] == expected["epoch"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
