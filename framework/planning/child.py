"""The process in which a rank is played: ``python -m stratagem.framework.planning.child REQUEST ANSWER``.

It is a world of its own: what the user's functions import and set, and the group of ranks that aren't there, end with
it. Its environment says which rank of how many it is, as a launcher's would.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...strategies.base import Strategy
from ...strategies.materialize import parameters_on_meta
from ...strategies.played import Stage, cuts_of, play, world_of
from ..configuration.command_line import Command
from ..configuration.configuration import Configuration
from ..configuration.options import make_strategy
from ..configuration.targets import function_in, load_module
from .choosing import Candidate
from .playing import Player, where_it_stopped

WITHOUT_EFFECT: Mapping[str, Any] = {
    "devices": "auto",
    "max_restarts": 0,
    "progress": False,
    "fast_dev_run": False,
    "auto_find_batch_size": False,
    "requeue": False,
    "dataloader_num_workers": 0,
    "dataloader_persistent_workers": False,
    "dataloader_prefetch_factor": None,
    "torch_compile": False,
    "torch_compile_mode": "default",
    "torch_compile_backend": None,
}
"""Arguments of a run that a plan leaves out."""
NOT_COMPILED = "torch_compile isn't played: fused operators hold fewer activations, and take less time, than is said."
NO_GPU = "CUDA", "cuda", "HIP", "No XPU", "accelerator"  # in what torch says where there is none


def main(request: Path, answer: Path) -> None:
    """Play the rank that the environment says, and write its account, or what can't work, as JSON."""
    asked = json.loads(request.read_text(encoding="utf-8"))
    answer.write_text(json.dumps(answered(partial(played, asked))), encoding="utf-8")


def answered(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Play, and return what that gives, or as the "problem" what can't work."""
    try:
        return work()
    except (ValueError, TypeError, ImportError) as error:
        return {"problem": str(error)}


def played(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Play a rank.

    Args:
        asked: "config" (the path of a file) or "words" (of a command line), "fit" (the class, as "module:Class"),
            "ranks_per_node", and perhaps the "candidate" that takes the place of their strategy.

    Returns:
        The "account", and "cuts": how the module says that it can be cut, see ``cuts_of``.
    """
    rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    if asked["config"] is not None:
        run = Configuration.read(asked["config"])
    else:
        run = Command("stratagem plan", "", names_target=True).read(asked["words"])
    if asked.get("candidate") is not None:
        run = under(run, Candidate(**asked["candidate"]))
    strategy: Strategy = make_strategy(run.values.get("strategy", "single"), run.section("strategy"))
    module, name = load_module(asked["fit"])
    make_fit = function_in(module, name, asked["fit"])
    stage = Stage()
    with tempfile.TemporaryDirectory() as directory, world_of(rank, world_size):
        given = {**WITHOUT_EFFECT, "output_dir": directory, "strategy": play(strategy, stage), "loggers": ()}
        arguments, notes = made(run, given)
        fit = make_fit(**arguments)
        account = Player(fit, stage, asked["ranks_per_node"]).play().to_dict()
        cuts = cuts_of(fit.module)
        strategy.release(fit.module)
    if run.values.get("torch_compile"):
        notes.append(NOT_COMPILED)
    return {"account": {**account, "notes": [*account["notes"], *notes]}, "cuts": cuts}


def under(run: Configuration, candidate: Candidate) -> Configuration:
    """The run under a candidate: nothing is left of the strategy that files, or the program, had for it."""
    values = {name: value for name, value in run.values.items() if name.partition(".")[0] != "strategy"}
    options = {f"strategy.{name}": value for name, value in candidate.options.items()}
    return replace(run, values={**values, "strategy": candidate.strategy, **options, **candidate.changes})


def made(run: Configuration, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Call the user's functions, without memory for weights where that works.

    Returns:
        Fit's arguments, and what to say of it.

    Raises:
        ValueError: they need a device that isn't here, or fail otherwise; names the line.
    """
    try:
        with parameters_on_meta(set()):
            return run.fit_arguments(given), []
    except (ValueError, TypeError, ImportError):
        raise
    except Exception as error:
        first = where_it_stopped(error)
    try:
        return run.fit_arguments(given), [f"The module was made with its weights, since without them: {first}"]
    except Exception as error:
        target = run.target.name if run.target is not None else "the program"
        said = f"{target} can't make the module here: {where_it_stopped(error)}"
        if any(word in str(error) for word in NO_GPU):
            said += ". A plan is made on the CPU: leave out .cuda() and device='cuda'; Fit moves the module by itself."
        raise ValueError(said) from error


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
