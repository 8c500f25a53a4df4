"""Other people's models under every placement: the same six updates, resumed elsewhere, exported and loaded again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, INSTALLED
from family import Family
from ranks import Ranks
from runs import PLACEMENTS, TRANSITIONS, VARIANTS, Runs, difference, weights_difference
from safetensors.torch import load_file

# Families that stand for many: what .ci/run tries. `make test-zoo` tries all.
CORE = (
    "Llama",
    "Qwen3",
    "Gemma3",
    "Mixtral",
    "T5",
    "ViT",
    "CLIP",
    "x-transformers",
    "tied weights",
    "0-dim parameters",
    "BatchNorm",
    "average in a buffer",
    "dataclass batch",
    "list batch",
)
KNOWN: dict[tuple[str, str], str] = {}
"""What fails, and why: (family, column) to the reason. A case that no longer fails is an error, too."""

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def runs(two_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The runs of this session."""
    return Runs(two_ranks, tmp_path_factory.mktemp("zoo"))


def cases(columns: list[str], applies: Any) -> Any:
    """Every installed family under every column that applies to it; those outside of the core are slow."""
    found = []
    for name, family in INSTALLED.items():
        for column in columns:
            if not applies(family, column):
                continue
            marks: list[Any] = [] if name in CORE else [pytest.mark.slow]
            if (name, column) in KNOWN:
                marks.append(pytest.mark.xfail(reason=KNOWN[name, column], strict=True))
            found.append(pytest.param(name, column, marks=marks, id=f"{name}-{column}"))
    return pytest.mark.parametrize(("name", "column"), found)


def placed(family: Family, column: str) -> bool:
    """Whether a placement applies to a family."""
    return column not in family.left_out and (column != "tp" or family.tp)


def varied(family: Family, column: str) -> bool:
    """Whether a variant of the run applies to a family."""
    return {"torch_compile": family.compiles, "gradient_checkpointing": family.blocks}.get(column, True)


def check_refusal(found: dict[str, Any], words: str | None) -> bool:
    """Whether the run was refused, with the words that were wanted."""
    if words is None:
        assert "refused" not in found, found["refused"]
        return False
    assert words in found.get("refused", "it ran"), found
    return True


@cases(list(PLACEMENTS), placed)
def test_a_placement_gives_the_curve_of_one_device(runs: Runs, results: Results, name: str, column: str) -> None:
    family, row = FAMILIES[name], results.setdefault(name, {})
    expected, found = runs.of(name, "single"), runs.of(name, column)
    assert "refused" not in expected, expected["refused"]
    if check_refusal(found, family.refused.get(column)):
        row[column] = "refused"
        return
    if family.by_nature.get(column) or family.by_nature.get("ranks"):
        difference(found, expected)  # finite, and as many
        row[column] = "differs"
        return
    row[column] = difference(found, expected)
    assert row[column] <= family.tolerance
    apart = weights_difference(runs.path(name, column), runs.path(name, "single"))
    assert apart <= 2e-3, apart  # Adam divides by gradients' roots: a gradient near 0 moves by whole learning rates


@cases(list(VARIANTS), varied)
def test_a_variant_gives_the_same_curve(runs: Runs, results: Results, tmp_path: Path, name: str, column: str) -> None:
    family, row = FAMILIES[name], results.setdefault(name, {})
    found = runs.run(name, "single", tmp_path, saves=False, **VARIANTS[column])
    if check_refusal(found, family.refused.get(column)):
        row[column] = "refused"
        return
    expected = runs.of(name, "single")
    row[column] = difference({**found, "grad_norm": []}, {**expected, "grad_norm": []})
    # bfloat16 keeps 8 bits, products round otherwise on other processors, and CLIP's loss has a factor of 14 on them.
    assert row[column] <= {"bf16-mixed": 6e-2, "gradient_checkpointing": 1e-6, "torch_compile": 1e-4}[column]


@cases(["resume"], lambda family, column: True)
def test_any_placement_goes_on_where_another_stopped(
    runs: Runs, results: Results, tmp_path: Path, name: str, column: str
) -> None:
    family, held = FAMILIES[name], 0
    for source, target in TRANSITIONS:
        if {source, target} & {*family.refused, *family.left_out}:
            continue
        whole = runs.of(name, source)
        assert "refused" not in whole, whole["refused"]
        checkpoint = runs.path(name, source) / "checkpoint-3"
        found = runs.run(name, target, tmp_path / f"{source}-{target}".replace(" ", ""), resume=str(checkpoint))
        assert "refused" not in found, (source, target, found["refused"])
        if family.by_nature:  # the updates before the save are what they were
            assert found["loss"][:3] == whole["loss"][:3]
        else:
            assert difference(found, runs.of(name, "single")) <= family.tolerance, (source, target)
        held += 1
    results.setdefault(name, {})[column] = f"{held} of {held}"


@cases(["reload"], lambda family, column: True)
def test_an_export_loads_into_a_fresh_module(
    runs: Runs, results: Results, tmp_path: Path, name: str, column: str
) -> None:
    trained = runs.of(name, "single")
    assert "refused" not in trained, trained["refused"]
    weights = load_file(runs.path(name, "single") / "weights.safetensors")
    torch.manual_seed(7)
    module = FAMILIES[name].make()
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert not unexpected
    state = module.state_dict()
    for key in missing:  # another name of a tied weight
        assert any(state[key].data_ptr() == state[loaded].data_ptr() for loaded in weights), key
    for key, value in weights.items():
        assert torch.equal(state[key], value), key
    results.setdefault(name, {})[column] = "yes"
    wraps: Any = getattr(module, "wraps", None)
    if wraps is not None:
        module.save_pretrained(tmp_path)  # type: ignore[operator]
        again = wraps.from_pretrained(tmp_path).state_dict()
        for key, value in state.items():
            assert torch.equal(again[key], value), key
