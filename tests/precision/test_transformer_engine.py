"""fp8-te: the error where Transformer Engine is missing, and what it is given, against a double with its signatures.

The double is labelled as one: Transformer Engine runs on NVIDIA GPUs alone. Its keywords are those of 2.20.2, read from
the sources in its wheel; where the package is installed, its own sources are read again.
"""

import ast
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from stratagem.precision import TransformerEngine, get_precision
from stratagem.precision.mixed import BF16Mixed
from tiny import MakeFit
from tiny_float8 import Deep, losses, rows
from torch import Tensor, nn

KEYWORDS = {  # file, class: the keywords of its __init__ that we rely on
    ("pytorch/quantization.py", "autocast"): {"enabled", "recipe"},
    ("pytorch/module/linear.py", "Linear"): {"in_features", "out_features", "bias", "params_dtype", "device"},
}
RECIPES = {"Float8CurrentScaling", "DelayedScaling", "Float8BlockScaling", "MXFP8BlockScaling"}


class LinearDouble(nn.Module):
    """A test double of te.Linear: no nn.Linear, with an extra state, and a bias that is no parameter where it has none;
    computes in no other format than torch does.
    """

    def __init__(self, in_features: int, out_features: int, sequence_parallel: bool = False, *, bias: bool = True,
                 params_dtype: torch.dtype | None = None, device: Any = "cuda") -> None:  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=params_dtype, device=device))
        self.bias: Any = torch.Tensor()
        if bias:
            del self.bias
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=params_dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        assert AutocastDouble.entered
        return nn.functional.linear(x, self.weight, self.bias if self.bias.numel() else None)

    def get_extra_state(self) -> Tensor:
        return torch.zeros(3, dtype=torch.uint8)


class AutocastDouble:
    """A test double of te.autocast."""

    entered: list[Any] = []
    recipes: set[str] = set()

    def __init__(self, enabled: bool = True, calibrating: bool = False, recipe: Any = None,
                 amax_reduction_group: Any = None, _graph: bool = False) -> None:  # fmt: skip
        assert enabled
        self.recipe = recipe

    def __enter__(self) -> None:
        self.entered.append(self)
        self.recipes.add(type(self.recipe).__name__)

    def __exit__(self, *error: object) -> None:
        self.entered.pop()


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The double, where Transformer Engine would be imported from."""
    names = ("", ".pytorch", ".common", ".common.recipe")
    modules = {f"transformer_engine{name}": ModuleType(f"transformer_engine{name}") for name in names}
    modules["transformer_engine.pytorch"].__dict__.update(Linear=LinearDouble, autocast=AutocastDouble)
    for name in RECIPES:
        setattr(modules["transformer_engine.common.recipe"], name, type(name, (), {}))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(TransformerEngine, "set_up", BF16Mixed.set_up)  # the double needs no GPU
    AutocastDouble.recipes.clear()
    yield


@pytest.mark.parametrize("double", [(AutocastDouble, "autocast"), (LinearDouble, "Linear")], ids=lambda d: d[1])
def test_the_double_has_the_keywords(double: tuple[type, str]) -> None:
    (wanted,) = (keywords for (_, name), keywords in KEYWORDS.items() if name == double[1])
    assert wanted <= set(inspect.signature(double[0]).parameters)


def test_the_sources_have_the_keywords() -> None:
    found = importlib.util.find_spec("transformer_engine")
    if found is None or found.origin is None:
        pytest.skip("Transformer Engine isn't installed; its wheel 2.20.2 was read when this was written")
    folder = Path(found.origin).parent
    for (file, name), keywords in KEYWORDS.items():
        (kind,) = (
            node
            for node in ast.parse((folder / file).read_text()).body
            if isinstance(node, ast.ClassDef) and node.name == name
        )
        (init,) = (node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
        assert keywords <= {argument.arg for argument in (*init.args.args, *init.args.kwonlyargs)}
    tree = ast.parse((folder / "common/recipe/__init__.py").read_text())
    assert {node.name for node in tree.body if isinstance(node, ast.ClassDef)} >= RECIPES


def test_without_transformer_engine() -> None:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception:
        message = r"Transformer Engine.*CUDA and an NVIDIA GPU.*'stratagem\[fp8-te\]'.*precision='fp8' does much"
        with pytest.raises(ValueError, match=message):
            get_precision("fp8-te")
    else:
        pytest.skip("Transformer Engine is installed")


@pytest.mark.parametrize(("recipe", "scaling"), [("current", "Float8CurrentScaling"), ("delayed", "DelayedScaling")])
def test_every_sibling_is_replaced(te: None, make_fit: MakeFit, recipe: str, scaling: str) -> None:
    module, plain = Deep(), Deep()
    plain.load_state_dict(module.state_dict())
    arguments = {"max_steps": 3, "learning_rate": 0.01}
    fit = make_fit(module, rows(), rows(16), precision=TransformerEngine(recipe), **arguments)
    fit.train()
    replaced = {name for name, layer in module.named_modules() if isinstance(layer, LinearDouble)}
    assert replaced == {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "last"}
    assert AutocastDouble.recipes == {scaling}
    # Weights and biases were copied: the double, which computes as torch does, trains to the same weights.
    by_torch = make_fit(plain, rows(), rows(16), precision="bf16-mixed", **arguments)
    by_torch.train()
    assert set(module.state_dict()) == set(plain.state_dict())  # and no extra state
    for name, tensor in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
    assert fit.evaluate()["eval_loss"] == by_torch.evaluate()["eval_loss"]


def test_layers_named_in_skip(te: None, make_fit: MakeFit) -> None:
    module = Deep()
    make_fit(module, rows(), precision=TransformerEngine(skip=("blocks.*", "head")), max_steps=1).train()
    assert [name for name, layer in module.named_modules() if isinstance(layer, LinearDouble)] == ["last"]


def test_gradient_checkpointing(te: None, make_fit: MakeFit) -> None:
    with pytest.raises(ValueError, match=r"gradient_checkpointing=True in precision='fp8-te'.*precision='fp8'"):
        make_fit(Deep(), rows(), precision="fp8-te", gradient_checkpointing=True)


def test_the_real_one(make_fit: MakeFit) -> None:
    pytest.importorskip("transformer_engine.pytorch", exc_type=Exception)
    if not torch.cuda.is_available():
        pytest.skip("Transformer Engine runs on CUDA")
    found, expected = losses(make_fit, "fp8-te"), losses(make_fit, "32-true")
    assert found == pytest.approx(expected, rel=0.05)
