"""What is checked once, when a Fit is made: where it writes, and that every rank was given the same."""

from pathlib import Path
from typing import Any

from ..strategies.base import Strategy
from . import checkpoint
from .agreement import check_ranks_agree, on_all_ranks
from .steps import Steps


def check_output_dir(output_dir: str) -> None:
    """Refuse an ``output_dir`` that is a file, or lies below one.

    Raises:
        ValueError: names the file.
    """
    path = Path(output_dir)
    taken = next((each for each in (path, *path.parents) if each.is_file()), None)
    if taken is not None:
        raise ValueError(f"output_dir={output_dir!r} can't be a directory: {str(taken)!r} is a file.")


def check_can_save(strategy: Strategy, output_dir: str) -> None:
    """Refuse an ``output_dir`` that can't be written to now, not at the first checkpoint. Collective.

    Raises:
        ValueError: on every rank; the message names the directory and the reason.
    """

    def check() -> None:
        if strategy.is_main:
            checkpoint.check_can_write(Path(output_dir))

    on_all_ranks(strategy, check, ValueError)


def check_ranks_were_given_the_same(fit: Steps) -> None:
    """Compare what every rank was given. Collective; fails on all ranks or on none.

    Raises:
        ValueError: names what differs.
    """
    check_ranks_agree(
        fit.strategy,
        {
            "argument": fit.args.to_dict(),
            "Fit": {"strategy": repr(fit.strategy), "precision": repr(fit.strategy.precision)},
            "data": {"train_data": length(fit.train_data), "eval_data": length(fit.eval_data)},
            "parameter": {name: f"{tuple(p.shape)} {p.dtype}" for name, p in fit.module.named_parameters()},
        },
    )


def length(data: Any) -> int | None:
    """The number of samples, or batches of a loader; None where there is none."""
    try:
        return len(data)
    except TypeError:
        return None
