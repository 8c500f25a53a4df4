"""Which updates are made: those whose gradients aren't finite, or whose norm is a spike, are left out, and said.

What is decided is the same on all ranks, since the norm is. On the CPU the host decides, by one comparison. On an
accelerator a flag is computed there: a fused optimizer reads it, and the host learns of it an update later.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ...precision.device_flag import DeviceFlag
from ...strategies.base import Strategy
from ..arguments import FitArguments
from ..optim.lomo import updates_in_backward
from ..printing import say
from .spikes import DeviceSpikeRule, SpikeRule

SAID = 5  # updates of which a log says more than how many they were
INDICES = 16  # samples that are named
ADVICE = (
    "What to try: look at those samples; debug='underflow_overflow', which ends the run at the first layer that "
    "computes an inf or NaN; a lower learning_rate or a longer warmup; precision='32-true'."
)

Indices = Callable[[int, int, int], Sequence[int] | None]
"""(epoch, first position, position after the last) to indices into the dataset; None where they aren't known."""


class SkippedUpdatesError(RuntimeError):
    """A run ended because its updates can't be made: gradients that aren't finite, or spikes, one after the other."""


@dataclass(frozen=True)
class Attempt:
    """An update as it was tried.

    Attributes:
        update: its number, from 1.
        epoch, begin, end: the positions of its samples in the order of an epoch, the last one not included.
        norm: of its gradients; None where they aren't clipped.
        loss: of this rank, 0-dim.
        suspects: names the parameters whose gradients weren't finite on this rank.
        spike: what the norm is above, where that is why.
        number: see ``Run.attempts``.
    """

    update: int
    epoch: int
    begin: int
    end: int
    norm: Tensor | None
    loss: Tensor
    suspects: Callable[[], list[str]] | None
    spike: str | None = None
    number: int = 0

    def evidence(self) -> tuple[bool, list[str]]:
        """What this rank knows of the cause: whether its loss is finite, and whose gradients aren't."""
        is_finite = math.isfinite(self.loss.item())
        return is_finite, [] if self.suspects is None or self.spike else self.suspects()


class Transaction:
    """Decides for each update whether it is made; counts those that aren't, says which, and ends a run of too many.

    Args:
        args: of the run.
        strategy: set up.
        indices: finds the samples of an update.
        turn: the name of the turn that they are; "" where updates are made in one.

    Attributes:
        looks: whether gradients are looked at that nobody clips.
        in_a_row: updates since the last that was made.
        must_end: whether the run can't go on; ``failure`` says why.
    """

    def __init__(self, args: FitArguments, strategy: Strategy, indices: Indices, turn: str = "") -> None:
        self.args, self.strategy, self.indices = args, strategy, indices
        self.kind = f"turns {turn!r}" if turn else "updates"
        self.of_turn = f"turn {turn!r} of " if turn else ""
        self.on_host = strategy.reads_at_once
        self.looks = not (args.max_grad_norm or strategy.judges_gradients)
        self.spikes: SpikeRule | None = None
        if args.spike_updates is not None:
            on_device = DeviceSpikeRule(args.spike_updates, strategy.device)
            self.spikes = SpikeRule(args.spike_updates) if self.on_host else on_device
        self.suspects: Callable[[], list[str]] | None = None
        self.is_spike = False
        self.in_a_row = 0
        self.began = ""  # how the row began, in words
        self.first: Attempt | None = None  # the same, before it was put into words
        self.must_end = False
        self._why = ""
        self._refused: bool | DeviceFlag = False
        self._unsaid: list[Attempt] = []
        self._unsaid_more = 0

    def say_what_it_cannot(self, optimizer: Optimizer) -> None:
        """Say on the main process where an optimizer moves parameters before anybody knows all gradients."""
        if updates_in_backward(optimizer) and self.strategy.is_main:
            say(
                f"{type(optimizer).__name__} updates parameters in backward, before all gradients are known: updates "
                "that aren't finite are made all the same, and end the run at the next checkpoint.",
                sys.stderr,
            )

    # Deciding.

    def judge(self, norm: Tensor | None) -> bool | Tensor:
        """Decide whether an update is made, between its last backward and its step.

        Args:
            norm: of its gradients, equal on all ranks; or any number that isn't finite where a gradient isn't. None
                where the strategy judges alone.

        Returns:
            False where the step is to be made, True where not; or a flag on the device, see ``Strategy.step``.
        """
        self.is_spike, self.suspects, self._refused = False, None, False
        if norm is None:
            return False
        if not self.on_host:
            return self._judge_on_device(norm)
        value = norm.item()
        if math.isfinite(value):
            if self.spikes is not None and self.spikes.refuses(value):
                self.is_spike = self._refused = True
            return self.is_spike
        self.suspects = self.strategy.suspects()
        self._refused = not self.strategy.judges_gradients
        return self._refused

    def _judge_on_device(self, norm: Tensor) -> bool | Tensor:
        self.suspects = self.strategy.suspects()
        flag = None if self.strategy.judges_gradients else norm.mul(0.0).ne_(0.0).float()
        if isinstance(self.spikes, DeviceSpikeRule):
            spike = self.spikes.flag(norm)
            flag = spike if flag is None else flag.maximum(spike)
        if flag is None:
            return False
        self._refused = DeviceFlag(flag)
        return flag

    def was_skipped(self) -> bool:
        """Whether the update that was judged last was left out. Waits at most for that update, never for later work."""
        refused = self._refused
        if refused is True or (isinstance(refused, DeviceFlag) and refused.is_up()):
            return True
        return self.strategy.step_was_skipped()

    # Counting.

    def note_skipped(self, attempt: Attempt) -> None:
        """Count an update that was left out."""
        self.in_a_row += 1
        if self.in_a_row == 1:
            self.first, self.began = attempt, ""
        if len(self._unsaid) < SAID:
            self._unsaid.append(attempt)
        else:
            self._unsaid_more += 1
        if self.args.nonfinite_updates == "raise" and not self.is_finite(attempt):
            self._end(attempt, "nonfinite_updates='raise'")
        elif self.in_a_row >= self.args.max_skipped_updates:
            row = f"{self.in_a_row} {self.kind} in a row were not made, up to update {attempt.update}"
            self._end(self.first, f"{row} (max_skipped_updates={self.args.max_skipped_updates})")
        elif self.on_host:
            self.look_at_scale()

    def is_finite(self, attempt: Attempt) -> bool:
        """Whether the gradients of an update that was left out are finite: it was a spike."""
        if attempt.norm is None:
            return False
        return math.isfinite(attempt.norm.item())

    def look_at_scale(self) -> None:
        """End the run where a loss scale is so small that gradients are lost. It may wait for the device."""
        if self.in_a_row and self.strategy.precision.is_at_floor():
            values = ", ".join(f"{name} {value:g}" for name, value in self.strategy.precision.log_values().items())
            self._end(
                self.first,
                f"{self.in_a_row} {self.kind} in a row overflowed, and the loss scale of precision="
                f"{self.strategy.precision.name!r} has fallen to its floor ({values})",
            )

    def end_row(self) -> None:
        """Note that an update was made again."""
        self.in_a_row, self.first, self.began = 0, None, ""

    def _end(self, attempt: Attempt | None, why: str) -> None:
        self.must_end, self._why = True, why
        if attempt is not None and attempt is not self.first:
            self.first, self.began = attempt, ""

    def failure(self) -> SkippedUpdatesError:
        """Return the error that ends the run, the same on all ranks. Collective."""
        self._put_into_words()
        return SkippedUpdatesError(f"The run ends: {self._why}. It began so: {self.began} {ADVICE}")

    # Saying.

    def say(self) -> None:
        """Say on the main process which updates were left out since this was called last. Collective where any was."""
        attempts, more = self._unsaid, self._unsaid_more
        self._unsaid, self._unsaid_more = [], 0
        if not attempts:
            return
        for text in self.describe(attempts):
            if text and self.strategy.is_main:
                say(text, sys.stderr)
        if more and self.strategy.is_main and not self.strategy.precision.scales_loss:
            say(f"{more} more {self.kind} since the last log were not made.", sys.stderr)

    def describe(self, attempts: Sequence[Attempt], always: bool = False) -> list[str]:
        """Put updates that were left out into words. Collective.

        Args:
            attempts: the same on every rank.
            always: also put into words an overflow of scaled gradients, by which a loss scale is found: the loss was
                finite, and nothing is wrong.

        Returns:
            A text for each, empty where there is nothing to say.
        """
        everyones = self.strategy.gather([attempt.evidence() for attempt in attempts])
        by_attempt = list(zip(*everyones, strict=True))
        is_scaled = self.strategy.precision.scales_loss and not always
        return [
            "" if is_scaled and not attempt.spike and all(is_finite for is_finite, _ in evidence)
            else self._sentence(attempt, evidence)
            for attempt, evidence in zip(attempts, by_attempt, strict=True)
        ]  # fmt: skip

    def _sentence(self, attempt: Attempt, evidence: Sequence[tuple[bool, list[str]]]) -> str:
        norm = None if attempt.norm is None else attempt.norm.item()
        if attempt.spike or (norm is not None and math.isfinite(norm)):
            why = f"its gradients' norm is {norm:.6g}, more than {attempt.spike or self._threshold()}"
        elif norm is None:
            why = "not all of its gradients are finite"
        else:
            why = f"its gradients' norm is {norm}"
        parts = [f"{self.of_turn}update {attempt.update} was not made, as {why}", self._samples(attempt)]
        bad = [str(rank) for rank, (is_finite, _) in enumerate(evidence) if not is_finite]
        if bad:
            where = f" on rank {' and '.join(bad)}" if len(bad) < len(evidence) else " on any rank"
            parts.append(f"the loss isn't finite{where if len(evidence) > 1 else ''}")
        suspicion = first_suspect([names for _, names in evidence], self._order())
        if suspicion:
            parts.append(suspicion)
        sentence = "; ".join(parts)
        return f"{sentence[0].upper()}{sentence[1:]}."

    def _threshold(self) -> str:
        return f"{self.args.spike_updates:g} standard deviations above its running mean"

    def _samples(self, attempt: Attempt) -> str:
        last = attempt.end - 1
        positions = f"position {last}" if attempt.begin >= last else f"positions {attempt.begin} to {last}"
        said = f"its samples have the {positions} in the order of epoch {attempt.epoch}"
        if not self.strategy.is_main:
            return said
        found = self.indices(attempt.epoch, attempt.begin, attempt.end)
        if found is None:
            return said
        shown = ", ".join(str(int(index)) for index in found[:INDICES])
        return f"{said}: {shown}{', ...' if len(found) > INDICES else ''} of the dataset"

    def _order(self) -> list[str]:
        parameters: dict[str, nn.Parameter] = self.strategy.named_parameters()
        return list(parameters)

    def _put_into_words(self) -> None:
        if self.first is not None and not self.began:
            (self.began,) = self.describe([self.first], always=True)

    # What a checkpoint holds of it.

    def state_dict(self) -> dict[str, Any]:
        """Return the running values as JSON types. Collective where an update was left out just before."""
        self._put_into_words()
        spikes = None if self.spikes is None else self.spikes.state_dict()
        return {"in_a_row": self.in_a_row, "began": self.began, "spikes": spikes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.in_a_row, self.began, self.first = state["in_a_row"], state["began"], None
        if self.spikes is not None and state["spikes"] is not None:
            self.spikes.load_state_dict(state["spikes"])


def first_suspect(by_rank: Sequence[Sequence[str]], order: Sequence[str]) -> str:
    """Name the parameter at which gradients stopped to be finite: of those whose aren't, the last one in the module's
    order, since backward goes from the end to the beginning.

    Args:
        by_rank: for each rank, the parameters whose gradients there aren't finite.
        order: all names, in the module's order.
    """
    found = {name for names in by_rank for name in names}
    if not found:
        return ""
    place = {name: number for number, name in enumerate(order)}
    first = max(found, key=lambda name: place.get(name, -1))
    ranks = [str(rank) for rank, names in enumerate(by_rank) if first in names]
    where = "" if len(by_rank) == 1 else f" on rank {' and '.join(ranks)}"
    if len(by_rank) > 1 and len(ranks) == len(by_rank):
        where = " on every rank, where they are summed"
    others = f", and of {len(found) - 1} more parameters" if len(found) > 1 else ""
    return f"the first gradient in backward that isn't finite is that of {first!r}{where}{others}"
