"""The pages of docs/ are true: blocks run, tables and messages are the code's, and the site has them all."""

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import stratagem
import yaml
from stratagem import Callback, TrainModule
from stratagem import precision as precisions
from stratagem import strategies as all_strategies
from stratagem.framework.callbacks import EVENTS
from stratagem.framework.strategies_page import strategies_page
from stratagem.testing import faults

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGES = {
    path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)

# Programs whose lines in shell blocks aren't run by run_pages.py, and why.
NOT_RUN_PROGRAMS = {
    "pip": "it would change the environment; make build installs the wheel in a fresh one",
    "uv": "the same",
    "make": "its targets are how this is tested",
    "PJRT_DEVICE=CPU": "torch_xla has an environment of its own; tests/xla runs there",
}
# Pages whose commands have tests of their own.
TESTED_ELSEWHERE = {"clusters.md": "tests/examples/test_clusters.py"}

sys.path.append(str(HERE))
from stand_ins import NOT_RUN, ON_TWO_RANKS  # noqa: E402

WITH_RANKS = {*ON_TWO_RANKS, "configuration.md", "faults.md", "first_run.md"}


def run(pages: list[str], directory: Path) -> None:
    if not find_spec("sybil"):
        pytest.skip("needs sybil")
    command = [sys.executable, str(HERE / "run_pages.py"), str(directory), *pages]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.slow
def test_the_blocks_of_one_process_run(tmp_path: Path) -> None:
    run([page for page in PAGES if page not in WITH_RANKS], tmp_path / "pages")


@pytest.mark.slow
def test_the_blocks_of_several_ranks_run(tmp_path: Path) -> None:
    run(sorted(WITH_RANKS), tmp_path / "pages")


def test_what_is_not_run_is_there() -> None:
    for page, parts in NOT_RUN.items():
        assert [part for part in parts if part not in PAGES[page]] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run_or_has_a_reason(page: str) -> None:
    for language, text in BLOCK.findall(PAGES[page]):
        if language != "bash" or page in TESTED_ELSEWHERE:
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            assert not words or words[0] in {"stratagem", "python", *NOT_RUN_PROGRAMS}, line


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_yaml_can_be_read(page: str) -> None:
    for language, text in BLOCK.findall(PAGES[page]):
        if language == "yaml":
            assert yaml.safe_load(text)


def test_the_page_of_strategies_is_current() -> None:
    assert PAGES["strategies.md"] == strategies_page()


def test_every_page_is_in_the_navigation_once() -> None:
    entries = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]

    def files(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [file for inner in (entry.values() if isinstance(entry, dict) else entry) for file in files(inner)]

    assert sorted(files(entries)) == sorted(set(PAGES) - {"README.md"})


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    if not find_spec("mkdocs"):
        pytest.skip("needs mkdocs, which make docs installs")
    linked = tmp_path / "stratagem"
    linked.symlink_to(ROOT)
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NO_MKDOCS_2_WARNING": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr


# Messages. What an error fills in is "…" on a page and "\0" here.


def text_of(node: ast.expr) -> str:
    """A text as far as it is written down."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
    return "\0"


def messages() -> list[str]:
    found = []
    for folder in ("framework", "strategies", "precision"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr | ast.Constant):
                    found.append(text_of(node))
    return found


@pytest.mark.parametrize(("page", "column"), [("limits.md", 1), ("troubleshooting.md", 0)])
def test_messages_are_the_codes(page: str, column: int) -> None:
    known = messages()
    shown = []
    for row in re.findall(r"^\| (.*) \|$", PAGES[page], flags=re.MULTILINE):
        shown += [span for span in re.findall(r"`([^`]+)`", row.split(" | ")[column]) if " " in span]
    assert len(shown) > 25
    missing = []
    for message in shown:
        parts = [part for part in message.split("…") if part.strip()]
        pattern = re.compile(".*".join(map(re.escape, parts)), flags=re.DOTALL)
        if not any(pattern.search(text) for text in known):
            missing.append(message)
    assert missing == []


# Tables of names.


def names_of_first_cells(page: str, after: str, before: str = "\n## ") -> set[str]:
    section = PAGES[page].partition(after)[2].partition(before)[0]
    cells = [row.split(" | ")[0] for row in re.findall(r"^\| (.*) \|$", section, flags=re.MULTILINE)]
    return {name for cell in cells for name in re.findall(r"`([\w-]+)", cell)}


def test_every_method_of_a_module_is_in_its_table() -> None:
    of_torch = set(dir(stratagem.TrainModule.__mro__[-2]))
    public = {
        name for name in dir(TrainModule)
        if inspect.isfunction(getattr(TrainModule, name, None)) and not name.startswith("_")
    }  # fmt: skip
    assert names_of_first_cells("module.md", "## Methods with defaults") == {
        name for name in public if name not in of_torch
    }


def test_every_event_is_in_its_table() -> None:
    assert names_of_first_cells("callbacks.md", "## Events") == set(EVENTS)
    section = PAGES["callbacks.md"].partition("## Events")[2].partition("\n## ")[0]
    for event in EVENTS:
        (row,) = [line for line in section.splitlines() if line.startswith(f"| `{event}`")]
        common = {"self", "args", "state", "control", "fit", "context"}
        own = set(inspect.signature(getattr(Callback, event)).parameters) - common
        assert own <= set(re.findall(r"`(\w+)`", row.split(" | ")[2])), event


def test_every_extra_is_in_its_table() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    extras = set(re.findall(r"^([\w-]+) = \[", declared.partition("\n[")[0], flags=re.MULTILINE))
    assert names_of_first_cells("install.md", "## Extras") == extras


@pytest.mark.parametrize(
    ("page", "prefix", "public"),
    [
        ("api.md", "stratagem", stratagem.__all__),
        ("api_strategies.md", "stratagem.strategies", all_strategies.__all__),
        ("api_precision.md", "stratagem.precision", precisions.__all__),
        ("api_testing.md", "stratagem.testing.faults", faults.__all__),
    ],
    ids=["root", "strategies", "precision", "faults"],
)
def test_every_public_name_is_in_the_reference(page: str, prefix: str, public: list[str]) -> None:
    shown = re.findall(rf"^::: {re.escape(prefix)}\.(\w+)$", PAGES[page], flags=re.MULTILINE)
    assert sorted(shown) == sorted(set(public) - {"__version__", "PHASES", "PRECISIONS", "STRATEGIES"})
