"""The command ``stratagem launch``: a script on several ranks of this machine, under the supervisor."""

import argparse
import sys

from ...strategies.launch import range_of, run_on_ranks
from ..configuration.options import devices
from ..fields.argument_ranges import PREEMPTION_SIGNALS, names_in


def add_launch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand ``stratagem launch``."""
    parser = commands.add_parser(
        "launch",
        help="run a script on several ranks of this machine",
        description=(
            "Run a script on several ranks of this machine, and end with their status. A Fit in it finds them, as "
            "under torchrun. Unlike Fit(devices=2), no line of the script runs in the process that starts the ranks."
        ),
        epilog="Example: stratagem launch --devices 2 train.py --learning_rate 3e-4",
    )
    parser.add_argument(
        "--devices", default="auto", metavar="N",
        help="ranks; \"1:2\" goes on without one that was killed (default: one for each accelerator)",
    )  # fmt: skip
    parser.add_argument(
        "--max_restarts", "--max-restarts", type=int, default=0, metavar="N",
        help="how often the ranks are started again after one failed (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--signals", default="", metavar="NAMES",
        help=f"passed on to the ranks beside SIGTERM and SIGINT, with commas: {', '.join(PREEMPTION_SIGNALS[1:])}",
    )  # fmt: skip
    parser.add_argument("-m", dest="is_module", action="store_true", help="the script is the name of a module")
    parser.add_argument("script", help="a file of Python, or with -m a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    parser.set_defaults(run=run_launch, parser=parser)


def run_launch(options: argparse.Namespace) -> int:
    """Run ``stratagem launch``, and return the status of the ranks."""
    parser: argparse.ArgumentParser = options.parser
    unknown = [name for name in names_in(options.signals) if name not in PREEMPTION_SIGNALS]
    if unknown:
        parser.error(f"--signals takes {', '.join(PREEMPTION_SIGNALS)}. Received: {', '.join(unknown)}")
    try:
        fewest, most = range_of(devices(options.devices)) or (None, None)
        script = ["-m", options.script] if options.is_module else [options.script]
        command = [sys.executable, *interpreter_options(), *script, *options.arguments]
        return run_on_ranks(command, fewest, most, options.max_restarts, names_in(options.signals))
    except ValueError as error:
        parser.error(str(error))


def interpreter_options() -> list[str]:
    """Return the options that this Python was started with, for those that it starts: -u, -X, -W."""
    words = sys.orig_argv[1:]
    end = next((number for number, word in enumerate(words) if not word.startswith("-") or word in ("-m", "-c")), 0)
    return words[:end]
