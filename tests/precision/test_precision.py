"""Number formats: the dtypes that forward sees, what stays float32, names, and the loss scale's state."""

import itertools

import pytest
import torch
from stratagem import Callback, TrainModule
from stratagem.precision import PRECISIONS, BF16Mixed, FP16Mixed, Full, Precision, get_precision
from stratagem.precision.registry import class_of
from tiny import Dropping, Float64, MakeFit, Regressor, collate, logs_of, parameters_of, regression_rows
from torch import Tensor, nn


class Watching(Regressor):
    """Notes the dtypes of what flows through it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rotary", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("counter", torch.tensor(3))
        self.register_buffer("statistic", torch.ones(2, dtype=torch.float64))
        self.seen: dict[str, torch.dtype] = {}

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        self.seen |= {"input": x.dtype, "hidden": hidden.dtype}
        return self.head(torch.tanh(hidden))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        loss = nn.functional.mse_loss(outputs, batch["y"])
        self.seen |= {"outputs": outputs.dtype, "loss": loss.dtype}
        return loss


@pytest.mark.parametrize(
    ("precision", "compute"),
    [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)],
)
@pytest.mark.parametrize("built_in", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_computed_in_which_dtype(
    make_fit: MakeFit, precision: str, compute: torch.dtype, built_in: torch.dtype
) -> None:
    module = Watching()
    for layer in (module.hidden, module.head):
        layer.to(built_in)
    rows = regression_rows(4)
    fit = make_fit(module, rows, rows, precision=precision, max_steps=2)
    fit.train()
    assert module.seen == {"input": torch.float32, "hidden": compute, "outputs": compute, "loss": torch.float32}
    module.seen.clear()
    fit.evaluate()
    assert module.seen["hidden"] == compute
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert module.rotary.dtype == torch.complex64
    assert module.counter.dtype == torch.int64
    assert module.statistic.dtype == torch.float32


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_gradients_and_moments_are_float32(make_fit: MakeFit, precision: str) -> None:
    class Looks(Callback):
        dtypes: set[torch.dtype] = set()

        def on_pre_optimizer_step(self, *args: object, **context: object) -> None:
            self.dtypes |= {p.grad.dtype for p in module.parameters() if p.grad is not None}

    module = Dropping()
    fit = make_fit(module, regression_rows(8), precision=precision, callbacks=[Looks()], max_steps=2)
    fit.train()
    assert Looks.dtypes == {torch.float32}
    assert {state["exp_avg"].dtype for state in fit.optimizer.state.values()} == {torch.float32}


def test_32_true_is_plain_float32(make_fit: MakeFit) -> None:
    module, by_hand = Regressor(), Regressor()
    by_hand.load_state_dict(module.state_dict())
    batch = collate(regression_rows(4))
    loss = nn.functional.mse_loss(by_hand(batch["x"]), batch["y"])
    loss.backward()
    make_fit(module, regression_rows(4), max_steps=1).train()
    for name, parameter in by_hand.named_parameters():
        assert parameter.grad is not None
        expected = (parameter - 0.1 * parameter.grad).detach()
        torch.testing.assert_close(module.get_parameter(name).detach(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16-mixed", 0.02), ("16-mixed", 0.002)])
def test_mixed_precision_learns_what_float32_does(make_fit: MakeFit, precision: str, tolerance: float) -> None:
    initial = parameters_of(Regressor())
    losses = []
    for word in ("32-true", precision):
        module = Regressor()
        module.load_state_dict(initial)
        fit = make_fit(module, regression_rows(32), precision=word, num_train_epochs=10)
        fit.train()
        losses.append(logs_of(fit)[-1]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert losses[1] != losses[0]


def test_small_gradients_survive_loss_scaling(make_fit: MakeFit) -> None:
    class Faint(TrainModule):
        """A gradient of 2^-26 through a float16 product: below float16's smallest number, 2^-24."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(1, 1, bias=False)
            nn.init.ones_(self.net.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
            return outputs.float().mean() * 2.0**-26

        def configure_optimizer(self, args: object) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=2.0**24)

    rows = [{"x": torch.ones(1)}]
    for scale, moved in ((2.0**16, 0.25), (1.0, 0.0)):
        module = Faint()
        make_fit(module, rows, precision=FP16Mixed(initial_scale=scale), max_steps=1).train()
        assert 1.0 - module.net.weight.item() == moved


def test_the_clipped_norm_is_that_of_the_unscaled_gradients(make_fit: MakeFit) -> None:
    norms = []
    initial = parameters_of(Regressor())
    for scale in (1.0, 1024.0):
        module = Regressor()
        module.load_state_dict(initial)
        fit = make_fit(
            module,
            regression_rows(8),
            precision=FP16Mixed(initial_scale=scale),
            max_grad_norm=1e-3,
            max_steps=1,
        )
        fit.train()
        norms.append(logs_of(fit)[0]["grad_norm"])
        moved = sum((value - initial[name]).square().sum() for name, value in parameters_of(module).items())
        assert float(moved) ** 0.5 == pytest.approx(0.1 * 1e-3, rel=1e-2)
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
    assert norms[0] > 1e-2


# The loss scale.


def scales(fit: object) -> list[float]:
    return [line["loss_scale"] for line in logs_of(fit)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_scale_grows_and_is_saved(make_fit: MakeFit, accumulation: int) -> None:
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 7,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    rows = regression_rows(12)
    fit = make_fit(Regressor(), rows, precision=FP16Mixed(initial_scale=4.0, growth_interval=3), **options)
    fit.train()
    # It doubles after the third update and after the sixth, whatever their micro-batches.
    assert scales(fit) == [4.0, 4.0, 8.0, 8.0, 8.0, 16.0, 16.0]
    path = fit.args.output_dir + "/checkpoint-4"
    resumed = make_fit(Regressor(), rows, precision=FP16Mixed(initial_scale=512.0, growth_interval=3), **options)
    resumed.train(resume_from_checkpoint=path)
    # One update since the scale grew was counted before the checkpoint.
    assert scales(resumed) == [4.0, 4.0, 8.0, 8.0, 8.0, 16.0, 16.0]


@pytest.mark.parametrize("overflowing", [0, 1, 2])
def test_an_overflow_in_any_micro_batch_skips_the_update(make_fit: MakeFit, overflowing: int) -> None:
    """The scale is halved once, when the update's last micro-batch is done."""
    rows = regression_rows(18)
    rows[6 + 2 * overflowing]["x"] = torch.full((3,), 1e30)  # no float16 number; in the second of three updates
    module, weights = Regressor(), []

    class Watch(Callback):
        def on_step_end(self, *args: object, **context: object) -> None:
            weights.append(parameters_of(module))

    fit = make_fit(
        module,
        rows,
        precision=FP16Mixed(initial_scale=64.0),
        callbacks=[Watch()],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=3,
        logging_steps=1,
    )
    fit.train()
    assert scales(fit) == [64.0, 32.0, 32.0]
    assert fit.state.skipped_updates == 1
    moved = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(weights)]
    assert moved == [False, True]


def test_the_state_of_a_scale_goes_through_json() -> None:
    import json

    device, nothing = torch.device("cpu"), lambda tensor: None
    first, second = FP16Mixed(initial_scale=32.0), FP16Mixed()
    first.set_up(device, nothing)
    second.set_up(device, nothing)
    assert second.log_values() == {"loss_scale": 2.0**16}
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.log_values() == {"loss_scale": 32.0}
    assert second.scale(torch.ones(())).item() == 32.0


# Names.


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("32-true", Full),
        ("fp32", Full),
        ("32", Full),
        ("bf16-mixed", BF16Mixed),
        ("bf16", BF16Mixed),
        ("16-mixed", FP16Mixed),
        ("fp16", FP16Mixed),
        ("16", FP16Mixed),
    ],
)
def test_names_and_aliases(word: str, kind: type[Precision]) -> None:
    assert type(get_precision(word)) is kind


def test_every_name_is_its_classs() -> None:
    for word in PRECISIONS:
        assert class_of(word).name == word


def test_an_instance_is_taken_as_it_is(make_fit: MakeFit) -> None:
    precision = FP16Mixed(growth_interval=5)
    assert get_precision(precision) is precision
    assert make_fit(Regressor(), precision=precision).strategy.precision is precision


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("bf16-mix", r"Unknown precision 'bf16-mix'\. Did you mean 'bf16-mixed'\?"),
        ("float16", r"Unknown precision 'float16'\..*Known: .*16-mixed"),
    ],
)
def test_unknown_names(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_precision(word)


def test_not_a_name_at_all() -> None:
    with pytest.raises(TypeError, match=r"precision takes a name or a Precision instance, e\.g\. precision='32-true'"):
        get_precision(16)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_scale": 0.0}, "initial_scale is a factor on the loss and must be positive. Received: 0.0"),
        ({"growth_interval": 0}, "growth_interval counts updates and must be at least 1. Received: 0"),
    ],
)
def test_options_that_cant_work(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FP16Mixed(**options)  # type: ignore[arg-type]


def test_a_precision_of_ones_own(make_fit: MakeFit) -> None:
    module = Regressor()
    make_fit(module, regression_rows(4, dtype=torch.float64), precision=Float64(), max_steps=1).train()
    assert {p.dtype for p in module.parameters()} == {torch.float64}


def test_the_cast_keeps_ties_and_the_parameters_themselves() -> None:
    module = Dropping().double()
    before = dict(module.named_parameters())
    Full().convert_module(module)
    assert dict(module.named_parameters()) == before
    assert module.third.weight is module.second.weight
    assert module.second.weight.dtype == torch.float32
    assert module.norm.num_batches_tracked.dtype == torch.int64


# What an engine with steps of its own (DeepSpeed's) does in a format's place.
VERBS_OF_ENGINES = (
    *("backward", "begin_micro_batch", "clipped", "initialize", "masters", "replace_layers", "saved_weights"),
    *("scale", "step", "take_weights", "unscale", "weights_have_changed"),
)


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_format_says_whether_it_computes_by_itself(name: str) -> None:
    kind = class_of(name)
    does = any(getattr(kind, verb) is not getattr(Precision, verb) for verb in VERBS_OF_ENGINES)
    assert kind.computes_by_itself == does
