"""``stratagem plan``: devices, floors, the peak against torch's tracker, and what can't be planned."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planned_models import build_llama, build_vit
from stratagem import Callback, Fit
from stratagem.framework.command_line import main
from stratagem.framework.configuration.writing import text_of
from stratagem.framework.planning.account import Account, Traffic
from stratagem.framework.planning.asking import FIT, play_ranks
from stratagem.framework.planning.batches import of_samples, samples_in
from stratagem.framework.planning.devices import DEVICES, find_device
from stratagem.framework.planning.growth import lines_of, most_samples
from stratagem.framework.planning.plan import RunPlan, floors_of, seconds_of
from torch.distributed._tools.mem_tracker import MemTracker

HERE = Path(__file__).parent
GPT = str(HERE.parents[1] / "examples" / "gpt.py") + ":build"
MODELS = str(HERE.parent / "planned_models.py")


def build_gpt() -> dict[str, Any]:
    """The example GPT, small, on its own data."""
    spec = importlib.util.spec_from_file_location("gpt_of_plan", HERE.parents[1] / "examples" / "gpt.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    train, _ = example.data(SMALL["context"])
    return {"module": example.build(**SMALL), "train_data": train}


SMALL = {"context": 64, "layers": 2, "width": 32, "heads": 2}
# What makes each, and what plans are asked for.
BUILDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "llama": (build_llama, f"{MODELS}:build_llama", {}),
    "vit": (build_vit, f"{MODELS}:build_vit", {}),
    "gpt": (build_gpt, GPT, {f"build.{name}": value for name, value in SMALL.items()}),
}


@pytest.mark.parametrize(
    ("asked", "found"),
    [("H100", "h100-80gb"), ("h100-80", "h100-80gb"), ("4090", "rtx4090-24gb"), ("A100-40GB", "a100-40gb")],
)
def test_a_device_by_its_name(asked: str, found: str) -> None:
    assert find_device(asked) is DEVICES[found]


def test_a_device_of_figures() -> None:
    device = find_device("80GiB, 989e12, 3.35e12, 450e9")
    assert (device.memory, device.flops, device.memory_bandwidth) == (80 * 2**30, 989e12, 3.35e12)
    assert (device.link, device.network) == (450e9, 450e9)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("h20-141gb", "Did you mean 'h200-141gb'"),
        ("a100", "'a100-80gb' or 'a100-40gb'"),
        ("h300", "--device \"80GiB,989e12"),
        ("80GiB,fast,1", "'fast' is no figure"),
        ("80GiB,1", "has 2 figures"),
        ("80GiB,0,1", "above 0"),
    ],
)  # fmt: skip
def test_an_unknown_device_names_the_nearest(asked: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        find_device(asked)


def test_floors_are_bytes_and_operations_by_rates() -> None:
    device = find_device("1GiB,100,10,4,2")
    inside = Traffic("all_gather", "shard", 4, "in a node", 4, 2, 80)
    across = Traffic("all_reduce", "replicate", 2, "between nodes", 1, 1, 8)
    spread = Traffic("reduce_scatter", "shard", 8, "between nodes", 4, 1, 64)
    assert seconds_of(inside, device) == 80 * 3 / 4 / 4
    assert seconds_of(across, device) == 2 * 8 / 2 / 2
    assert seconds_of(spread, device) == max(64 * 7 / 8 / 4, 64 * 7 / 8 / (4 * 2))
    account = Account(
        0, parameters=5, gradients=10, optimizer_state=10, traffic=(inside, across), flops={"forward": 300}
    )
    floors = floors_of(account, device)
    assert (floors.compute, floors.traffic) == (3.0 + 5.0, 15.0 + 4.0)
    assert (floors.overlapped, floors.apart) == (19.0, 27.0)


def test_a_batch_of_other_samples_has_the_same_entries() -> None:
    batch = {"x": torch.ones(3, 2), "y": [torch.zeros(3), 7], "once": torch.ones(5)}
    assert samples_in(batch) == 3
    other = of_samples(batch, 3, 8)
    assert (other["x"].shape, other["y"][0].shape, other["y"][1]) == ((8, 2), (8,), 7)
    assert other["once"] is batch["once"]


class Tracked(Callback):
    """The peak of a run's second update, as torch's tracker sees it."""

    def __init__(self) -> None:
        self.peak = 0
        self.tracker: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, fit: Fit, **more: Any) -> None:
        if state.global_step == 1:
            self.tracker = MemTracker()
            self.tracker.track_external(fit.strategy.module, fit.strategy.stepping_optimizer())
            self.tracker.__enter__()

    def on_substep_end(self, *context: Any, **more: Any) -> None:
        if self.tracker is not None:
            self.tracker.reset_mod_stats()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 2:
            self.tracker.__exit__(None, None, None)
            self.peak = self.tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def played(target: str, values: dict[str, Any]) -> Account:
    """Play the only rank of a run."""
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "config.yaml"
        config.write_text(text_of({"strategy": "single", **values}, target))
        [account] = play_ranks({"config": str(config), "words": None, "fit": FIT, "ranks_per_node": 1}, [0], 1, 1)
        return account


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}],
    ids=["plain", "checkpointed", "accumulated"],
)
def test_the_peak_is_what_torchs_tracker_sees(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    arguments = {**arguments, "per_device_train_batch_size": 4}
    tracked = Tracked()
    build, target, options = BUILDS[name]
    made = build()
    Fit(
        **made,
        callbacks=[tracked],
        loggers=(),
        progress=False,
        save_strategy="no",
        max_steps=2,
        output_dir=str(tmp_path),
        **arguments,
    ).train()
    account = played(target, {**options, **arguments})
    assert account.peak is not None and account.peak.bytes == pytest.approx(tracked.peak, rel=0.03)


@pytest.mark.slow
def test_what_asks_for_a_value_has_the_static_numbers_and_the_line() -> None:
    account = played(f"{MODELS}:build_choosing", {})
    assert "planned_models.py" in account.stopped
    assert "return made if made.sum() > 0 else -made" in account.stopped
    assert account.peak is None
    # A weight of 4 x 3 and a bias of 3, two moments of each, and a step count of each.
    assert (account.parameters, account.gradients, account.optimizer_state) == (60, 60, 120 + 8)


@pytest.mark.slow
def test_the_command_says_what_stopped_it_and_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{MODELS}:build_choosing", "--strategy", "fsdp2", "--world", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "No update could be played" in said and "return made if made.sum() > 0 else -made" in said
    # Of a weight of 3 x 4 and a bias of 3 the ranks have two rows and one: 10 and 5 numbers, of which there are two
    # moments, and a count for each of the two.
    assert "optimizer state │ 88 B │ 48 B" in said


@pytest.mark.slow
def test_the_benchmark_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    program = HERE.parents[1] / "benchmarks" / "plan.py"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    finished = subprocess.run(
        [sys.executable, str(program), "peaks"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert "no GPU, so no plan is compared" in finished.stdout


@pytest.mark.slow
def test_the_command_prints_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", GPT, "--build.layers", "1", "--build.width", "16", "--strategy", "fsdp2", "--world", "16"]
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["world_size"], plan["nodes"], plan["fits"]) == (16, 2, True)
    assert {row["dimension"] for row in plan["ranks"][0]["traffic"]} == {"shard"}
    assert {row["link"] for row in plan["ranks"][0]["traffic"]} == {"between nodes"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "h300"], "There is no device 'h300'"),
        (["--world", "0"], "at least 1"),
        (["--world", "6", "--nodes", "4"], "nodes may be 1, 2, 3, 6"),
        (["--margin", "1.5"], "margin"),
    ],
)
def test_bad_input_is_named_before_anything_is_played(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", GPT, *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "arguments", "said"),
    [
        (GPT, {"strategy": "fsdp2", "strategy.replicas": 3, "world": 4}, "can't cut 4 ranks"),
        (f"{MODELS}:build_on_gpu", {}, "leave out .cuda"),
        (GPT, {"strategy": "dp"}, "Plan strategy='ddp' instead"),
    ],
    ids=["world", "gpu", "dp"],
)
def test_what_cannot_be_planned_is_named(target: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Fit.plan_run(target, **arguments)


@pytest.mark.slow
def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    """With two samples the optimizer's step has the peak, and with many the activations."""
    arguments: dict[str, Any] = {"strategy": "single", "device": "4MiB,1,1", "margin": 0.0}
    found = Fit.plan_run(f"{MODELS}:build_vit", per_device_train_batch_size=2, **arguments).largest_micro_batch
    assert found is not None and found > 2
    fits = [
        Fit.plan_run(f"{MODELS}:build_vit", per_device_train_batch_size=samples, **arguments).fits
        for samples in (found, found + 1)
    ]
    assert fits == [True, False]


def test_the_largest_micro_batch_leaves_the_margin_free() -> None:
    from stratagem.framework.planning.account import Peak

    account = Account(0, samples=2, growth=[(300, 100.0)], peak=Peak(500, {}, "forward", "", 0))
    plan = RunPlan([account], 1, 1, find_device("1000B,1,1"), margin=0.1)
    assert plan.fits and plan.largest_micro_batch == 6  # 300 + 6 x 100 = 900


@given(
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 90)), min_size=1, max_size=12), st.integers(1, 4),
    st.integers(0, 2000),
)  # fmt: skip
def test_the_most_samples_are_those_of_the_moment_that_is_full_first(
    moments: list[tuple[int, int]], samples: int, room: int
) -> None:
    def held(count: int) -> list[int]:
        return [base + rise * count for base, rise in moments]

    lines = lines_of(held(samples), held(2 * samples), samples)
    assert len(lines) <= len(moments)
    found = most_samples(lines, room)
    if all(rise == 0 for _, rise in moments):
        assert found is None
    else:
        fitting = [count for count in range(1, 2002) if max(held(count)) <= room]
        assert found == max(fitting, default=0)
