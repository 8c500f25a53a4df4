"""A comparison of what ranks should hold alike, after the first update and, with debug="ranks_agree", at logs."""

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...precision.complex_numbers import as_real
from ...strategies.base import Strategy
from ...strategies.duplicates import Part, fingerprints
from ...strategies.local_parts import local_part
from ..arguments import FitArguments
from ..callbacks import Callback
from ..state import Control, TrainState

NAMED = 10  # how many tensors the error names
SAMPLED = 4096  # how many entries of a tensor are compared by value, to tell rounding from other differences
ROUNDING = 4.0  # differences up to this, in units in the last place of the largest entry, may be rounding

Held = tuple[str, Part]
Print = tuple[int, tuple[int, ...]]  # (fingerprint, shape)


class RanksAgree(Callback):
    """Ends a run, after its first update, whose ranks hold different numbers where they should hold the same.

    The callback compares once, after the first update that moved a weight, and stops listening then, so that later
    updates cost nothing.

    Args:
        at_logs: compare again at each log of training.

    Raises:
        RuntimeError: the message names the tensors and ranks that differ.
    """

    def __init__(self, at_logs: bool = False) -> None:
        self.at_logs = at_logs

    def on_train_begin(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Listen, in a second ``train`` too, for the end of the first update."""
        fit.callbacks.listen("on_step_end", self)

    def on_step_end(self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any) -> None:
        """Compare, unless the update moved nothing: warm-up begins at a rate of 0, and some updates are left out."""
        if not float(state.learning_rate) or fit.run.transaction.was_skipped():
            return
        fit.callbacks.stop_listening("on_step_end", self)
        check_replicas(fit.strategy, state.global_step)

    def on_log(
        self,
        args: FitArguments,
        state: TrainState,
        control: Control,
        *,
        fit: Any,
        logs: dict[str, float],
        **context: Any,
    ) -> None:
        """Compare again where ``at_logs`` asks for it."""
        if self.at_logs and "loss" in logs:
            check_replicas(fit.strategy, state.global_step)


def check_replicas(strategy: Strategy, update: int) -> None:
    """Compare, to the bit, what several ranks should hold alike. Collective; fails on all ranks or on none.

    The hosts exchange one small message, and two more where something differs, to name it. Differences of a few units
    in the last place are only warned about: processors of another kind, and kernels that add in no fixed order, round
    differently.

    Args:
        strategy: it has placed the module.
        update: the update that was made last, for the message.

    Raises:
        RuntimeError: the message names the tensors and ranks that differ.
    """
    strategy.settle()
    held: dict[Held, Tensor] = {(name, part): tensor for name, tensor, part in strategy.replicated()}
    prints = fingerprints(list(held.values()))
    mine = {key: (found, tuple(held[key].shape)) for key, found in zip(held, prints, strict=True)}
    if all(len(set(found)) == 1 for found in group_by_part(strategy.gather(digests(mine))).values()):
        return
    everyones: list[Mapping[Held, Print]] = strategy.gather(mine)
    others = find_differences(everyones)
    if not others:
        return
    values = strategy.gather({key: sample_entries(held[key]) for key in list(others)[:NAMED] if key in held})
    sizes = {
        key: measure_difference([values[rank][key] for rank in (first, *ranks)])
        for key, (first, ranks) in list(others.items())[:NAMED]
    }
    lines = [describe_difference(key, others[key], sizes[key]) for key in sizes]
    more = f"\n  and {len(others) - NAMED} more" if len(others) > NAMED else ""
    count = len({key for found in everyones for key in found})
    text = (
        f"After update {update}, {len(others)} of {count} tensors that several ranks hold aren't the same on them:\n  "
        + "\n  ".join(lines)
        + more
        + "\n"
    )
    if all(0 < units <= ROUNDING for _, _, units in sizes.values()):
        warnings.warn(f"{text}They differ by rounding, and drift apart: {strategy.replicas_differ}", stacklevel=2)
        return
    raise RuntimeError(f"{text}What is trained is another model on each rank. {strategy.replicas_differ}")


def digests(held: Mapping[Held, Print]) -> dict[Part, str]:
    """Return a digest, for each part, of all tensors that a rank holds of that part."""
    lines: dict[Part, list[str]] = defaultdict(list)
    for (name, part), found in held.items():
        lines[part].append(f"{name} {found}")
    return {part: hashlib.sha256("\n".join(said).encode()).hexdigest() for part, said in lines.items()}


def group_by_part(everyones: Sequence[Mapping[Part, str]]) -> dict[Part, list[str]]:
    """Group the digests of all ranks by part."""
    found: dict[Part, list[str]] = defaultdict(list)
    for said in everyones:
        for part, digest in said.items():
            found[part].append(digest)
    return found


def find_differences(everyones: Sequence[Mapping[Held, Print]]) -> dict[Held, tuple[int, list[int]]]:
    """Find the tensors that aren't the same on all ranks that hold them.

    Ranks on which a tensor has another shape aren't compared. Parameters never have; a buffer that does is each rank's
    own.

    Returns:
        Of each tensor that differs: the first rank that holds it, and the ranks with other numbers than that one.
    """
    first: dict[tuple[Held, tuple[int, ...]], int] = {}
    others: dict[Held, tuple[int, list[int]]] = {}
    for rank, held in enumerate(everyones):
        for key, found in held.items():
            theirs = first.setdefault((key, found[1]), rank)
            if everyones[theirs][key] != found:
                others.setdefault(key, (theirs, []))[1].append(rank)
    return others


def sample_entries(tensor: Tensor) -> tuple[list[float], float]:
    """Return some of a tensor's numbers, evenly spread, and the spacing of its dtype at 1 (0 for integers)."""
    flat = local_part(tensor).detach().reshape(-1)
    flat = as_real(flat).reshape(-1)
    few = flat[:: max(1, len(flat) // SAMPLED)].to("cpu", torch.float64)
    return few.tolist(), torch.finfo(flat.dtype).eps if flat.is_floating_point() else 0.0


def measure_difference(samples: Sequence[tuple[list[float], float]]) -> tuple[float, float, float]:
    """Return the largest difference to the first rank's numbers, the largest of these, and that difference in units in
    the last place of that number (infinite for integers).
    """
    (first, unit), *rest = samples
    theirs = torch.tensor(first, dtype=torch.float64)
    apart = max(float((torch.tensor(v, dtype=torch.float64) - theirs).abs().max()) for v, _ in rest)
    largest = float(theirs.abs().max())
    return apart, largest, apart / (unit * largest) if unit * largest else float("inf")


def describe_difference(key: Held, ranks: tuple[int, list[int]], size: tuple[float, float, float]) -> str:
    """Describe, in a line of the error, how one tensor differs."""
    name, part = key
    first, others = ranks
    where = f"rank {others[0]} differs" if len(others) == 1 else f"ranks {', '.join(map(str, others))} differ"
    what = f"shard {', '.join(map(str, part))} of {name}" if part else name
    return f"{what}: {where} from rank {first} by up to {size[0]:.1e} (the largest entry is {size[1]:.1e})"
