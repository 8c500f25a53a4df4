"""The command ``stratagem completion``: the completion of all commands and their options, for a shell."""

import argparse
from typing import Literal, get_args, get_origin

from ...precision.registry import ALIASES as PRECISION_ALIASES
from ...precision.registry import PRECISIONS
from ...strategies.registry import ALIASES, STRATEGIES
from ..configuration.options import Option, fit_options
from ..printing import say

SHELLS = ("bash", "zsh", "tcsh")
WORDS = {"strategy": [*STRATEGIES, *ALIASES], "precision": [*PRECISIONS, *PRECISION_ALIASES]}
OWN = ("--help", "--config", "--print_config", "--resume")


def add_completion(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand ``stratagem completion``."""
    parser = commands.add_parser(
        "completion",
        help="print the completion of stratagem's commands and options for a shell",
        description="Print what completes stratagem's commands and options, by shtab (the extra cli).",
        epilog="Example: stratagem completion bash > ~/.local/share/bash-completion/completions/stratagem",
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=run_completion, parser=parser, commands=commands)


def run_completion(options: argparse.Namespace) -> int:
    """Run ``stratagem completion``."""
    try:
        import shtab
    except ImportError:
        options.parser.error("this needs shtab: pip install 'stratagem[cli]'")
    root = argparse.ArgumentParser(prog="stratagem")
    commands = root.add_subparsers()
    for name, parser in options.commands.choices.items():
        if name == "fit":
            parser = argparse.ArgumentParser(add_help=False)
            for name_of_own in OWN:
                parser.add_argument(name_of_own)
            for option in fit_options():
                parser.add_argument(f"--{option.name}", choices=choices_of(option), help=option.says.replace("%", "%%"))
        commands.add_parser(name, parents=[parser], add_help=False, help=name)  # shtab leaves out what has no help
    say(shtab.complete(root, options.shell))
    return 0


def choices_of(option: Option) -> list[str] | None:
    """Return the words that an option takes; None where it takes others, too."""
    if option.kind is bool:
        return ["true", "false"]
    if get_origin(option.kind) is Literal:
        return [str(word) for word in get_args(option.kind)]
    return WORDS.get(option.name)
