"""float8 under every strategy, emulated: it learns, ranks agree, and sizes count as they are on a rank."""

from typing import Any

import pytest
import torch
from ranks import RankFailure, Ranks
from stratagem.precision import FP8
from stratagem.precision.mxfp8 import MXFP8
from torch.distributed.tensor import DTensor
from training import curves, make_fit
from wide import Deep, rows

pytestmark = pytest.mark.slow

PLACEMENTS: list[tuple[int, str, dict[str, Any], FP8]] = [
    (2, "ddp", {}, FP8(emulate=True)),
    (2, "fsdp1", {}, FP8(emulate=True)),
    (2, "fsdp2", {}, FP8(emulate=True)),
    (2, "fsdp2", {}, FP8("rowwise", emulate=True)),
    (2, "fsdp2", {}, FP8(emulate=True, all_gather=True)),
    (2, "tp", {}, FP8(emulate=True)),
    (2, "tp", {}, FP8("rowwise_with_gw_hp", emulate=True)),
    (4, "fsdp2", {"tensor_parallel": 2}, FP8(emulate=True)),
]
everywhere = pytest.mark.parametrize(("world", "strategy", "options", "precision"), PLACEMENTS, ids=str)


def train(*, resume: Any = None, export: Any = None, **arguments: Any) -> dict[str, Any]:
    """A run of 12 updates of 16 samples, what came of it, and how often the scales of shards were computed."""
    import torchao.float8.fsdp_utils as fsdp_utils
    from torchao.float8.float8_linear import Float8Linear

    dynamic = 0
    scaled = fsdp_utils.hp_tensor_to_float8_dynamic

    def counted(*inputs: Any, **options: Any) -> Any:
        nonlocal dynamic
        dynamic += 1
        return scaled(*inputs, **options)

    torch.manual_seed(0)
    defaults = {"max_steps": 12, "shuffle": False, "max_grad_norm": 1.0, "lr_scheduler_type": "constant"}
    fit = make_fit(Deep(), rows(), rows(16), **{**defaults, **arguments})
    fsdp_utils.hp_tensor_to_float8_dynamic = counted
    try:
        fit.train(resume_from_checkpoint=resume)
        trained = dynamic
        evaluated = fit.evaluate()["eval_loss"]
    finally:
        fsdp_utils.hp_tensor_to_float8_dynamic = scaled
    if export is not None:
        fit.export(export)
    norms = []
    for parameter in fit.strategy.named_parameters().values():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        norms.append(float(whole.detach().double().norm()))
    return {
        "curves": curves(fit),
        "evaluated": evaluated,
        "norms": norms,
        "float8": sorted(name for name, layer in fit.module.named_modules() if isinstance(layer, Float8Linear)),
        "names": sorted(fit.strategy.model_state()),
        "dynamic": trained,
        "gathered": sorted(
            name
            for name, parameter in fit.strategy.named_parameters().items()
            if isinstance(parameter, DTensor)
            and isinstance(parameter.to_local(), fsdp_utils.WeightWithDynamicFloat8CastTensor)
        ),
    }


@everywhere
def test_learns_as_float32_does(
    ranks: dict[int, Ranks], world: int, strategy: str, options: dict[str, Any], precision: FP8
) -> None:
    expected = train(per_device_train_batch_size=16)["curves"]["loss"]
    cut = strategy == "tp" or "tensor_parallel" in options
    found = ranks[world].run(
        train,
        strategy=strategy,
        options=options,
        precision=precision,
        per_device_train_batch_size=16 if strategy == "tp" else 8,
        gradient_checkpointing=strategy == "fsdp2",
    )
    first = found[0]
    assert all(other["curves"] == first["curves"] for other in found)
    assert first["curves"]["loss"] != expected
    assert first["curves"]["loss"] == pytest.approx(expected, rel=0.05)
    assert first["curves"]["loss"][-1] < 0.7 * first["curves"]["loss"][0]
    if strategy != "fsdp1":  # whose parameters are pieces, of another size on each rank
        assert all(other["norms"] == first["norms"] for other in found)
    # Half a gate's 16 features are no multiple of 16.
    layers = ("down", "up") if cut else ("down", "gate", "up")
    names = [name.replace("_fsdp_wrapped_module.", "") for name in first["float8"]]
    assert names == [f"blocks.{block}.{layer}" for block in (0, 1) for layer in layers]


def test_weights_are_gathered_in_float8(ranks: dict[int, Ranks]) -> None:
    """Their scales are computed shard by shard before the first step, and by one reduction after each; the second block
    is built late.
    """
    options = {"strategy": "fsdp2", "per_device_train_batch_size": 8, "max_steps": 4}
    first, _ = ranks[2].run(train, precision=FP8(emulate=True, all_gather=True), **options)
    weights = [f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in ("down", "gate", "up")]
    assert first["gathered"] == weights
    # Without the step's precomputed scales there would be as many in each later update.
    assert first["dynamic"] == 2 * len(weights)  # forward's and backward's gather
    plain, _ = ranks[2].run(train, precision=FP8(emulate=True), **options)
    assert (plain["gathered"], plain["dynamic"]) == ([], 0)
    # One scale of the whole weight, as it is computed without all_gather: the same numbers but for bfloat16's rounding.
    assert first["curves"]["loss"] == pytest.approx(plain["curves"]["loss"], rel=0.01)


def test_checkpoints_under_other_formats_and_placements(ranks: dict[int, Ranks], tmp_path: Any) -> None:
    """float8-gathered shards to one process in float32, and back into them."""
    output = str(tmp_path / "output")
    saving = {"output_dir": output, "save_strategy": "steps", "save_steps": 4}
    gathered = {
        "strategy": "fsdp2",
        "precision": FP8(emulate=True, all_gather=True),
        "per_device_train_batch_size": 8,
    }
    whole = train(per_device_train_batch_size=16)
    begun, _ = ranks[2].run(train, max_steps=4, **saving, **gathered)
    assert begun["names"] == whole["names"]
    middle = train(max_steps=8, resume=True, per_device_train_batch_size=16, **saving)
    ended, other = ranks[2].run(train, max_steps=12, resume=True, **saving, **gathered)
    assert middle["curves"]["loss"][:4] == begun["curves"]["loss"]
    assert ended["curves"]["loss"][:8] == middle["curves"]["loss"]
    assert ended["curves"]["loss"] == pytest.approx(whole["curves"]["loss"], rel=0.05)
    assert ended["evaluated"] == pytest.approx(whole["evaluated"], rel=0.05)
    assert ended["curves"] == other["curves"]


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("ddp", {}, r"under strategy='ddp'.*strategy='fsdp2'"),
        ("fsdp1", {}, r"under strategy='fsdp1'.*FSDP1's shards are flat"),
        ("tp", {}, r"under strategy='tp'.*tensor parallelism cuts"),
    ],
)
def test_all_gather_elsewhere(ranks: dict[int, Ranks], strategy: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RankFailure, match=message):
        ranks[2].run(train, strategy=strategy, options=options, precision=FP8(emulate=True, all_gather=True))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "tp"])
def test_mxfp8(ranks: dict[int, Ranks], strategy: str) -> None:
    with pytest.warns(UserWarning, match="prototype"):
        precision = MXFP8(emulate=True)
    expected = train(per_device_train_batch_size=16)["curves"]["loss"]
    first, second = ranks[2].run(
        train, strategy=strategy, precision=precision, per_device_train_batch_size=16 if strategy == "tp" else 8
    )
    assert (first["curves"], first["norms"]) == (second["curves"], second["norms"])
    assert first["curves"]["loss"] == pytest.approx(expected, rel=0.05)
    assert first["curves"]["loss"] != expected


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        ("ddp", FP8(emulate=True)),
        ("fsdp1", FP8(emulate=True)),
        ("fsdp2", FP8(emulate=True)),
        ("fsdp2", FP8(emulate=True, all_gather=True)),
        ("tp", FP8(emulate=True)),
    ],
    ids=str,
)
def test_compiled_blocks(ranks: dict[int, Ranks], strategy: str, precision: FP8) -> None:
    batch_size = 16 if strategy == "tp" else 8
    options = {"strategy": strategy, "precision": precision, "per_device_train_batch_size": batch_size, "max_steps": 4}
    plain, _ = ranks[2].run(train, **options)
    compiled, other = ranks[2].run(train, torch_compile=True, **options)
    assert compiled["curves"]["loss"] == other["curves"]["loss"]
    assert compiled["curves"]["loss"] == pytest.approx(plain["curves"]["loss"], rel=0.01)
