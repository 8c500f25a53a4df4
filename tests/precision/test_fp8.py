"""float8 on one process, emulated: which layers it takes, what it computes, refusals, checkpoints."""

from typing import Any

import pytest
import torch
from stratagem import FitArguments, TrainModule
from stratagem.precision import FP8, get_precision
from tiny import MakeFit
from torch import Tensor, nn
from torchao.float8.float8_linear import Float8Linear

WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.gate = nn.Linear(WIDTH, 4)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x))) * self.gate(x).mean(dim=-1, keepdim=True)


class Deep(TrainModule):
    """Two blocks, a sibling after them, and an output head whose sizes would qualify."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.last = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(torch.tanh(self.last(x)))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(outputs, batch["y"])

    def shard_units(self) -> list[nn.Module]:
        return list(self.blocks)

    def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=args.learning_rate, fused=True)


def rows(count: int = 64) -> list[dict[str, Tensor]]:
    x = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3))
    return [{"x": row, "y": row.flip(0).sin()} for row in x]


def losses(make_fit: MakeFit, precision: Any, **arguments: Any) -> list[float]:
    torch.manual_seed(0)
    defaults = {"max_steps": 20, "logging_steps": 1, "learning_rate": 0.01, "per_device_train_batch_size": 16}
    fit = make_fit(Deep(), rows(), precision=precision, **{**defaults, **arguments})
    fit.train()
    return [log["loss"] for log in fit.state.log_history if "loss" in log]


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


def test_a_machine_without_float8_units() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=r"no GPU .*8\.9.*FP8\(emulate=True\).*bf16-mixed"):
        get_precision("fp8")


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


@pytest.mark.parametrize(("first", "second"), [("fp8", "32-true"), ("32-true", "fp8")])
def test_checkpoints_load_under_another_format(make_fit: MakeFit, tmp_path: Any, first: str, second: str) -> None:
    formats = {"fp8": FP8(emulate=True), "32-true": "32-true"}
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
