"""ZeRO by DeepSpeed: the curve of one device at every stage, and checkpoints that go in and out of it."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file
from stratagem import Callback, TrainModule
from stratagem.framework.parity.ranks import Case, compare_strategies
from stratagem.framework.parity.recording import Recipe
from stratagem.precision.fp8 import FP8
from stratagem.strategies.deepspeed import DeepSpeed
from test_batch_size import Hungry, HungryInBackward
from test_batch_size import run as run_hungry
from test_resharding import contents, continue_each
from test_strategies import OnlyBias, OnlyHead, single
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import default_collate
from training import Tagger, curves, make_fit, token_rows, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra deepspeed"),
]
STAGES = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def zero_ranks() -> Iterator[Ranks]:
    """Two ranks of their own: the other tests' ranks never import DeepSpeed."""
    ranks = Ranks(2)
    yield ranks
    ranks.end()


def run(ranks: Ranks, stage: int, job: Any = train, options: Any = None, **arguments: Any) -> list[Any]:
    """A job on two ranks, with 16 samples an update."""
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **arguments}
    return ranks.run(job, strategy="deepspeed", options={"stage": stage, **(options or {})}, **given)


@pytest.mark.parametrize("stage", STAGES)
def test_float32_curves(zero_ranks: Ranks, tmp_path: Path, stage: int) -> None:
    alone, ends = tmp_path / "single.safetensors", tmp_path / "weights.safetensors"
    expected = train(max_steps=50, per_device_train_batch_size=8, gradient_accumulation_steps=2, export=alone)
    expected_weights = load_file(alone)
    found = run(zero_ranks, stage, max_steps=50, export=ends)
    assert len(found[0]["loss"]) == 50 and expected["loss"][-1] < 0.3 * expected["loss"][0]
    assert found == [found[0]] * 2
    assert found[0]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found[0]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert found[0]["learning_rate"] == expected["learning_rate"]
    weights = load_file(ends)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-5, atol=1e-5)


def train_and_look_at_linear(**options: Any) -> list[bool]:
    """Whether the process's linear function was torch's, between the updates of a run and after it."""
    seen: list[bool] = []

    class Look(Callback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append(nn.functional.linear is torch._C._nn.linear)

    train(callbacks=[Look()], max_steps=2, **options)
    return [*seen, nn.functional.linear is torch._C._nn.linear]


def test_other_runs_of_the_process_keep_torchs_linear_function(zero_ranks: Ranks) -> None:
    assert run(zero_ranks, 3, train_and_look_at_linear) == [[True] * 3] * 2


# Checkpoints.

SAVED_AT = 8  # of 20 updates, in the middle of an epoch


@pytest.fixture(scope="module")
def saved(ranks: dict[int, Ranks], zero_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint after 8 updates by each stage, and by strategies that know nothing of DeepSpeed."""
    outputs = {name: tmp_path_factory.mktemp(name) for name in ("single", "ddp", "fsdp2", *map(str, STAGES))}

    def saving(name: str) -> dict[str, Any]:
        return {"save_strategy": "steps", "save_steps": SAVED_AT, "output_dir": str(outputs[name])}

    train(per_device_train_batch_size=8, gradient_accumulation_steps=2, **saving("single"))
    for name in ("ddp", "fsdp2"):
        ranks[2].run(train, strategy=name, per_device_train_batch_size=4, gradient_accumulation_steps=2, **saving(name))
    for stage in STAGES:
        run(zero_ranks, stage, export=outputs[str(stage)] / "end.safetensors", **saving(str(stage)))
    return {name: output / f"checkpoint-{SAVED_AT}" for name, output in outputs.items()}


def check_continued(found: dict[str, list[Any]]) -> None:
    """A continued run is one device's, to the end."""
    expected, _ = single()
    assert len(found["loss"]) == 20
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert found["learning_rate"] == expected["learning_rate"]


@pytest.mark.parametrize("stage", STAGES)
def test_zero_continues_any_checkpoint(zero_ranks: Ranks, saved: dict[str, Path], tmp_path: Path, stage: int) -> None:
    sources = ["single", "ddp", "fsdp2", "0", "2", "3"] if stage == 3 else ["fsdp2", "3", str(stage)]
    paths = {name: saved[name] for name in sources}
    results = run(zero_ranks, stage, continue_each, paths=paths, directory=tmp_path)
    assert results[0] == results[1]
    for found in results[0].values():
        check_continued(found)
    # Its own, at the same stage and world: bit for bit the run that wasn't interrupted.
    whole = load_file(saved[str(stage)].parent / "end.safetensors")
    continued = load_file(tmp_path / f"{stage}.safetensors")
    for name, weight in whole.items():
        assert torch.equal(continued[name], weight), name


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_others_continue_zero(ranks: dict[int, Ranks], saved: dict[str, Path], tmp_path: Path, strategy: str) -> None:
    paths = {name: path for name, path in saved.items() if name.isdigit()}
    given = {"paths": paths, "directory": tmp_path, "strategy": strategy}
    if strategy == "single":
        results = [continue_each(per_device_train_batch_size=8, gradient_accumulation_steps=2, **given)]
    else:
        results = ranks[2].run(continue_each, per_device_train_batch_size=4, gradient_accumulation_steps=2, **given)
    for found in results[0].values():
        check_continued(found)


def test_files_have_one_format(saved: dict[str, Path]) -> None:
    expected = contents(saved["single"])
    for name in map(str, STAGES):
        found = contents(saved[name])
        assert found.keys() == expected.keys(), name
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
        assert {file.suffix for file in saved[name].rglob("*") if file.is_file()} == {".json", ".jsonl", ".safetensors"}
        sizes = [sum(f.stat().st_size for f in saved[name].glob(f"*/shard-0000{rank}-*")) for rank in (1, 2)]
        assert name == "0" or max(sizes) < 2 * min(sizes)  # each rank wrote its rows


# What a run may ask for.


def bf16_alone() -> dict[str, Any]:
    return train(precision="bf16-mixed", max_steps=50, per_device_train_batch_size=8, gradient_accumulation_steps=2)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_curves(zero_ranks: Ranks, stage: int) -> None:
    expected = bf16_alone()
    found = run(zero_ranks, stage, precision="bf16-mixed", max_steps=50)[0]
    assert len(found["loss"]) == 50
    assert found["loss"] == pytest.approx(expected["loss"], rel=2e-2)
    assert found["loss"][0] != pytest.approx(single()[0]["loss"][0], rel=1e-5)  # it was bfloat16
    assert found["grad_norm"][0] == pytest.approx(expected["grad_norm"][0], rel=2e-2)


@pytest.mark.parametrize(
    ("stage", "options"),
    [(2, {"offload_optimizer": True}), (3, {"offload_optimizer": True, "offload_parameters": True})],
    ids=str,
)
def test_offload(zero_ranks: Ranks, saved: dict[str, Path], stage: int, options: dict[str, Any]) -> None:
    check_continued(run(zero_ranks, stage, options=options, resume=saved["single"])[0])


class Poison(Callback):
    """One rank's gradients of one update aren't finite."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if os.environ["RANK"] == "1":
            bias = dict(context["fit"].module.named_parameters())["head.bias"]
            if state.global_step == 2:
                self.hook = bias.register_hook(lambda gradient: gradient * float("nan"))
            elif state.global_step == 3:
                self.hook.remove()


def poisoned(**arguments: Any) -> tuple[int, list[float], list[float], dict[str, float]]:
    """Skipped updates, learning rates, norms, and an evaluation at the end."""
    fit = make_fit(Tagger(), token_rows(), token_rows(37), callbacks=[Poison()], max_steps=6, **arguments)
    fit.train()
    logs = curves(fit)
    return fit.state.skipped_updates, logs["learning_rate"], logs["grad_norm"], fit.evaluate()


@pytest.mark.parametrize("stage", [2, 3])
def test_skipped_updates_leave_the_schedule(zero_ranks: Ranks, stage: int) -> None:
    results = run(zero_ranks, stage, poisoned, logging_nan_inf_filter=False)
    assert results[0] == results[1]
    skipped, rates, norms, metrics = results[0]
    assert skipped == 1
    assert rates == pytest.approx([0.003 * (1 - done / 6) for done in (0, 1, 2, 2, 3, 4)])
    assert [math.isfinite(norm) for norm in norms] == [True, True, False, True, True, True]
    assert math.isfinite(metrics["eval_loss"])


def trained_twice(**arguments: Any) -> list[bool]:
    """Whether a second training, from the first one's checkpoint, does the same; with DeepSpeed told of no clipping."""
    fit = make_fit(Tagger(), token_rows(), max_steps=4, save_steps=2, **{**arguments, "save_strategy": "steps"})
    fit.train()
    first = curves(fit)["loss"]
    fit.train(resume_from_checkpoint=Path(fit.args.output_dir) / "checkpoint-2")
    again = curves(fit)["loss"]
    fit.train(trial={"max_grad_norm": 0.0})
    return [first == again, "grad_norm" in fit.state.log_history[0]]


@pytest.mark.parametrize("stage", [1, 3])
def test_trains_again(zero_ranks: Ranks, tmp_path: Path, stage: int) -> None:
    assert run(zero_ranks, stage, trained_twice, output_dir=str(tmp_path)) == [[True, False]] * 2


@pytest.mark.parametrize(
    ("stage", "module"), [(0, Hungry), (2, Hungry), (3, Hungry), (2, HungryInBackward), (3, HungryInBackward)]
)
def test_all_ranks_begin_again(zero_ranks: Ranks, stage: int, module: type[Tagger]) -> None:
    options: dict[str, Any] = {"strategy": "deepspeed", "options": {"stage": stage}, "module": module}
    asked = zero_ranks.run(run_hungry, batch=4, accumulation=2, **options)
    found = zero_ranks.run(run_hungry, batch=8, auto_find_batch_size=True, seconds=60.0, **options)
    assert [result["sizes"] for result in found] == [(4, 2, 4)] * 2
    assert len(found[0]["curves"]["loss"]) == 5
    for one, other in zip(found, asked, strict=True):
        assert one["curves"] == other["curves"]
        assert one["calls"] == other["calls"]


def searched(**arguments: Any) -> list[list[float]]:
    """The losses of two trials with one module, which is put back between them, and those of the better one again."""
    torch.manual_seed(0)
    more = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    fit = make_fit(Tagger(), token_rows(), token_rows(37), **{**arguments, **more})
    found = fit.hyperparameter_search(lambda trial: {"learning_rate": 0.01 / (1 + trial.number)}, n_trials=2)
    fit.train()
    return [*(list(trial.values) for trial in found.trials), curves(fit)["loss"]]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_search_puts_the_module_back(zero_ranks: Ranks, tmp_path: Path, stage: int) -> None:
    batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    expected = searched(output_dir=str(tmp_path / "single"), **batch)
    results = run(zero_ranks, stage, searched, output_dir=str(tmp_path / "zero"))
    assert results[0] == results[1]
    assert expected[0] != expected[1] and len(expected[2]) == 3
    for found, wanted in zip(results[0], expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


def operations(run: Callable[[], Any]) -> Counter[str]:
    """How often each collective, and step of an optimizer, is called."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    counts = {event.key: event.count for event in profiled.key_averages()}
    return Counter({name: n for name, n in counts.items() if name.startswith(("c10d::", "aten::_fused_adamw_"))})


def in_an_update(stage: int) -> list[dict[str, int]]:
    """What Fit calls in an update, and what a hand-written loop does with the same groups and clipping."""
    import deepspeed

    rows, rank = token_rows(), int(os.environ["RANK"])
    batches = [default_collate(rows[start : start + 4]) for start in range(4 * rank, 80, 8)]
    options = {"strategy": "deepspeed", "options": {"stage": stage}, "logging_steps": 100}
    fit = make_fit(Tagger(), rows, per_device_train_batch_size=4, **options)
    fit.train(trial={"max_steps": 1})  # a first run also broadcasts the module
    module = Tagger()
    optimizer = module.configure_optimizer(fit.args)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": fit.args.max_grad_norm,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]

    def by_hand(updates: int) -> None:
        for batch in batches[:updates]:
            engine.backward(module.loss(engine(batch["tokens"]), batch))
            engine.step()

    by_hand(1)
    found = []
    for train_for in (lambda updates: fit.train(trial={"max_steps": updates}), by_hand):
        more, few = (operations(partial(train_for, updates)) for updates in (6, 2))
        found.append({name: count / 4 for name, count in (more - few).items()})
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [0, 3])
def test_an_update_costs_what_a_hand_written_one_does(zero_ranks: Ranks, stage: int) -> None:
    ours, by_hand = zero_ranks.run(in_an_update, stage=stage)[0]
    assert by_hand["aten::_fused_adamw_"] == 3  # one for each group
    # At stage 0 the engine's own clipping sums norms that are whole anyway. Two ranks tell one another their counts.
    reduced = by_hand["c10d::allreduce_"] - (stage == 0)
    assert ours == {**by_hand, "c10d::allreduce_": reduced, "c10d::send": 1, "c10d::recv_": 1}


class InUnits(Tagger):
    """Compiled, and checkpointed, block by block."""

    def shard_units(self) -> list[nn.Module]:
        return list(self.blocks)


def in_blocks(**arguments: Any) -> tuple[list[float], int, int]:
    """Losses, how often a block's forward ran in Python, and how many graphs were compiled."""
    import torch._dynamo

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    module, calls = InUnits(), []
    module.blocks[0].up.register_forward_hook(lambda *_: calls.append(1) if not torch.compiler.is_compiling() else None)
    fit = make_fit(module, token_rows(), max_steps=3, **arguments)
    fit.train()
    return curves(fit)["loss"], len(calls), torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("stage", [2, 3])
def test_blocks_compiled_and_checkpointed(zero_ranks: Ranks, stage: int) -> None:
    torch.manual_seed(0)
    expected, calls, _ = in_blocks(per_device_train_batch_size=8, gradient_accumulation_steps=2)
    checkpointed = run(zero_ranks, stage, in_blocks, gradient_checkpointing=True)
    compiled = run(zero_ranks, stage, in_blocks, gradient_checkpointing=stage < 3, torch_compile=True)
    assert checkpointed[0] == checkpointed[1] and compiled[0] == compiled[1]
    assert checkpointed[0][0] == pytest.approx(expected, rel=1e-5)
    assert compiled[0][0] == pytest.approx(expected, rel=1e-5)
    assert calls == 6 and checkpointed[0][1] == 12  # backward computes each again
    assert compiled[0][2] > 0


def alone(**arguments: Any) -> list[float]:
    """Losses in a process that no launcher started, and which may start another world afterwards."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    fit = make_fit(InUnits(), token_rows(), max_steps=4, per_device_train_batch_size=16, **arguments)
    fit.train()
    fit.strategy.tear_down()
    assert not {"RANK", "WORLD_SIZE"} & os.environ.keys()
    return curves(fit)["loss"]


def test_one_process_without_a_launcher(tmp_path: Path) -> None:
    one = Ranks(1)
    expected = one.run(alone, strategy="single")[0]
    found = [
        one.run(alone, strategy="deepspeed", options={"stage": s}, gradient_checkpointing=s != 3, torch_compile=True)[0]
        for s in (0, 3, 1)
    ]
    one.end()
    for losses in found:
        assert losses == pytest.approx(expected, rel=1e-6)


# The config.


class Plain(Tagger):
    """With Fit's own optimizer."""

    configure_optimizer = TrainModule.configure_optimizer


USERS: dict[str, Any] = {  # as the documents of transformers have it
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def error_of(config: Any, stage: int | None = None, **arguments: Any) -> str:
    """What a run with this config ends with."""
    try:
        train(module=Plain, strategy="deepspeed", options={"config": config, "stage": stage}, **arguments)
    except (ValueError, TypeError) as error:
        return str(error)
    return "nothing was refused"


def test_a_users_config(zero_ranks: Ranks, tmp_path: Path) -> None:
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(USERS))
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "warmup_steps": 3}
    expected = train(module=Plain, **{**arguments, "per_device_train_batch_size": 8})
    options = {"config": str(file)}
    jsonl = {"loggers": ("jsonl",), "output_dir": str(tmp_path)}
    found = zero_ranks.run(train, module=Plain, strategy="deepspeed", options=options, **arguments, **jsonl)[0]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["learning_rate"] == expected["learning_rate"]
    logged = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["configuration"]
    assert logged["train_batch_size"] == 16
    assert logged["train_micro_batch_size_per_gpu"] == 4
    assert logged["gradient_accumulation_steps"] == 2
    assert logged["gradient_clipping"] == 0.5
    assert logged["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    assert logged["optimizer"]["params"]["lr"] == 0.01
    assert logged["scheduler"]["params"]["total_num_steps"] == 20
    assert '"auto"' not in json.dumps(logged)


def test_contradictions_are_listed_at_once(zero_ranks: Ranks) -> None:
    config = json.loads(json.dumps(USERS))
    config |= {"train_batch_size": 64, "gradient_clipping": 1.0, "bf16": {"enabled": True}, "gradient_cliping": 1}
    config["optimizer"]["params"]["lr"] = 0.5
    config["scheduler"]["type"] = "WarmupCosineLR"
    config["zero_optimization"] |= {"reduce_buckets": 1, "stage3_module_granularity_threshold": "auto"}
    config["tensor_parallel"] = {"autotp_size": 2}
    error = zero_ranks.run(error_of, config=config, per_device_train_batch_size=4)[0]
    for part in (
        "train_batch_size=64 in the config, but the run has 8 (per_device_train_batch_size=4 x",
        "gradient_clipping=1.0 in the config, but the run has 0.5 (max_grad_norm)",
        "optimizer.params.lr=0.5 in the config, but the run has 0.01 (learning_rate)",
        "scheduler.type='WarmupCosineLR' is lr_scheduler_type='cosine', but the run has 'linear'",
        "bf16.enabled=true: the number format is Fit's precision",
        "gradient_cliping: DeepSpeed would pass over it. Did you mean 'gradient_clipping'?",
        "zero_optimization.reduce_buckets is no such option",
        "zero_optimization.stage3_module_granularity_threshold='auto': nothing in a run says",
        "tensor_parallel: write strategy=FSDP2(tensor_parallel=...)",
    ):
        assert part in error
    assert len(error.splitlines()) == 10


@pytest.mark.parametrize(
    ("config", "arguments", "says"),
    [
        ({"bf16": {"enabled": True}}, {"stage": 0}, "trains wrongly at stage 0"),
        ({"fp16": {"enabled": True}}, {"stage": 0}, "precision='bf16-mixed', or take stage 1"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, {}, "never trains under ZeRO"),
        ({"torch_autocast": {"enabled": True}}, {}, "or precision='bf16-mixed'"),
        ({"zero_optimization": {"stage": 1}}, {"stage": 3}, "stage=1, and the strategy was asked for stage 3"),
        (
            {"zero_optimization": {"stage": 3}},
            {"gradient_checkpointing": True, "torch_compile": True},
            "would compile nothing at stage 3",
        ),
        ({"zero_optimization": {"stage": 4}}, {}, "write 0, 1, 2, 3 or 'auto'"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, {}, "needs stage 3 or more"),
        ({"optimizer": {"type": "OneBitAdam"}}, {}, "choose by Fit's optim="),
        (None, {"precision": "16-mixed"}, "Use precision='bf16-mixed', or '32-true'"),
        (None, {"precision": "bf16-true"}, "precision='bf16-true'"),
        (None, {"precision": "64-true"}, "precision='64-true'"),
        (None, {"optim": "schedule_free_adamw"}, "Use optim='adamw', or 'sgd'"),
        (None, {"optim": "adamw_8bit"}, "its moments, and the scales of 8-bit ones, belong to whole weights"),
        (None, {"optim": "lomo", "max_grad_norm": 0.0}, "LOMO"),
        ("nowhere.json", {}, "there is no such file"),
        (3, {}, "takes a path or a mapping"),
    ],
    ids=str,
)
def test_refusals(zero_ranks: Ranks, config: Any, arguments: dict[str, Any], says: str) -> None:
    errors = zero_ranks.run(error_of, config=config, **arguments)
    assert says.lower() in errors[0].lower()
    assert errors[0] == errors[1]


def test_options_and_formats_of_others_are_refused() -> None:
    with pytest.raises(TypeError, match="has no option 'reshard_after_forward'"):
        DeepSpeed(reshard_after_forward=True)
    with pytest.raises(ValueError, match="takes 0, 1, 2 or 3"):
        DeepSpeed(stage=4)
    with pytest.raises(ValueError, match="precision='fp8'"):
        DeepSpeed().check_precision(FP8(emulate=True))


def test_without_the_package(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["deepspeed"] = None
from stratagem import Fit
from torch import nn
from training import Tagger, token_rows
Fit(Tagger(), token_rows(), strategy="deepspeed", devices=1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert "pip install --no-build-isolation 'stratagem[deepspeed]'" in done.stderr.splitlines()[-1]


def test_the_example_continues_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parents[2] / "examples" / "deepspeed_offload.py")]
    command += ["--max_steps=4", "--per_device_train_batch_size=2", "--build.context=32", "--build.layers=1"]
    command += [f"--output_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stderr  # torch's, of names that DeepSpeed calls
    continued = subprocess.run(
        [*command, "--strategy=ddp", "--resume"], capture_output=True, text=True, timeout=120
    )  # the run is at its end: only its weights come back, into the same evaluation
    assert "bits per byte" in done.stdout
    assert continued.stdout.splitlines()[-2:] == done.stdout.splitlines()[-2:]
    assert "WARNING" not in done.stdout


def test_parity(tmp_path: Path) -> None:
    names = ["single", "deepspeed_stage_3"]
    recipe = Recipe(f"{Path(__file__).parent / 'test_parity.py'}:right", updates=4)
    rows = compare_strategies(recipe, [Case.named(name, 2) for name in names], tolerance=1e-5)
    assert [(row.case.name, row.is_right, row.failure) for row in rows] == [(name, True, None) for name in names]


def evaluated(**arguments: Any) -> tuple[list[float], list[float], list[float]]:
    """Training losses, evaluations on the way, and the best weights' evaluation; saved in the background."""
    more = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3, "max_steps": 9}
    more |= {"load_best_model_at_end": True, "async_save": True, "save_only_trainable": True}
    torch.manual_seed(0)
    fit = make_fit(Tagger(), token_rows(), token_rows(37), **{**arguments, **more})
    fit.train()
    evaluations = [log["eval_loss"] for log in fit.state.log_history if "eval_loss" in log]
    frozen = make_fit(Tagger(), None, token_rows(37), strategy=arguments["strategy"], max_steps=1)
    return curves(fit)["loss"], evaluations, [fit.evaluate()["eval_loss"], float("eval_loss" in frozen.evaluate())]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_evaluation_on_the_way(zero_ranks: Ranks, tmp_path: Path, stage: int) -> None:
    batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    expected = evaluated(strategy="single", output_dir=str(tmp_path / "single"), **batch)
    found = run(zero_ranks, stage, evaluated, output_dir=str(tmp_path / "zero"))
    assert found[0] == found[1]
    for one, other in zip(found[0], expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("module", [OnlyHead, OnlyBias])
@pytest.mark.parametrize("stage", STAGES)
def test_mostly_frozen(zero_ranks: Ranks, tmp_path: Path, stage: int, module: type[TrainModule]) -> None:
    expected, weights = single(module)
    found = run(zero_ranks, stage, module=module, export=tmp_path / "weights.safetensors")[0]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    for name, weight in load_file(tmp_path / "weights.safetensors").items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-5)
