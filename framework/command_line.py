"""The console command ``stratagem``, with a subcommand for each task."""

import argparse
import sys
from collections.abc import Sequence

from .commands.completion import add_completion
from .commands.fit import add_fit
from .commands.launch import add_launch
from .commands.parity import add_parity


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the words of the command line; None takes those of this process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="stratagem", description="Tools for modules trained by stratagem.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (add_fit, add_launch, add_parity, add_completion):
        add(commands)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
