"""The command ``stratagem fit``: trains what a function builds, as files and the command line configure it."""

import argparse

from ..configuration.command_line import Command
from ..fit import Fit
from ..printing import say

EPILOG = """The function returns a TrainModule, and data() beside it the training data, or (training data, evaluation
data); or it returns a mapping of Fit's arguments. What both take are options, too: --build.width 256. A file of options
that names its target may stand in the place of TARGET."""


def add_fit(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand ``stratagem fit``, whose words jsonargparse reads."""
    parser = commands.add_parser(
        "fit",
        add_help=False,
        prefix_chars="\0",  # all words are the command's own
        help="train what a function builds, configured by files and options; stratagem fit --help lists them",
    )
    parser.add_argument("words", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run_fit)


def run_fit(options: argparse.Namespace) -> int:
    """Run ``stratagem fit``: train, evaluate where there is evaluation data, and print what that gave."""
    run = command().read(options.words)
    with Fit.from_config(run) as fit:
        fit.train(resume_from_checkpoint=run.resume)
        if fit.eval_data is not None:
            metrics = fit.evaluate()
            if fit.strategy.is_main and not fit.args.progress:
                say(" | ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items()))
    return 0


def command() -> Command:
    """The command, for who lists its options."""
    says = f"Train what TARGET builds: path/to/file.py:function or package.module:function. {' '.join(EPILOG.split())}"
    return Command("stratagem fit", says, names_target=True)
