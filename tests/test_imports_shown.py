"""What the README and docs/ show can be typed: every import runs, and every class that is named is imported."""

import ast
import builtins
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import stratagem

ROOT = Path(__file__).parents[1]
PAGES = {
    page.name: page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
BLOCKS = {
    name: re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE) for name, text in PAGES.items()
}
OURS = {
    node.name
    for folder in ("precision", "strategies", "framework", "testing")
    for path in (ROOT / folder).rglob("*.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.ClassDef)
}
# Lightning's classes of these names stand in docs/coming_from.md.
ALSO_THEIRS = {"TensorBoardLogger", "WandbLogger", "EarlyStopping"}


def spans(text: str) -> list[str]:
    """What stands in a page's text as code."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def imports(name: str) -> list[ast.ImportFrom | ast.Import]:
    """The imports that a page shows: in its programs, and in a line of its text."""
    lines = [span for span in spans(PAGES[name]) if re.match(r"(from \S+ )?import [^.]", span)]
    trees = [ast.parse(text) for text in [*BLOCKS[name], *lines]]
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)]


def imported(name: str) -> set[str]:
    return {alias.asname or alias.name for node in imports(name) for alias in node.names}


SHOWN = sorted({(name, ast.unparse(node)) for name in PAGES for node in imports(name)})
QUICK = "stratagem", "torch"


def package_of(line: str) -> str:
    return line.split()[1].partition(".")[0]


@pytest.mark.parametrize(
    ("page", "line"),
    [pytest.param(*shown, marks=() if package_of(shown[1]) in QUICK else pytest.mark.slow) for shown in SHOWN],
)
def test_an_import_that_is_shown_runs(page: str, line: str) -> None:
    if package_of(line) not in QUICK:
        pytest.importorskip(package_of(line))
    exec(line, {})


@pytest.mark.parametrize("name", [name for name in PAGES if any(BLOCKS[name])])
def test_a_program_imports_what_it_calls(name: str) -> None:
    trees = [ast.parse(block) for block in BLOCKS[name]]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    made = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    used = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    used |= {
        base.id for node in nodes if isinstance(node, ast.ClassDef) for base in node.bases if isinstance(base, ast.Name)
    }
    assert {each for each in used if each[0].isupper()} - made - imported(name) - set(dir(builtins)) == set()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_the_import_of_each_class_that_it_names(name: str) -> None:
    # A line that says in which file a class stands is about the inside.
    text = "".join(line for line in PAGES[name].splitlines(keepends=True) if ".py`" not in line)
    named = {found for span in spans(text) for found in re.findall(r"(?<![\w.])([A-Z]\w+)(?=\(|$)", span)}
    assert (named & OURS) - imported(name) - ALSO_THEIRS == set()


def test_every_public_name_is_there() -> None:
    assert stratagem.__all__ == sorted(stratagem.__all__)
    for name in stratagem.__all__:
        assert name == "__version__" or getattr(stratagem, name).__name__ == name
        if name in stratagem.FILES:
            assert getattr(import_module(f"stratagem.{stratagem.FILES[name]}"), name) is getattr(stratagem, name)
    assert set(stratagem.__all__) <= set(dir(stratagem))
    with pytest.raises(AttributeError, match="no attribute 'Fitt'"):
        _ = stratagem.Fitt


@pytest.mark.slow
def test_a_name_at_the_root_costs_nothing_before_it_is_used() -> None:
    program = (
        "import json, sys, stratagem; print(json.dumps(sorted(m for m in sys.modules if m.startswith('stratagem'))))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    loaded = json.loads(said.stdout)
    unused = (
        "uploading", "loggers.json_lines", "loggers.tensorboard", "checkpoint.contents", "search.running",
        "search.study",
        "display.progress", "display.summary", "profiling", "predictions", "record", "configuration", "weights",
    )  # fmt: skip
    for file in unused:
        assert f"stratagem.framework.{file}" not in loaded
