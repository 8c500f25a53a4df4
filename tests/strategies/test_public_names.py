"""``from stratagem.strategies import FSDP2`` and the like: every name is there, and imports no file but its own."""

import json
import subprocess
import sys
from importlib import import_module

import pytest
from stratagem import precision, strategies

LIGHT = {  # that import nothing of torch beyond torch itself
    "stratagem.strategies": ("Strategy", "Single", "DP"),
    "stratagem.precision": ("Precision", "Full", "BF16Mixed", "BF16True", "FP16Mixed", "Double", "FP8", "MXFP8"),
}
NOT_OURS = ("deepspeed", "torch_xla", "torchao", "transformer_engine", "apex", "bitsandbytes", "transformers")

# Prints which modules there are after the packages' import, after the light names, and after all names.
PROGRAM = """
import json, sys
import stratagem.strategies, stratagem.precision
loaded = [sorted(sys.modules)]
for names in (json.loads(sys.argv[1]), json.loads(sys.argv[2])):
    for package, asked in names.items():
        for name in asked:
            getattr(sys.modules[package], name)
    loaded.append(sorted(sys.modules))
print(json.dumps(loaded))
"""


@pytest.mark.parametrize("package", [precision, strategies])
def test_each_name_is_there(package) -> None:  # type: ignore[no-untyped-def]
    assert {*package.FILES} < {*package.__all__} <= {*dir(package)}
    for name in package.__all__:
        found = getattr(package, name)
        if name in package.FILES:
            home = import_module(f"{package.__name__}.{package.FILES[name]}")
            assert found is getattr(home, name)
            assert found.__name__ == name


def test_the_classes_of_all_names_are_exported() -> None:
    for name in precision.PRECISIONS:
        assert import_module("stratagem.precision.registry").class_of(name).__name__ in precision.__all__
    for location, _ in strategies.STRATEGIES.values():
        assert location.partition(":")[2] in strategies.__all__


@pytest.mark.parametrize("folder", ["ddp", "deepspeed", "fsdp1", "fsdp2", "xla"])
def test_a_strategys_folder_has_its_class_and_options(folder: str) -> None:
    package = import_module(f"stratagem.strategies.{folder}")
    kind = getattr(strategies, next(name for name in package.__all__ if not name.endswith("Options")))
    assert [getattr(package, name) for name in package.__all__] == [kind, kind.Options]
    assert {*package.__all__} <= {*dir(package)}


@pytest.mark.parametrize("package", [precision, strategies])
def test_another_name_is_an_attribute_error(package) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AttributeError, match=rf"module '{package.__name__}' has no attribute 'FSDP3'"):
        package.FSDP3  # noqa: B018


@pytest.mark.slow
def test_nothing_is_imported_for_a_name_but_its_own_file() -> None:
    everything = {package.__name__: package.__all__ for package in (strategies, precision)}
    arguments = [sys.executable, "-c", PROGRAM, json.dumps(LIGHT), json.dumps(everything)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    at_first, light, all_of_them = ({*modules} for modules in json.loads(done.stdout))
    homes = {f"{p.__name__}.{file}" for p in (precision, strategies) for file in p.FILES.values()}
    assert not at_first & homes
    assert light & homes == {
        *("stratagem.strategies.single", "stratagem.strategies.dp", "stratagem.precision.full"),
        *(f"stratagem.precision.{file}" for file in ("mixed", "half", "double", "fp8", "mxfp8")),
    }
    for heavy in ("torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint"):
        assert heavy not in light
    assert homes <= all_of_them
    assert not all_of_them & {*NOT_OURS}
