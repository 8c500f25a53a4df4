"""Options of the specification under every strategy: recomputed or compiled blocks, noise, tokens, optimizers."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from ranks import Ranks
from safetensors.torch import load_file
from stratagem import Callback, TrainModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from training import PLACEMENTS, Tagger, curves, everywhere, make_fit, share_of_16, token_rows, train

pytestmark = pytest.mark.slow


# Activation checkpointing.


class Saved(Callback):
    """Bytes that autograd keeps for the first backward, and how often the first block is computed in an update."""

    def __init__(self) -> None:
        self.bytes = 0
        self.forwards: list[int] = []

    def on_train_begin(self, *context: Any, fit: Any, **_: Any) -> None:
        fit.module.blocks[0].norm.register_forward_hook(self.count)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.forwards.append(0)
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.save, lambda tensor: tensor)
        self.hooks.__enter__()

    def on_pre_optimizer_step(self, *context: Any, **_: Any) -> None:
        self.hooks.__exit__(None, None, None)

    def count(self, *_: Any) -> None:
        self.forwards[-1] += 1

    def save(self, tensor: Tensor) -> Tensor:
        if len(self.forwards) == 1:
            self.bytes += tensor.nbytes
        return tensor


def train_recomputing(recompute: bool, **arguments: Any) -> dict[str, Any]:
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    saved = Saved()
    arguments = {"max_steps": 6, "gradient_checkpointing": recompute, "callbacks": [saved], **arguments}
    fit = make_fit(Tagger(4), token_rows(), gradient_accumulation_steps=2, **arguments)
    fit.train()
    return {**curves(fit), "bytes": saved.bytes, "forwards": saved.forwards}


@everywhere
def test_recomputed_blocks(ranks: dict[int, Ranks], world: int, strategy: str, options: dict[str, Any]) -> None:
    expected = train_recomputing(False, per_device_train_batch_size=8)
    sizes = {"per_device_train_batch_size": share_of_16(strategy, world, options) // 2}
    plain, recomputed = (
        ranks[world].run(train_recomputing, recompute=recompute, strategy=strategy, options=options, **sizes)
        for recompute in (False, True)
    )
    for rank in range(world):
        assert recomputed[rank]["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert recomputed[rank]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        # Two micro-batches, and each block once more in its backward.
        assert plain[rank]["forwards"] == [2] * 6
        assert recomputed[rank]["forwards"] == [4] * 6
        assert recomputed[rank]["bytes"] < 0.5 * plain[rank]["bytes"]


# Compilation. A cold start takes 20 seconds, of which most strategies find the work of the first.


def train_compiled(directory: Path, **arguments: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    saving = {"save_strategy": "steps", "save_steps": 4, "output_dir": str(directory), "max_steps": 4}
    fit = make_fit(Tagger(), token_rows(), torch_compile=True, **saving, **arguments)
    fit.train()
    compiled = torch._dynamo.utils.counters["frames"]["ok"]
    return {**curves(fit), "compiled": compiled, "names": sorted(fit.strategy.model_state())}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2", "tp"])
def test_compiled_blocks(ranks: dict[int, Ranks], tmp_path: Path, strategy: str) -> None:
    torch.manual_seed(0)
    names = sorted(set(Tagger().state_dict()) - {"head.weight"})  # tied: under its first name alone
    expected = train(per_device_train_batch_size=16, max_steps=4)
    batch = share_of_16(strategy, 2, {})
    found = ranks[2].run(train_compiled, directory=tmp_path, strategy=strategy, per_device_train_batch_size=batch)
    for result in found:
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert set(result["names"]) - {"head.weight"} == set(names)
        assert result["compiled"] >= 1
        assert len(result["first_step_seconds"]) == 1  # in the first log alone
        assert result["first_step_seconds"][0] > 0
    stored = {name for path in (tmp_path / "checkpoint-4" / "model").iterdir() for name in load_file(path)}
    assert {name.partition("#")[0] for name in stored} == set(names)


def meshes_of_two_runs(**arguments: Any) -> int:
    """How many meshes the weights and inputs of a layer lie on in the forward passes of two runs."""
    found: list[Any] = []

    def note(layer: nn.Linear, inputs: Any, outputs: Any) -> None:
        found.extend(tensor.device_mesh for tensor in (layer.weight, *inputs) if isinstance(tensor, DTensor))

    for _ in range(2):
        fit = make_fit(Tagger(), token_rows(), max_steps=1, per_device_train_batch_size=8, **arguments)
        fit.place()
        fit.module.blocks[0].up.register_forward_hook(note)
        fit.train()
    assert len(found) == 4
    return len({id(mesh) for mesh in found})


def test_runs_of_one_process_share_a_mesh(ranks: dict[int, Ranks]) -> None:
    # DTensor's caches know the equal mesh of an earlier run; inductor fails where it meets both in one graph.
    assert ranks[2].run(meshes_of_two_runs, strategy="tp") == [1, 1]


# NEFTune.


class Failing(Callback):
    """Ends training in its third update."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise RuntimeError("the third update")


def train_with_noise(alpha: float | None, fails: bool = False, **arguments: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    callbacks = [Failing()] if fails else []
    fit = make_fit(Tagger(), token_rows(), neftune_noise_alpha=alpha, max_steps=4, callbacks=callbacks, **arguments)
    try:
        fit.train()
    except RuntimeError as error:
        assert str(error) == "the third update"
    hooks = [name for name, layer in fit.module.named_modules() if layer is fit.module.embed and layer._forward_hooks]
    return {**curves(fit), "hooks": hooks}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_noise_on_the_embeddings_of_the_model_that_is_trained(ranks: dict[int, Ranks], strategy: str) -> None:
    options = {"strategy": strategy, "per_device_train_batch_size": 8}
    plain = ranks[2].run(train_with_noise, alpha=None, **options)[0]
    faint = ranks[2].run(train_with_noise, alpha=1e-7, **options)[0]
    noisy = ranks[2].run(train_with_noise, alpha=5.0, **options)[0]
    assert faint["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert all(abs(a - b) > 1e-3 for a, b in zip(noisy["loss"], plain["loss"], strict=True))
    assert plain["hooks"] == noisy["hooks"] == []
    for result in ranks[2].run(train_with_noise, alpha=5.0, fails=True, **options):
        assert len(result["loss"]) == 2  # the third was never logged
        assert result["hooks"] == []


# Tokens.


class Tokens(Tagger):
    main_input_name = "tokens"
    pad_token_id = 0


def count_tokens(resume: Any = None, **arguments: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    counting = {"include_num_input_tokens_seen": "non_padding", "include_tokens_per_second": True, "logging_steps": 4}
    fit = make_fit(Tokens(), token_rows(48), shuffle=False, **counting, **arguments)
    metrics = fit.train(resume_from_checkpoint=resume).metrics
    logged = [line["num_input_tokens_seen"] for line in fit.state.log_history if "loss" in line]
    return {"seen": fit.state.num_input_tokens_seen, "logged": logged, **metrics}


@pytest.mark.parametrize(("world", "strategy", "options"), [PLACEMENTS[0], PLACEMENTS[3], PLACEMENTS[4]], ids=str)
def test_tokens_are_summed_over_ranks_with_other_samples(
    ranks: dict[int, Ranks], tmp_path: Path, world: int, strategy: str, options: dict[str, Any]
) -> None:
    """48 samples are 3 updates of 16; the checkpoint of the third, saved between two logs, holds what they counted."""
    tokens = [int((row["tokens"] != 0).sum()) for row in token_rows(48)]
    whole, first = sum(tokens), sum(tokens[:16])
    assert whole < 48 * 5  # some are padding
    arguments = {
        "strategy": strategy,
        "options": options,
        "per_device_train_batch_size": share_of_16(strategy, world, options),
        "output_dir": str(tmp_path),
    }
    saving = {"save_strategy": "steps", "save_steps": 3}
    for result in ranks[world].run(count_tokens, max_steps=6, **saving, **arguments):
        assert result["seen"] == 2 * whole
        assert result["logged"] == [whole + first, 2 * whole]
    for result in ranks[world].run(count_tokens, max_steps=6, resume=tmp_path / "checkpoint-3", **arguments):
        assert result["seen"] == 2 * whole
        assert result["logged"] == [whole + first, 2 * whole]
        # The rate is of the three updates that this run made.
        assert result["train_tokens_per_second"] * result["train_runtime"] == pytest.approx(whole)


def warn_of_padding(**arguments: Any) -> list[str]:
    class Untold(Tagger):
        main_input_name = "tokens"

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = make_fit(Untold(), token_rows(8), max_steps=2, include_num_input_tokens_seen="non_padding", **arguments)
        fit.train()
    return [str(warning.message) for warning in caught if "non_padding" in str(warning.message)]


def test_one_rank_says_that_padding_can_not_be_told(ranks: dict[int, Ranks]) -> None:
    assert [len(said) for said in ranks[2].run(warn_of_padding, strategy="ddp")] == [1, 0]


# Optimizers.


class Named(Tagger):
    """The optimizer that the arguments name."""

    configure_optimizer = TrainModule.configure_optimizer


class Own(Tagger):
    """An optimizer of its own that DTensor has no rules for."""

    def configure_optimizer(self, args: Any) -> torch.optim.Optimizer:
        return torch.optim.Rprop(self.parameters(), lr=args.learning_rate)


def train_by_name(**arguments: Any) -> list[float]:
    return train(module=Named, max_steps=5, **arguments)["loss"]


WITH_OPTIMIZERS = [
    *((name, *PLACEMENTS[at]) for name in ("adam", "sgd", "rmsprop", "adagrad") for at in (1, 4)),
    *(("muon", *placement) for placement in PLACEMENTS if placement[1] != "fsdp1"),  # refused there, see below
]


@pytest.mark.parametrize(("optim", "world", "strategy", "options"), WITH_OPTIMIZERS, ids=str)
def test_optimizers_by_name(
    ranks: dict[int, Ranks], optim: str, world: int, strategy: str, options: dict[str, Any]
) -> None:
    arguments = {"optim": optim, "weight_decay": 0.1, "max_grad_norm": 1.0}
    expected = train_by_name(per_device_train_batch_size=16, **arguments)
    batch = share_of_16(strategy, world, options)
    found = ranks[world].run(
        train_by_name, strategy=strategy, options=options, per_device_train_batch_size=batch, **arguments
    )
    # Muon orthogonalizes in bfloat16, whatever it is given.
    assert found[0] == pytest.approx(expected, rel=1e-3 if optim == "muon" else 1e-5)


def refusal(own: bool = False, **arguments: Any) -> str:
    """What this rank raises when the Fit is made or, for an optimizer of the module's own, when it is placed."""
    try:
        fit = make_fit((Own if own else Named)(), token_rows(), **arguments)
        if own:
            fit.train()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    ("strategy", "arguments", "says"),
    [
        ("fsdp2", {"optim": "adafactor"}, ("optim='adafactor'", "strategy='fsdp2'", "DTensor", "optim='adamw'")),
        ("tp", {"optim": "adafactor"}, ("optim='adafactor'", "strategy='tp'", "strategy='ddp'")),
        ("fsdp1", {"optim": "adafactor"}, ("optim='adafactor'", "strategy='fsdp1'", "rows and columns")),
        ("fsdp1", {"optim": "muon"}, ("optim='muon'", "strategy='fsdp1'", "whole matrices", "strategy='fsdp2'")),
        ("fsdp2", {"optim": "sgd", "optim_args": {"fused": True}}, ("optim='sgd'", "leave fused=True out")),
        ("fsdp2", {"own": True}, ("Rprop", "strategy='fsdp2'", "strategy='ddp'")),
    ],
    ids=str,
)
def test_optimizers_that_can_not_work_on_shards(
    ranks: dict[int, Ranks], strategy: str, arguments: dict[str, Any], says: tuple[str, ...]
) -> None:
    for found in ranks[2].run(refusal, strategy=strategy, **arguments):
        assert [part for part in says if part not in found] == [], found


# debug="underflow_overflow".


class Overflowing(Tagger):
    """The second block's product overflows in the third update."""

    updates = 0

    def forward(self, tokens: Tensor) -> Tensor:
        if self.training:
            self.updates += 1
        x = self.embed(tokens)
        x = self.blocks[0](x)
        x = self.blocks[1](x * (1e38 if self.updates == 3 else 1.0))
        return self.head(x)


def debugged(**arguments: Any) -> str:
    torch.manual_seed(0)
    module = Overflowing()
    with torch.no_grad():
        module.blocks[1].norm = nn.Identity()  # which would bring the numbers back
        module.blocks[1].up.weight.fill_(100.0)
    try:
        make_fit(module, token_rows(), debug="underflow_overflow", max_steps=4, **arguments).train()
    except FloatingPointError as error:
        return str(error)
    return "nothing overflowed"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_the_first_layer_that_overflows_is_named(ranks: dict[int, Ranks], strategy: str) -> None:
    for found in ranks[2].run(debugged, strategy=strategy, per_device_train_batch_size=8):
        assert found.startswith("In update 3, the output of "), found
        first = found.splitlines()[0]
        assert "blocks.1" in first and "up" in first and "(Linear)" in first
        assert "blocks.0" in found  # among the last frames before it
