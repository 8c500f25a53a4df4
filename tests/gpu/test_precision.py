"""Number formats on a real GPU. No GPU has run these yet: where there is none they are skipped, which is no proof.

Their bodies have run on a CPU, with the device changed, but for what only a GPU has: float8 units, and waits.
"""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from stratagem import Callback, Fit
from stratagem.precision import FP8, PRECISIONS, FP16Mixed, get_precision
from stratagem.strategies import Single
from tiny import MakeFit, parameters_of

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and this machine has none"),
    pytest.mark.slow,
]

DEVICE = "cuda:0"
UPDATES, CONTEXT = 60, 64
# How far the held-out loss may be from 32-true's after the updates, relatively. On a CPU float64 is off by 2e-8, the
# 16-bit formats by 1e-4 at most, emulated float8 by 5e-5; a GPU adds in other orders, and in no fixed one.
CLOSE = {"64-true": 1e-4, "fp8": 0.01, "mxfp8": 0.01, "fp8-te": 0.01}
SIXTEEN_BITS = 0.002


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(scope="module")
def gpt() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpt", Path(__file__).parents[2] / "examples" / "gpt.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(gpt: ModuleType) -> tuple[Any, Any]:
    """Windows of the standard library, to learn from and held out."""
    return gpt.data(CONTEXT, 64)


@pytest.fixture
def make_gpt_fit(make_fit: MakeFit, gpt: ModuleType, data: tuple[Any, Any], device: str) -> MakeFit:
    """Makes a Fit of a GPT of 100,000 parameters, the same weights each time."""

    def make(precision: Any, **arguments: Any) -> Fit:
        torch.manual_seed(0)
        module = gpt.GPT(CONTEXT, layers=2, width=64, heads=2)
        defaults: dict[str, Any] = {
            "strategy": Single(device=device),
            "max_steps": UPDATES,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 16,
            "learning_rate": 1e-3,
            "max_grad_norm": 1.0,
            "shuffle": True,
            "logging_steps": 1,
        }
        return make_fit(module, *data, precision=precision, **{**defaults, **arguments})

    return make


def losses(fit: Fit) -> list[float]:
    return [log["loss"] for log in fit.state.log_history if "loss" in log]


def held_out(fit: Fit) -> float:
    fit.train()
    return fit.evaluate()["eval_loss"]


def capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability(DEVICE) if torch.cuda.is_available() else (0, 0)


@pytest.mark.parametrize("word", [word for word in PRECISIONS if word != "32-true"])
def test_learns_what_float32_does(make_gpt_fit: MakeFit, word: str) -> None:
    try:
        precision = get_precision(word)
    except ValueError as refusal:  # which units or packages this machine lacks
        pytest.skip(str(refusal))
    expected, found = held_out(make_gpt_fit("32-true")), held_out(make_gpt_fit(precision))
    assert expected < 3.0  # from 5.5: ln 256
    assert found == pytest.approx(expected, rel=CLOSE.get(word, SIXTEEN_BITS))
    assert found != expected


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_compiled_blocks_compute_the_same(make_gpt_fit: MakeFit, precision: str) -> None:
    eager, compiled = (make_gpt_fit(precision, max_steps=10, torch_compile=compile) for compile in (False, True))
    assert held_out(compiled) == pytest.approx(held_out(eager), rel=0.005)


@pytest.mark.skipif(capability() < (8, 9), reason="float8 units came with compute capability 8.9")
@pytest.mark.parametrize("torch_compile", [False, True])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_float8_units_multiply(make_gpt_fit: MakeFit, recipe: str, torch_compile: bool) -> None:
    """Without emulation, and as emulation does."""
    if recipe != "tensorwise" and capability() < (9, 0):
        pytest.skip("products with a scale for each row came with compute capability 9.0")
    found = []
    for emulate in (False, True):
        fit = make_gpt_fit(FP8(recipe, emulate=emulate), max_steps=20, torch_compile=torch_compile)
        fit.train()
        found.append(losses(fit))
        float8 = [layer for layer in fit.module.modules() if type(layer).__name__ == "Float8Linear"]
        assert len(float8) == 12  # six in each of two blocks; the head is left out
        assert {layer.config.emulate for layer in float8} == {emulate}
    assert found[0] == pytest.approx(found[1], rel=0.005)
    assert found[0][-1] < 0.8 * found[0][0]


class Watch(Callback):
    """Notes the weights after each update."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.weights.append(parameters_of(context["fit"].module))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_overflow_skips_the_update_and_halves_the_scale(make_gpt_fit: MakeFit, accumulation: int) -> None:
    watch = Watch()
    fit = make_gpt_fit(
        FP16Mixed(initial_scale=2.0**40),  # far above what float16 gradients can be multiplied by
        callbacks=[watch],
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="linear",
        max_steps=40,
    )
    initial = parameters_of(fit.module)
    fit.train()
    logs = [log for log in fit.state.log_history if "loss" in log]
    skipped = int(fit.state.skipped_updates)
    assert 5 < skipped < 35
    for weights in watch.weights[:skipped]:
        assert all(torch.equal(weights[name].cpu(), initial[name].cpu()) for name in initial)
    assert not torch.equal(watch.weights[skipped]["head.weight"].cpu(), initial["head.weight"].cpu())
    # Halved once an update, however many micro-batches overflowed; then it stays.
    scales = [2.0 ** (40 - min(update, skipped)) for update in range(1, 41)]
    assert [log["loss_scale"] for log in logs] == scales
    # The schedule stood meanwhile: each rate but the last skipped update's is one step further.
    steps = [max(0, update - skipped) for update in range(40)]
    assert [log["learning_rate"] for log in logs] == pytest.approx([1e-3 * (1 - step / 40) for step in steps])
    assert logs[-1]["loss"] < logs[0]["loss"]


class NoWaits(Callback):
    """Makes the host's waits for the device an error, from one update's end to a later one's."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.watched = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.watched += self.first <= state.global_step < self.last

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if state.global_step == self.first:
            torch.cuda.set_sync_debug_mode("error")
        if state.global_step == self.last:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def no_waits() -> Any:
    yield NoWaits(first=5, last=25)
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true"])
def test_nothing_waits_between_two_logs(
    make_gpt_fit: MakeFit, no_waits: NoWaits, precision: str, accumulation: int
) -> None:
    fit = make_gpt_fit(
        precision, callbacks=[no_waits], max_steps=30, logging_steps=30, gradient_accumulation_steps=accumulation
    )
    fit.train()
    assert no_waits.watched == 20


def test_a_wait_would_be_noticed(make_gpt_fit: MakeFit, no_waits: NoWaits) -> None:
    class Reads(Callback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            torch.ones((), device=context["fit"].strategy.device).item()

    options = {"max_steps": 30, "logging_steps": 30, "gradient_accumulation_steps": 2}
    with pytest.raises(RuntimeError, match="synchroniz"):
        make_gpt_fit("32-true", callbacks=[no_waits, Reads()], **options).train()


@pytest.mark.parametrize("first", ["32-true", "bf16-true", "16-mixed"])
def test_any_precision_goes_on_from_any(make_gpt_fit: MakeFit, tmp_path: Path, first: str) -> None:
    saving = {"save_strategy": "steps", "save_steps": 10, "max_steps": 20}
    whole = make_gpt_fit(first, **saving)
    whole.train()
    for second in ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true"):
        resumed = make_gpt_fit(second, max_steps=20)
        resumed.train(resume_from_checkpoint=tmp_path / "output" / "checkpoint-10")
        assert losses(resumed)[:10] == losses(whole)[:10]
        # Not to the bit even in the same precision: a GPU adds gradients in no fixed order.
        assert losses(resumed) == pytest.approx(losses(whole), rel=0.005)
