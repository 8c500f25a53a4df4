"""What is released is whole: its version, its packages and files, what it names of others, and other systems."""

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import stratagem

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
ROOMS = "framework", "precision", "strategies", "testing"
BESIDE = "__init__.py", "__main__.py", "py.typed"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]

# What is imported by another name than it is installed by.
DISTRIBUTIONS = {
    "bitsandbytes": "bitsandbytes",
    "comet_ml": "comet-ml",
    "mlflow": "mlflow-skinny",
    "optimi": "torch-optimi",
    "torch_xla": "torch-xla",
    "transformer_engine": "transformer-engine",
    "yaml": "pyyaml",
}
# What isn't named, because it is there where the line that imports it runs.
BROUGHT = {
    "IPython": "by the notebook that the program runs in",
    "huggingface_hub": "by transformers",
}


def files_of(folder: str) -> Iterator[Path]:
    return (ROOT / folder).rglob("*.py")


def named(requirements: list[str]) -> set[str]:
    """The packages in a list of requirements, by their normal names."""
    return {re.split(r"[\[<>=~!; ]", each, maxsplit=1)[0].lower().replace("_", "-") for each in requirements}


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """The top-level modules that a file imports, and whether when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.If | ast.Try)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node not in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0], node not in inside


def test_the_version_is_that_of_the_metadata() -> None:
    assert stratagem.__version__ == metadata.version("stratagem")
    assert re.match(r"\d+\.\d+", stratagem.__version__)


@pytest.mark.slow
@pytest.mark.parametrize("command", [["-m", "stratagem"], ["-m", "stratagem.framework.command_line"]])
def test_the_commands_say_the_version(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, *command, "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"stratagem {stratagem.__version__}\n", done.stderr


def test_all_that_is_imported_is_named() -> None:
    required = named(PROJECT["project"]["dependencies"])
    optional = set().union(*map(named, EXTRAS.values()))
    for path in (path for room in ROOMS for path in files_of(room)):
        for name, at_once in imports_of(path):
            if name in sys.stdlib_module_names or name in ("stratagem", "tomllib", *BROUGHT):
                continue
            package = DISTRIBUTIONS.get(name, name).lower().replace("_", "-")
            assert package in (required if at_once else required | optional), f"{path} imports {name}"


def test_all_that_is_required_is_imported() -> None:
    used = {name for room in ROOMS for path in files_of(room) for name, _ in imports_of(path)}
    assert named(PROJECT["project"]["dependencies"]) <= {name.replace("_", "-") for name in used}


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_an_extra_is_in_the_list_of_the_page_on_installing(extra: str) -> None:
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "install.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"`{extra}`" in ", ".join(rows).split(", ")


def test_what_is_only_ours_is_no_extra() -> None:
    assert not {*EXTRAS} & {*PROJECT["dependency-groups"]}
    tools = {"pytest", "ruff", "mypy", "build", "twine", "hypothesis", "lightning"}
    assert not tools & set().union(*map(named, EXTRAS.values()))


def test_each_torch_between_the_bounds_has_an_environment_of_tests() -> None:
    torch = next(each for each in PROJECT["project"]["dependencies"] if each.startswith("torch"))
    lowest, beyond = map(int, re.fullmatch(r"torch>=2\.(\d+),<2\.(\d+)", torch).groups())  # type: ignore[union-attr]
    environments = ROOT / "tests" / "environments"
    minors = {
        name: int(re.search(r"^torch==2\.(\d+)", (environments / f"{name}.txt").read_text(), re.MULTILINE)[1])  # type: ignore[index]
        for name in ("xla", "pinned", "newest")
    }
    assert minors["xla"] == lowest and minors["newest"] == beyond - 1
    assert f"\ntorch==2.{minors['pinned']}." in (ROOT / "constraints.txt").read_text()


def test_every_package_is_listed() -> None:
    folders = {path.parent.relative_to(ROOT) for room in ROOMS for path in files_of(room)}
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert listed == {"stratagem", *(".".join(["stratagem", *folder.parts]) for folder in folders)}


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists() or not find_spec("setuptools_scm"), reason="builds what git holds")
def test_wheel_and_sdist_hold_what_they_should(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
    program = "from setuptools import build_meta as b; print(b.build_sdist('dist'), b.build_wheel('dist'))"
    built = subprocess.run([sys.executable, "-c", program], cwd=copy, check=True, capture_output=True, text=True)
    sdist, wheel = built.stdout.split()[-2:]

    listing = subprocess.run(["git", "ls-files"], cwd=copy, check=True, capture_output=True, text=True)
    held = {*listing.stdout.split("\n")[:-1]}
    with tarfile.open(copy / "dist" / sdist) as archive:
        inside = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert held - inside == {".gitignore", ".ci/run"}
    assert {"tests/conftest.py", "docs/loop.md", "LICENSE", "CITATION.cff", "SECURITY.md"} <= inside
    assert all(name.startswith("stratagem.egg-info/") for name in inside - held - {"PKG-INFO", "setup.cfg"})

    ours = {name for name in held if name.startswith(tuple(f"{room}/" for room in ROOMS)) or name in BESIDE}
    with zipfile.ZipFile(copy / "dist" / wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(f"stratagem/{name}" for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_the_package_is_imported_and_trains_without_what_another_system_lacks(system: str, tmp_path: Path) -> None:
    program = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("other_systems.py")), system]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, imported, first, second = done.stdout.splitlines()
    assert int(imported.removeprefix("imported ")) > 400
    assert (first, second) == ("trained 8", "trained 16")
