"""fast_dev_run: what is said of a run that is only tried, and what it can't be."""

import sys
from typing import Any

from ...strategies.base import Strategy
from ..arguments import FitArguments
from ..printing import say


def begin_trying(args: FitArguments, strategy: Strategy, resume_from_checkpoint: Any) -> None:
    """Say what a run of ``fast_dev_run`` leaves out.

    Args:
        args: of the run, its length settled.
        strategy: set up.
        resume_from_checkpoint: as ``train`` was given it.

    Raises:
        ValueError: it was to go on from a checkpoint.
    """
    updates = args.fast_dev_run
    if resume_from_checkpoint:
        raise ValueError(
            f"fast_dev_run={updates} tries the first updates of a run, and "
            f"train(resume_from_checkpoint={resume_from_checkpoint!r}) goes on with one. Leave one of them out."
        )
    if strategy.is_main:
        count = "1 update" if updates == 1 else f"{updates} updates"
        batches = "1 batch" if updates == 1 else f"{updates} batches"
        say(
            f"fast_dev_run={updates}: {count} of {args.max_steps}, evaluations of {batches}, no checkpoints, no "
            f"loggers; nothing is written to {args.output_dir}.",
            sys.stderr,
        )
