"""The examples in docstrings run and print what they say."""

import doctest
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import stratagem
import torch
from stratagem import Fit, FitArguments
from tiny import Regressor, regression_rows
from torch import nn

ROOT = Path(__file__).parents[1]
FILES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count(">>> ")
    for folder in ("precision", "strategies", "framework", "testing")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
}


def names() -> dict[str, Any]:
    """What an example may name without making it: a small model, data for it, and a Fit of it."""
    dataset = regression_rows(16)
    arguments = FitArguments(max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="no", progress=False)
    fit = Fit(module_init=lambda trial: Regressor(), train_data=dataset, eval_data=dataset, loggers=(), args=arguments)
    public = {name: getattr(stratagem, name) for name in stratagem.__all__}
    model = nn.Linear(3, 1)
    return {
        **public, "Regressor": Regressor, "dataset": dataset, "fit": fit, "model": model, "x": torch.ones(2, 3),
        "nn": nn, "torch": torch,
    }  # fmt: skip


SLOW = {"framework/fit.py": pytest.mark.slow}  # a search


@pytest.mark.parametrize("path", [pytest.param(path, marks=SLOW.get(path, ())) for path in FILES])
def test_the_examples_run(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = import_module("stratagem." + path.removesuffix(".py").replace("/", "."))
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    ran = 0
    for found in doctest.DocTestFinder().find(module):
        if found.examples:
            found.globs = {**names(), **found.globs}
            ran += runner.run(found).attempted
    assert ran == FILES[path]
    assert not runner.summarize(verbose=False).failed
