"""Runs the code blocks of pages as a reader would: ``python run_pages.py DIRECTORY PAGE...``.

torch and stratagem are imported once, and each page runs in a process that is forked off, in a directory of its own.
The Python blocks of a page share their names, beginning with those that ``stand_ins.py`` has for the page. Where one
starts ranks, as ``Fit(devices=2)`` does, each rank is this program again, with that one page.
"""

import os
import re
import runpy
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Before the imports below, which read them.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "WANDB_MODE": "offline"}
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, "")  # the files of a page

import stand_ins
import torch
from stratagem import Fit, TrainModule  # noqa: F401 (what most pages use is imported before processes are forked off)
from stratagem.framework.command_line import main as stratagem
from stratagem.strategies.launch import run_on_ranks
from sybil import Example
from sybil.document import Document
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

ROOT = Path(__file__).parents[2]


def is_rank() -> bool:
    """Whether this process was started by a block of a page."""
    return "RANK" in os.environ


def in_child(function: Callable[[], object]) -> int:
    """Call a function in a process that is forked off, and return its exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        function()
        status = 0
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_python(example: Example) -> None:
    """Run a Python block. One that begins with the name of a file is also written there, for commands and imports."""
    if named := re.match(r"# (\w+)\.py\n", example.parsed):
        example.namespace["__name__"] = named[1]
        if not is_rank():
            Path(f"{named[1]}.py").write_text(example.parsed, encoding="utf-8")
    PythonEvaluator()(example)
    example.namespace["__name__"] = "__main__"


def run_commands(example: Example) -> None:
    """Run the lines of a block of shell commands that call stratagem, or a program of the page by Python."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if is_rank() or words[:1] not in (["stratagem"], ["python"]) or is_left_out(example.path, line):
            continue
        if ">" in words:
            words = words[: words.index(">")]

        def command(words: list[str] = words) -> None:
            if words[0] == "stratagem":
                sys.orig_argv = [sys.executable, "-m", *words]
                sys.exit(stratagem(words[1:]))
            sys.argv, sys.orig_argv = words[1:], [sys.executable, *words[1:]]
            runpy.run_path(words[1], run_name="__main__")

        if status := in_child(command):
            raise AssertionError(f"{example.path}, line {example.line}: {line.strip()!r} ended with {status}")


def is_left_out(path: str, code: str) -> bool:
    """Whether a page's code is in the list of what isn't run."""
    return any(part in code for part in stand_ins.NOT_RUN.get(Path(path).name, {}))


def parse(page: str, *parsers: CodeBlockParser) -> Document:
    """Find the blocks of a page, which is README.md or in docs/."""
    return Document.parse(str(ROOT / page if page == "README.md" else ROOT / "docs" / page), *parsers)


def run_page(page: str) -> None:
    """Run all blocks of a page, in the present directory.

    Args:
        page: its name in docs/, or "README.md".
    """
    torch.manual_seed(0)
    document = parse(page, CodeBlockParser("python", run_python), CodeBlockParser("bash", run_commands))
    document.namespace["__name__"] = "__main__"
    with stand_ins.stand_in(page, document.namespace):
        for example in document.examples():
            if example.region.evaluator is run_commands or not is_left_out(page, example.parsed):
                example.evaluate()


def enter(directory: Path, page: str) -> None:
    """Work in a page's own directory, as the program that ranks would be started from."""
    directory = directory / page
    directory.mkdir(parents=True, exist_ok=True)
    os.chdir(directory)
    sys.argv = [__file__]
    sys.orig_argv = [sys.executable, __file__, str(directory.parent), page]


def run_alone(directory: Path, page: str) -> None:
    """Run a page. Where one of its blocks starts ranks, they run it from its beginning."""
    enter(directory, page)
    run_page(page)


def run_on_two_ranks(directory: Path, pages: list[str]) -> None:
    """Run pages whose blocks ask for two ranks on the same two, one after the other; commands before them, here."""
    for page in pages:
        enter(directory, page)
        stand_ins.prepare(page)
        for example in parse(page, CodeBlockParser("bash", run_commands)).examples():
            example.evaluate()
    sys.exit(run_on_ranks([sys.executable, __file__, str(directory), *pages], 2, 2))


def main() -> int:
    """Run the pages, and return how many failed."""
    directory, pages = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    if is_rank():
        for page in pages:
            print(f"rank {os.environ['RANK']} runs {page}", flush=True)
            run_alone(directory, page)
        return 0
    grouped = [page for page in pages if page in stand_ins.ON_TWO_RANKS]
    parts = {page: partial(run_alone, directory, page) for page in pages if page not in grouped}
    if grouped:
        parts[" ".join(grouped)] = partial(run_on_two_ranks, directory, grouped)
    failed = 0
    for name, part in sorted(parts.items()):
        begun = time.monotonic()
        status = in_child(part)
        print(f"ended with {status} after {time.monotonic() - begun:.1f} s: {name}", flush=True)
        failed += status != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
