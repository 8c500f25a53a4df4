"""The command ``stratagem plan``: what a run comes to in memory, messages and time, before it has a machine."""

import argparse
import json
import sys
from collections.abc import Sequence

from rich.console import Console, RenderableType

from ..planning.asking import MARGIN, PlanningError, plan_of_words
from ..planning.asking_all import choose_by_words, stands_for_candidates
from ..planning.choice_shown import choice_shown
from ..planning.devices import DEVICES, bytes_in
from ..planning.shown import shown
from ..printing import console_for_tables, say

SAYS = (
    "Plan a run: play one of its ranks in a process, with tensors that have no memory, and say what it would hold, "
    "send and compute in an update, and how fast it can be. Nothing is trained, and no GPU is needed. It takes what "
    "stratagem fit takes, the target and any option: stratagem fit --help lists them."
)


def add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand ``stratagem plan``, whose other words are those of ``stratagem fit``."""
    parser = commands.add_parser(
        "plan",
        add_help=False,
        prefix_chars="\0",  # the words are read below
        help="memory, messages and time of a run, before there is a machine for it",
    )
    parser.add_argument("words", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run_plan)


def own_parser() -> argparse.ArgumentParser:
    """Make the parser of the options that ``stratagem fit`` doesn't have."""
    parser = argparse.ArgumentParser(
        prog="stratagem plan",
        description=SAYS,
        usage="stratagem plan TARGET --world N --device NAME [--auto] [--nodes N] [--margin PART] [--json] "
        "[--option value ...]",
        epilog="Example: stratagem plan train.py:build --strategy fsdp2 --world 64 --device h100-80gb",
        allow_abbrev=False,
    )
    parser.add_argument("--world", type=int, default=1, metavar="N", help="ranks (default: %(default)s)")
    parser.add_argument(
        "--device", default="h100-80gb", metavar="NAME",
        help=f"that each rank has: {', '.join(DEVICES)}, cpu, or figures (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--nodes", type=int, metavar="N", help="that the ranks lie on (default: eight ranks on each)")
    parser.add_argument(
        "--margin", type=float, default=MARGIN, metavar="PART",
        help="the part of the device's memory that is to stay free (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--auto", action="store_true", help="plan all candidates for a strategy, and choose one")
    parser.add_argument(
        "--host-memory", metavar="SIZE",
        help='with --auto: the host\'s, for each rank, as "256GiB" (default: offloading is taken to fit there)',
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    return parser


def run_plan(options: argparse.Namespace) -> int:
    """Run ``stratagem plan``.

    Returns:
        0 where there is a plan, even one of a part; else another number.
    """
    parser = own_parser()
    own, words = parser.parse_known_args(options.words)
    if not words:
        parser.error("name what builds the module: stratagem plan train.py:build")
    try:
        if own.auto or stands_for_candidates(words):
            return run_auto(own, words)
        if own.host_memory:
            parser.error("--host-memory has no effect without --auto, which may choose to offload.")
        with Console(stderr=True).status("playing a rank"):
            plan = plan_of_words(words, own.world, own.device, own.nodes, own.margin)
    except ValueError as error:
        parser.error(str(error))
    except PlanningError as error:
        print(error, file=sys.stderr)
        return error.status or 1
    if own.json:
        say(json.dumps(plan.to_dict(), indent=2))
        return 0
    show(shown(plan, title_of(words, plan.world_size, plan.device.name, plan.nodes)))
    return 0


def run_auto(own: argparse.Namespace, words: Sequence[str]) -> int:
    """Plan all candidates, and print them and the one that is chosen.

    Raises:
        ValueError, PlanningError: nothing can be planned.
    """
    host_memory = None if own.host_memory is None else int(bytes_in(own.host_memory))
    plan = choose_by_words(words, own.world, own.device, own.nodes, own.margin, host_memory)
    if own.json:
        say(json.dumps({**plan.choice.to_dict(), "world_size": own.world, "nodes": plan.nodes}, indent=2))
        return 0
    show(choice_shown(plan.choice, title_of(words, own.world, plan.device.name, plan.nodes)))
    return 0


def title_of(words: Sequence[str], world_size: int, device: str, nodes: int) -> str:
    """Say what was planned."""
    return f"{' '.join(words)} on {world_size:,} x {device}" + (f" on {nodes:,} nodes" if nodes > 1 else "")


def show(what: RenderableType) -> None:
    """Print tables, as wide as the terminal."""
    console_for_tables().print(what)
