"""What a framework is to read, to install and to import: lines of code, packages beside torch's own, time of an import.

    python benchmarks/compared/sizes.py

Of the frameworks that are installed where it runs. A line of code is one that holds more than blanks, comments and
docstrings. Packages are what the metadata of the installed distributions ask for, without extras, beyond what torch
asks for itself. The import is that of the class that trains, each in a fresh process, in turns with ``import torch``:
the medians of CPU seconds, and their ratio to torch's.
"""

import argparse
import ast
import importlib.metadata
import importlib.util
import io
import platform
import re
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path

from packaging.requirements import Requirement

TITAN = "*.py components config distributed hf_datasets observability ops overrides protocols tools"
COMPOSER = "*.py callbacks checkpoint cli core datasets devices distributed functional loggers metrics optim profiler "
COMPOSER += "trainer utils"


def below(package: str, parts: str) -> list[str]:
    """The paths of parts of a package."""
    return [f"{package}/{part}" for part in parts.split()]


# row -> (distribution, what to import, {name of a part: its files, under the package's folder})
FRAMEWORKS: dict[str, tuple[str, str, dict[str, list[str]]]] = {
    "stratagem": (
        "stratagem",
        "from stratagem import Fit, TrainModule",
        {
            "precision, strategies, framework": ["stratagem/precision", "stratagem/strategies", "stratagem/framework"],
            "testing": ["stratagem/testing"],
        },
    ),
    "transformers": (
        "transformers",
        "from transformers import Trainer, TrainingArguments",
        {
            "the Trainer's files": ["transformers/trainer*.py", "transformers/training_args.py"],
            "integrations, optimization, distributed": [
                "transformers/integrations",
                "transformers/optimization.py",
                "transformers/distributed",
                "transformers/data",
            ],
        },
    ),
    "accelerate": ("accelerate", "from accelerate import Accelerator", {"all": ["accelerate"]}),
    "Lightning": (
        "lightning",
        "from lightning.pytorch import LightningModule, Trainer",
        {"pytorch, fabric": ["lightning/pytorch", "lightning/fabric"]},
    ),
    "torchtitan": (
        "torchtitan",
        "from torchtitan.trainer import Trainer",
        {
            "without models and experiments": below("torchtitan", TITAN),
            "models": ["torchtitan/models"],
            "experiments": ["torchtitan/experiments"],
        },
    ),
    "Composer": (
        "mosaicml",
        "from composer import ComposerModel, Trainer",
        {
            "without algorithms and models": below("composer", COMPOSER),
            "algorithms": ["composer/algorithms"],
        },
    ),
}


def code_lines(source: str) -> int:
    """Lines that hold more than blanks, comments and docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def lines_of(patterns: list[str]) -> int:
    """Lines of code of files and folders, given below the folder that packages lie in."""
    found: set[Path] = set()
    for pattern in patterns:
        package = pattern.split("/")[0]
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        folder = Path(next(iter(spec.submodule_search_locations)))
        for path in [folder] if pattern == package else folder.glob(pattern.partition("/")[2]):
            found.update(path.rglob("*.py") if path.is_dir() else [path])
    return sum(code_lines(path.read_text(encoding="utf-8")) for path in found)


def packages_of(distribution: str) -> set[str]:
    """The distributions that installing one brings, itself included, as far as they are installed here."""
    found: set[str] = set()
    waiting = [distribution]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            asked = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        for text in asked:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def import_seconds(statement: str) -> float:
    """CPU seconds of a fresh process that makes an import and ends."""
    program = (
        f"{statement}\nimport resource; r = resource.getrusage(resource.RUSAGE_SELF); print(r.ru_utime + r.ru_stime)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(said.stdout.split()[-1])


def main() -> None:
    """Print a line for each framework that is installed."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="imports of each, in turns")
    options = parser.parse_args()
    imports = {name: line for name, (_, line, _) in FRAMEWORKS.items()}
    there = [name for name, line in imports.items() if importlib.util.find_spec(line.split()[1].split(".")[0])]
    bare = "import torch"
    seconds: dict[str, list[float]] = {name: [] for name in [bare, *there]}
    for _ in range(options.rounds):
        for name in seconds:
            seconds[name].append(import_seconds(imports.get(name, bare)))
    torch_alone = statistics.median(seconds[bare])
    version = platform.python_version()
    print(f"Python {version}; import torch: {torch_alone:.2f} s of CPU, {options.rounds} rounds in turns")
    for name in there:
        distribution, _, parts = FRAMEWORKS[name]
        lines = "; ".join(f"{part}: {lines_of(patterns):,}" for part, patterns in parts.items())
        more = packages_of(distribution) - packages_of("torch") - {distribution}
        median = statistics.median(seconds[name])
        print(
            f"{name} {importlib.metadata.version(distribution)}\n  lines: {lines}\n"
            f"  packages beside torch's: {len(more)} ({', '.join(sorted(more))})\n"
            f"  import: {median:.2f} s of CPU, {median / torch_alone:.2f} of torch's"
        )


if __name__ == "__main__":
    main()
