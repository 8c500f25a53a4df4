"""float8 on one process, emulated: which layers it takes, what it computes, refusals, checkpoints."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stratagem import TrainModule
from stratagem.precision import FP8, MXFP8, fp8, get_precision
from stratagem.strategies import Single
from tiny import MakeFit
from tiny_float8 import WIDTH, Deep, losses, rows
from torch import Tensor, nn

if not hasattr(nn.functional, "ScalingType"):
    pytest.skip("torchao 0.18 needs a newer torch", allow_module_level=True)

from torchao.float8.float8_linear import Float8Linear


def float8_layers(module: nn.Module) -> set[str]:
    return {name for name, layer in module.named_modules() if isinstance(layer, Float8Linear)}


def test_which_layers(make_fit: MakeFit) -> None:
    module = Deep()
    calls: list[int] = []
    module.last.register_forward_hook(lambda *_: calls.append(1))
    parameters = {name: id(parameter) for name, parameter in module.named_parameters()}
    make_fit(module, rows(), precision=FP8(emulate=True), max_steps=1).train()
    # Not the gates, whose 4 features are no multiple of 16, nor the head, for its name.
    assert float8_layers(module) == {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "last"}
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == parameters
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert calls  # a hook of the user's is called as ever

    skipping = Deep()
    make_fit(skipping, rows(), precision=FP8(emulate=True, skip=("blocks.1.*", "last")), max_steps=1).train()
    assert float8_layers(skipping) == {"blocks.0.up", "blocks.0.down", "head"}


def test_a_layer_at_two_places_stays_one(make_fit: MakeFit) -> None:
    module = Deep()
    module.blocks[1].up = module.blocks[0].up
    make_fit(module, rows(), precision=FP8(emulate=True), max_steps=1).train()
    assert module.blocks[1].up is module.blocks[0].up
    assert isinstance(module.blocks[1].up, Float8Linear)


def test_a_run_in_another_format_afterwards(make_fit: MakeFit) -> None:
    module = Deep()
    layers = {name: layer for name, layer in module.named_modules() if name}
    make_fit(module, rows(), precision=FP8(emulate=True), max_steps=2).train()
    assert module.last is not layers["last"]
    module.eval()
    twin = Deep()
    twin.load_state_dict(module.state_dict())
    for each in (module, twin):
        make_fit(each, rows(), precision="32-true", max_steps=2).train()
    assert {name: layer for name, layer in module.named_modules() if name} == layers
    for name, tensor in twin.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
    make_fit(module, rows(), precision=FP8("rowwise", emulate=True), max_steps=1).train()
    assert isinstance(module.last, Float8Linear)


def test_a_product_is_rounded_to_float8(make_fit: MakeFit) -> None:
    """By hand: scaled to 448, the largest number of e4m3, rounded, multiplied, scaled back."""
    module = Deep()
    fit = make_fit(module, rows(), precision=FP8(emulate=True), max_steps=1)
    fit.train()
    x = torch.randn(32, WIDTH)

    def rounded(tensor: Tensor) -> Tensor:
        scale = 448 / tensor.abs().max()
        return (tensor * scale).to(torch.float8_e4m3fn).float() / scale

    with torch.no_grad():
        exact = x @ module.last.weight.T + module.last.bias
        by_hand = rounded(x) @ rounded(module.last.weight).T + module.last.bias
        assert torch.allclose(module.last(x), by_hand, atol=1e-5)
        assert not torch.allclose(module.last(x), exact, atol=1e-3)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_learns_as_float32_does(make_fit: MakeFit, recipe: str) -> None:
    found, expected = losses(make_fit, FP8(recipe, emulate=True)), losses(make_fit, "32-true")
    assert found != expected
    assert found == pytest.approx(expected, rel=0.05)  # e4m3 has 4 bits: each product is off by 1/32 at most
    assert found[-1] < 0.6 * found[0]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{"torch_compile": True}, {"gradient_checkpointing": True}], ids=str)
def test_blocks_that_are_compiled_or_recomputed(make_fit: MakeFit, arguments: dict[str, bool]) -> None:
    found = losses(make_fit, FP8(emulate=True), max_steps=5, **arguments)
    assert found == pytest.approx(losses(make_fit, FP8(emulate=True), max_steps=5), rel=0.01)


def test_padding_changes_no_number(make_fit: MakeFit) -> None:
    odd = {"per_device_train_batch_size": 5, "max_steps": 4}
    assert losses(make_fit, FP8(emulate=True, pad=True), **odd) == losses(make_fit, FP8(emulate=True), **odd)


def test_a_machine_without_float8_units() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=r"no GPU .*8\.9.*FP8\(emulate=True\).*bf16-mixed"):
        get_precision("fp8")


@pytest.mark.parametrize(
    ("capability", "architecture", "lacks"),
    [
        ((8, 0), None, r"Card has compute capability 8\.0 \(they came with 8\.9\)"),
        ((8, 9), None, None),
        ((9, 0), None, None),
        ((9, 0), "gfx90a:sramecc+:xnack-", r"Card has none \(an MI300 has\)"),
        ((9, 4), "gfx942:sramecc+:xnack-", None),
    ],
)
def test_which_machines_have_float8_units(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], architecture: str | None, lacks: str | None
) -> None:
    card = SimpleNamespace(name="Card", major=capability[0], minor=capability[1], gcnArchName=architecture)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.version, "hip", "6.3" if architecture else None)
    if lacks is None:
        assert not FP8().emulate
    else:
        with pytest.raises(ValueError, match=rf"needs float8 units, and {lacks}\. Write precision=FP8\(emulate=True\)"):
            FP8()


@pytest.mark.parametrize("kind", [FP8, MXFP8])
def test_a_run_beside_its_gpu(monkeypatch: pytest.MonkeyPatch, make_fit: MakeFit, kind: type[FP8 | MXFP8]) -> None:
    card = SimpleNamespace(name="Card", major=10, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    precision = kind()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=rf"this run's device is cpu\..*{kind.__name__}\(emulate=True\)"):
        make_fit(Deep(), rows(), strategy=Single(device="cpu"), precision=precision)


@pytest.mark.parametrize("kind", [FP8, MXFP8])
def test_without_torchao(monkeypatch: pytest.MonkeyPatch, kind: type[FP8 | MXFP8]) -> None:
    monkeypatch.setattr(fp8, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"torchao, which isn't installed\. Run: pip install 'stratagem\[fp8\]'"):
        kind(emulate=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "blockwise"}, "'tensorwise', 'rowwise', 'rowwise_with_gw_hp'.*'blockwise'"),
        ({"recipe": "rowwise", "all_gather": True}, "recipe='tensorwise'"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FP8(emulate=True, **options)


def test_all_gather_without_shards(make_fit: MakeFit) -> None:
    with pytest.raises(ValueError, match=r"'fp8' under strategy='single'.*strategy='fsdp2'"):
        make_fit(Deep(), rows(), precision=FP8(emulate=True, all_gather=True))


def test_nothing_to_convert(make_fit: MakeFit) -> None:
    fit = make_fit(Deep(), rows(), precision=FP8(emulate=True, skip=("*",)), max_steps=1)
    with pytest.raises(ValueError, match=r"would change nothing: Deep .*blocks\.0\.gate"):
        fit.train()


OTHERS = ("32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true")


@pytest.mark.parametrize(
    ("first", "second"), [*(("fp8", other) for other in OTHERS), ("32-true", "fp8"), ("bf16-true", "fp8")]
)
def test_checkpoints_load_under_another_format(make_fit: MakeFit, tmp_path: Any, first: str, second: str) -> None:
    formats: dict[str, Any] = {"fp8": FP8(emulate=True), **{word: word for word in OTHERS}}
    saving = {"save_strategy": "steps", "save_steps": 10, "max_steps": 10}
    whole = losses(make_fit, formats[second])
    begun = losses(make_fit, formats[first], **saving)
    torch.manual_seed(1)  # other initial weights, which the checkpoint replaces
    module = Deep()
    fit = make_fit(
        module, rows(), precision=formats[second], max_steps=20, logging_steps=1, learning_rate=0.01,
        per_device_train_batch_size=16,
    )  # fmt: skip
    fit.train(resume_from_checkpoint=True)
    found = [log["loss"] for log in fit.state.log_history if "loss" in log]
    assert found[:10] == begun
    assert found == pytest.approx(whole, rel=0.05)
    assert set(module.state_dict()) == set(Deep().state_dict())


def test_mxfp8(make_fit: MakeFit) -> None:
    """Its blocks are 32 long, which these layers' 16 features aren't; the product is off by one in 16 at most."""
    from stratagem.precision.mxfp8 import MXFP8Linear

    with pytest.warns(UserWarning, match=r"'mxfp8' is experimental: it is a prototype of torchao.*precision='fp8'"):
        precision = MXFP8(emulate=True, skip=("blocks.0.*",))
    fit = make_fit(Deep(), rows(), precision=precision, max_steps=1)
    with pytest.raises(ValueError, match=r"precision='mxfp8' would change nothing.*multiple of 32.*last \(16, 16\)"):
        fit.train()
    fit = make_fit(Deep(width=32), rows(width=32), precision=precision, max_steps=1)
    fit.train()
    layers = {name: layer for name, layer in fit.module.named_modules() if isinstance(layer, MXFP8Linear)}
    assert layers.keys() == {"blocks.1.up", "blocks.1.down", "last", "head"}
    x, layer = torch.randn(5, 32), layers["last"]
    exact = nn.functional.linear(x, layer.weight, layer.bias)
    error = (layer(x) - exact).norm() / exact.norm()
    assert 1e-3 < error < 2**-4
    assert set(fit.module.state_dict()) == set(Deep().state_dict())


def test_mxfp8_on_a_machine_without_it() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=r"compute capability 10\.0.*MXFP8\(emulate=True\).*'fp8'"):
        get_precision("mxfp8")


class Penalized(TrainModule):
    """Learns from the gradient of a wide layer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.narrow(torch.tanh(self.wide(x))).sum(), x, create_graph=True)
        return slope

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return outputs.square().mean()


@pytest.mark.parametrize("make", [FP8, MXFP8])
@pytest.mark.filterwarnings("ignore:precision='mxfp8' is experimental")
def test_gradients_of_gradients_are_refused(make_fit: MakeFit, make: Any) -> None:
    """torchao's products would leave them out, or fail in words of their own."""
    data = [{"x": torch.full((32,) if make is MXFP8 else (16,), 0.1 * i)} for i in range(8)]
    module = Penalized()
    if make is MXFP8:
        module.wide = nn.Linear(32, 32)
    with pytest.raises(ValueError, match="products in float8 have no gradients of gradients"):
        make_fit(module, data, precision=make(emulate=True), max_steps=1).train()
    plain = make_fit(module, data, precision="bf16-mixed", max_steps=1)  # the layers are nn.Linear again
    plain.train()
    assert type(module.wide) is nn.Linear
