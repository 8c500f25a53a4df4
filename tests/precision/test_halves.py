"""True halves and 64-true: dtypes, updates that bfloat16 would lose, moments that float16 would, and resuming."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stratagem import Callback, TrainModule
from stratagem.precision import BF16True, Double, FP16True, get_precision
from stratagem.precision.half import LostUpdates
from stratagem.precision.master_weights import MASTER_WEIGHT
from stratagem.strategies.ddp import DDP
from stratagem.strategies.matrix import MATRIX
from tiny import OLD_TORCH, Dropping, MakeFit, Regressor, logs_of, masters, regression_rows
from torch import Tensor, nn

TRUE = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
HALVES = ("bf16-true", "16-true")


class Adaptive(Regressor):
    """Under fused AdamW, the default optimizer, which takes no mixture of dtypes."""

    configure_optimizer = TrainModule.configure_optimizer  # type: ignore[assignment]


class Watching(Adaptive):
    """Notes the dtypes of what flows through it, and the default one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rotary", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("statistic", torch.ones(2))
        self.seen: dict[str, torch.dtype] = {}

    def build(self) -> None:
        self.late = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.hidden(x))
        self.seen |= {"input": x.dtype, "hidden": hidden.dtype, "default": torch.get_default_dtype()}
        return self.late(self.head(hidden))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        self.seen |= {"outputs": outputs.dtype, "labels": batch["y"].dtype}
        return nn.functional.mse_loss(outputs, batch["y"].to(outputs.dtype))


class Gradients(Callback):
    """The dtypes of gradients when the optimizer is about to step."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()

    def on_pre_optimizer_step(self, *args: object, fit: Any, **context: object) -> None:
        self.dtypes |= {p.grad.dtype for p in fit.module.parameters() if p.grad is not None}


@masters
@pytest.mark.parametrize("precision", TRUE)
def test_what_is_computed_in_which_dtype(make_fit: MakeFit, precision: str) -> None:
    module, gradients = Watching(), Gradients()
    rows = regression_rows(4)
    fit = make_fit(module, rows, rows, precision=precision, callbacks=[gradients], max_steps=2)
    fit.train()
    dtype, stepped = TRUE[precision], torch.float64 if precision == "64-true" else torch.float32
    flowing = {"input": dtype, "hidden": dtype, "outputs": stepped, "labels": torch.float32, "default": torch.float32}
    assert module.seen == flowing
    module.seen.clear()
    fit.evaluate()
    assert module.seen == flowing
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module.statistic.dtype == dtype
    assert module.rotary.dtype == torch.complex64
    assert gradients.dtypes == {stepped}
    assert {state["exp_avg"].dtype for state in fit.optimizer.state.values()} == {stepped}
    assert torch.get_default_dtype() == torch.float32


class Weight(TrainModule):
    """One weight of 1 whose gradient is ``gradient`` in every update."""

    gradient = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.net.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return outputs.mean() * self.gradient


def moved(make_fit: MakeFit, module: Weight, precision: Any, **arguments: Any) -> float:
    options = {"learning_rate": 1e-3, "weight_decay": 0.0, "max_steps": 100, **arguments}
    make_fit(module, [{"x": torch.ones(1)}], precision=precision, num_train_epochs=100, **options).train()
    return 1.0 - module.net.weight.item()


@masters
def test_updates_that_bfloat16_would_lose(make_fit: MakeFit) -> None:
    with pytest.warns(
        LostUpdates, match=r"smaller than 1/256 of its weight is rounded away.*'bf16-true' keeps float32"
    ):
        assert moved(make_fit, Weight(), BF16True(master_weights=False)) == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error", LostUpdates)
        # 100 steps of 1e-3, rounded once to 8 bits.
        assert moved(make_fit, Weight(), "bf16-true") == pytest.approx(0.1, abs=2**-9)


@masters
def test_squares_that_float16_would_lose(make_fit: MakeFit) -> None:
    module = Weight()
    module.gradient = 1e-5  # its square is 1e-10, and float16's smallest number 6e-8
    assert moved(make_fit, module, "16-true") == pytest.approx(0.1, abs=2**-10)


@masters
def test_gradients_below_float16_survive_unscaling(make_fit: MakeFit) -> None:
    class Faint(Weight):
        gradient = 2.0**-26  # times the scale a number of float16, by itself none

        def configure_optimizer(self, args: object) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=2.0**24)

    for scale, distance in ((2.0**16, 0.25), (1.0, 0.0)):
        assert moved(make_fit, Faint(), FP16True(initial_scale=scale), max_steps=1) == distance


@masters
@pytest.mark.parametrize("precision", [BF16True(), FP16True(initial_scale=1.0), BF16True(master_weights=False)])
@pytest.mark.filterwarnings("ignore::stratagem.precision.half.LostUpdates")
def test_the_clipped_norm_is_wider_than_16_bits(make_fit: MakeFit, precision: Any) -> None:
    class Long(Weight):
        """257 gradients of 1: their norm is 16.03, which bfloat16 doesn't hold; the sum of squares of 300 is over
        float16's largest number.
        """

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(257, 1, bias=False)

    rows = [{"x": torch.ones(257)}]
    module = Long()
    module.gradient = 512.0
    fit = make_fit(module, rows, precision=precision, max_grad_norm=1.0, max_steps=1)
    fit.train()
    assert logs_of(fit)[0]["grad_norm"] == pytest.approx(512 * 257**0.5, rel=1e-6)


# Optimizers.


@masters
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon", "adafactor", "lion"])
def test_every_optimizer_steps_on_master_weights(make_fit: MakeFit, optimizer: str) -> None:
    finals = []
    for precision in ("32-true", "bf16-true"):
        torch.manual_seed(1)
        module = Dropping()
        arguments = {"optim": optimizer, "precision": precision, "max_steps": 20, "learning_rate": 1e-3}
        fit = make_fit(module.eval(), regression_rows(8), **arguments)
        fit.train()
        finals.append(logs_of(fit)[-1]["loss"])
    for parameter in module.parameters():
        entries = fit.optimizer.state[parameter]
        assert torch.equal(entries[MASTER_WEIGHT].bfloat16(), parameter)
        assert {v.dtype for v in entries.values() if isinstance(v, Tensor)} == {torch.float32}
    assert finals[1] == pytest.approx(finals[0], rel=0.05)
    assert fit.optimizer.param_groups[0]["params"][0] is next(module.parameters())


@masters
@pytest.mark.parametrize("optimizer", ["lomo", "adalomo", "schedule_free_adamw"])
def test_optimizers_that_move_parameters_elsewhere_are_refused(make_fit: MakeFit, optimizer: str) -> None:
    with pytest.raises(ValueError, match=rf"optim='{optimizer}' moves parameters outside of step.*'bf16-mixed'"):
        make_fit(Regressor(), regression_rows(4), optim=optimizer, precision="bf16-true")


@masters
def test_a_module_may_go_on_in_another_precision(make_fit: MakeFit) -> None:
    module, seen = Watching(), []
    for precision in ("bf16-true", "32-true", "64-true", "bf16-mixed"):
        make_fit(module, regression_rows(4), precision=precision, max_steps=1).train()
        seen.append(module.seen["input"])
    assert seen == [torch.bfloat16, torch.float32, torch.float64, torch.float32]


def test_compressing_16_bit_gradients_is_refused(make_fit: MakeFit) -> None:
    with pytest.raises(ValueError, match=r"compress_gradients='fp16'.*no use with precision='bf16-true'.*Leave it out"):
        make_fit(Regressor(), strategy=DDP(compress_gradients="fp16"), precision="bf16-true")


# Checkpoints.

TRAINING = {"max_steps": 8, "logging_steps": 1, "learning_rate": 0.01, "max_grad_norm": 1.0}


def losses(make_fit: MakeFit, precision: str, resume: Path | None = None, **arguments: Any) -> list[float]:
    torch.manual_seed(3)
    fit = make_fit(Adaptive(), regression_rows(32), precision=precision, **TRAINING, **arguments)
    fit.train(resume_from_checkpoint=resume)
    return [line["loss"] for line in logs_of(fit)]


@masters
@pytest.mark.parametrize("precision", ["32-true", *TRUE])
def test_resuming_in_any_precision(make_fit: MakeFit, tmp_path: Path, precision: str) -> None:
    whole = losses(make_fit, precision, save_strategy="steps", save_steps=4)
    for other in ("32-true", *TRUE, "16-mixed"):
        resumed = losses(make_fit, other, tmp_path / "output" / "checkpoint-4")
        if other == precision:
            assert resumed == whole  # to the bit
        else:
            assert resumed == pytest.approx(whole, rel=0.03)


@masters
@pytest.mark.parametrize("precision", HALVES)
def test_a_checkpoint_holds_the_master_weights_in_the_parameters_place(
    make_fit: MakeFit, tmp_path: Path, precision: str
) -> None:
    torch.manual_seed(3)
    module = Adaptive()
    fit = make_fit(module, regression_rows(32), precision=precision, save_strategy="steps", save_steps=4, **TRAINING)
    fit.train()
    (file,) = (tmp_path / "output" / "checkpoint-8" / "model").glob("*.safetensors")
    saved = load_file(file)
    assert saved.keys() == module.state_dict().keys()
    for name, parameter in module.named_parameters():
        assert saved[name].dtype == torch.float32
        assert torch.equal(saved[name], fit.optimizer.state[parameter][MASTER_WEIGHT])
        assert torch.equal(saved[name].to(parameter.dtype), parameter)
    moments = [load_file(f) for f in (tmp_path / "output" / "checkpoint-8" / "optimizer").glob("*.safetensors")]
    assert not any(MASTER_WEIGHT in name for part in moments for name in part)
    weights = load_file(fit.export(tmp_path / "weights.safetensors"))
    assert {w.dtype for w in weights.values()} == {TRUE[precision]}


# Names, and the table.


@pytest.mark.parametrize(
    ("word", "kind"),
    [("64-true", Double), ("64", Double), ("fp64", Double), ("bf16-true", BF16True), ("16-true", FP16True)],
)
def test_names_and_aliases(word: str, kind: type) -> None:
    assert type(get_precision(word)) is kind


def test_a_cell_of_the_table_is_refused_at_construction(make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MATRIX, "64-true", {"single": "a reason. Use precision='32-true'."})  # type: ignore[arg-type]
    says = r"precision='64-true' under strategy='single': a reason\. Use precision='32-true'\."
    with pytest.raises(ValueError, match=says):
        make_fit(Regressor(), precision="64-true")
    make_fit(Regressor(), precision="32-true")


@pytest.mark.skipif(not OLD_TORCH, reason="this torch has what is missing in an older one")
@pytest.mark.parametrize("precision", HALVES)
def test_an_older_torch_is_refused(make_fit: MakeFit, precision: str) -> None:
    with pytest.raises(ValueError, match=rf"'{precision}' keeps float32 gradients.*Install torch 2.10 or newer"):
        make_fit(Regressor(), regression_rows(4), precision=precision)
