"""What run.json says of a run when it begins: arguments, module, strategy, precision, host, versions."""

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any

from ..arguments import other_than_defaults
from .facts import device_of, host, program, versions
from .history import iso_of


def describe(fit: Any) -> dict[str, Any]:
    """Describe the run that a Fit is about to begin, as JSON types but for options that are objects.

    Args:
        fit: placed, with its run begun.
    """
    args, strategy, plan = fit.args, fit.strategy, fit.plan
    choice = fit.choice  # of strategy="auto"; else None
    return {
        "run_name": args.run_name,
        "output_dir": os.path.abspath(args.output_dir),
        "module": describe_module(fit),
        "strategy": {"name": strategy.name, "options": options_of(strategy.options), "is": repr(strategy)},
        "precision": {"name": strategy.precision.name, "is": repr(strategy.precision)},
        "world_size": strategy.world_size,
        "max_steps": fit.state.max_steps,
        "num_train_epochs": fit.state.num_train_epochs,
        "samples_per_update": fit.stream.global_micro_batch * plan.accumulated,
        "arguments": {
            "given": plan.given.to_dict(),
            "settled": args.to_dict(),
            "not_defaults": other_than_defaults(plan.given),
        },
        "host": host(),
        "device": device_of(strategy.device),
        "program": program(),
        "versions": versions(),
        **({} if choice is None else {"choice": choice.to_dict()}),
    }


def describe_session(fit: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a session that begins: when, where, from which update. ``facts`` are what ``describe`` returned."""
    directory, state = fit.saver.directory, fit.state
    session = {
        "kind": "resume" if state.global_step else "begin",
        "began": iso_of(time.time()),
        "update": state.global_step,
        "state": "running",
        "host": facts["host"]["name"],
        "process": facts["host"]["process"],
        "world_size": facts["world_size"],
        "command": facts["program"]["command"],
    }
    if directory.resumed_from is not None:
        session["resumed_from"] = directory.resumed_from
    return session


def describe_module(fit: Any) -> dict[str, Any]:
    """The module's class, and the numbers of its parameters, by child, too."""
    name, counts = fit.placement.layers[0].kind, fit.placement.parameters
    # FSDP2 puts a class of its own before the user's.
    kind = next((each for each in type(fit.module).__mro__ if each.__name__ == name), type(fit.module))
    children = {name: {"trainable": child.trainable, "frozen": child.frozen} for name, child in counts.children.items()}
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "trainable": counts.trainable,
        "frozen": counts.frozen,
        "children": children,
    }


def options_of(options: Any) -> Mapping[str, Any]:
    """The fields of a strategy's options, as they are."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
