"""A resumed run beside the one that was saved: arguments that differ are said, and data in another order is refused."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..agreement import on_all_ranks
from ..arguments import FitArguments
from ..module import TrainModule
from ..printing import say
from .run import Run

# Their values are in the optimizer's groups, which a checkpoint holds.
OF_THE_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
# Their values make the schedule's curve, which a checkpoint doesn't hold: the run's own counts, over saved peaks.
OF_THE_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio")
WAY_OUT = "set ignore_data_skip=True, and the epoch begins anew"


def compare(run: Run, module: TrainModule, path: Path, state: Mapping[str, Any]) -> None:
    """Say once, on the main process, what differs between a run and the checkpoint that it goes on from. Collective.

    Args:
        run: not begun yet.
        module: of the run.
        path: the checkpoint.
        state: what ``checkpoint.read_state`` gave for it.

    Raises:
        CheckpointError: the optimizer is another; or the checkpoint was saved in mid-epoch, and the samples that are
            left couldn't be told from those that were used.
    """
    said: list[str] = []

    def look() -> None:
        if run.strategy.is_main:
            of_turns = state.get("turns", {}).get("steppings", {})
            for turn, stepping in run.steppings.items():
                saved = of_turns.get(turn, {}).get("optim") if turn else state["arguments"].get("optim")
                check_optimizer_name(stepping.args.optim, module, path, saved)
            said.extend([*argument_differences(run.args, state), *data_differences(run, path, state)])
            said.extend(callback_differences(run, state))

    on_all_ranks(run.strategy, look, checkpoint.CheckpointError)
    for line in said:
        say(f"Resuming from {path}: {line}", sys.stderr)


def check_optimizer_name(optim: str, module: TrainModule, path: Path, saved: str | None) -> None:
    """Refuse an ``optim`` by another name, where the module doesn't make its optimizer by itself: adam and adamw, for
    two, have the same options.

    Raises:
        CheckpointError: names both.
    """
    makes_its_own = type(module).configure_optimizer is not TrainModule.configure_optimizer
    if saved is not None and saved != optim and not makes_its_own:
        raise checkpoint.CheckpointError(
            f"{path} was saved with another optimizer: optim={saved!r}; this run has optim={optim!r}. Write "
            f"optim={saved!r}, or begin a new run from its weights."
        )


def argument_differences(args: FitArguments, state: Mapping[str, Any]) -> list[str]:
    """What differs, and which of the two counts."""
    here, saved = args.to_dict(), state["arguments"]

    def different(names: tuple[str, ...]) -> str:
        return "; ".join(
            f"{name} is {here[name]!r} here, {saved[name]!r} in the checkpoint"
            for name in names
            if name in saved and saved[name] != here[name]
        )

    found = []
    if args.resume_with == "checkpoint":
        counts = "The checkpoint's count; resume_with='arguments' lets this run's count."
    else:
        counts = "This run's count, as resume_with='arguments' says."
    optimizer, schedule = different(OF_THE_OPTIMIZER), different(OF_THE_SCHEDULE)
    if optimizer:
        found.append(f"{optimizer}. {counts}")
    if schedule:
        plateau = "reduce_lr_on_plateau" in (here["lr_scheduler_type"], saved.get("lr_scheduler_type"))
        found.append(f"{schedule}. {counts if plateau else 'The schedule has the shape of this run.'}")
    if saved.get("seed") != here["seed"]:
        found.append(
            f"seed is {here['seed']!r} here, {saved.get('seed')!r} in the checkpoint. Random numbers go on from the "
            "checkpoint's states."
        )
    return found


def data_differences(run: Run, path: Path, state: Mapping[str, Any]) -> list[str]:
    """What differs in the order of samples, at the beginning of an epoch or where it begins anew.

    Raises:
        CheckpointError: it was saved in mid-epoch, which this run is to continue.
    """
    saved, arguments = state["data"], state["arguments"]
    here = run.stream.describe(reads_samples=saved.get("fingerprint") is not None)
    if "kind" not in saved:  # format 1: what its arguments say
        data_seed = arguments.get("data_seed")
        saved = {
            "seed": arguments.get("seed") if data_seed is None else data_seed,
            "shuffle": arguments.get("shuffle"),
            "workers": arguments.get("dataloader_num_workers"),
            **saved,
        }
        if run.args.shuffle != here["shuffle"] or run.args.dataloader_num_workers != here["workers"]:
            saved = {**saved, "shuffle": here["shuffle"], "workers": here["workers"]}  # a ready DataLoader's own
    compared = {
        "kind": "another kind of stream",
        "length": "another number of samples (is it another dataset?)",
        "fingerprint": "another first or last sample (is it another dataset?)",
        "shuffle": "another order of samples",
    }
    if here["shuffle"] or here["kind"] != "MapStream":
        compared["seed"] = "another order of samples (data_seed, or else seed)"
    # Samples that we share among workers come in the order of no workers; a dataset that shares them itself doesn't.
    if here["kind"] == "IterableStream" and saved.get("sharing_workers", saved.get("workers")):
        compared["workers"] = "another number of workers (dataloader_num_workers), which take turns in another order"
    if here["kind"] == "PartsStream":
        compared["ranks"] = "another number of ranks, each of which has a part of its own"
        compared["workers"] = "another number of workers (dataloader_num_workers), each of which has a part of its own"
        compared["batch_size"] = "another batch size, in whole numbers of which each part was read"
    if here["kind"] == "LoaderStream":
        compared["batch_size"] = "another batch size of the DataLoader, whose batches are counted"
    differences = [
        f"{why}: {here[name]!r:.20} here, {saved[name]!r:.20} in the checkpoint"
        for name, why in compared.items()
        if name in saved
        and saved[name] != here[name]
        and not (name == "fingerprint" and None in (saved[name], here[name]))
    ]
    position = state["data"]["position"]
    samples = run.stream.capacity()
    if samples is not None and position > samples:
        differences.append(f"the checkpoint stands at {position}, and there are {samples}")
    if not differences:
        return []
    if position and not run.args.ignore_data_skip:
        raise checkpoint.CheckpointError(
            f"{path} was saved in the middle of an epoch, and this run's data has {'; '.join(differences)}. Samples "
            f"would be seen twice or never. Give it the data that it had; or {WAY_OUT}."
        )
    return [f"the data has {'; '.join(differences)}. This run's count, from the beginning of an epoch on."]


def callback_differences(run: Run, state: Mapping[str, Any]) -> list[str]:
    """Callbacks that have a state on one side only."""
    saved, here = state["callbacks"], run.callbacks.stateful()
    gone, new = [name for name in saved if name not in here], [name for name in here if name not in saved]
    found = []
    if gone:
        found.append(f"it holds the state of {', '.join(gone)}, and this run has no such callback: it isn't used.")
    if new:
        found.append(f"it holds no state of {', '.join(new)}, which begins anew.")
    return found
