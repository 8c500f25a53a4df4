"""The console command ``stratagem``, with a subcommand for each task."""

import argparse
import sys
from collections.abc import Sequence

from .commands.completion import add_completion
from .commands.convert import add_convert
from .commands.fit import add_fit
from .commands.launch import add_launch
from .commands.parity import add_parity
from .commands.plan import add_plan
from .commands.report import add_report
from .commands.watch import add_watch
from .version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the words of the command line; None takes those of this process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="stratagem", description="Tools for modules trained by stratagem.")
    parser.add_argument("--version", action="version", version=f"stratagem {__version__}")
    parser.set_defaults(run=lambda _: parser.print_help())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for add in (add_fit, add_plan, add_launch, add_watch, add_report, add_convert, add_parity, add_completion):
        add(commands)
    options = parser.parse_args(arguments)
    return options.run(options) or 0


if __name__ == "__main__":
    sys.exit(main())
