"""Plan: what a run was asked for, and what that comes to. A plan never changes: another run has another."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..arguments import FitArguments
from ..data import DataStream
from ..fields import cadence
from ..fields.accumulation import epochs_of, micro_batches_at
from ..optim.parameter_options import NAME
from .length import length_of_resumed, run_length

LIMITS = ("limit_train_batches", "overfit_batches")
"""Arguments that set the length of an epoch."""


@dataclass(frozen=True)
class Plan:
    """The arguments of one run, and its length.

    Attributes:
        given: the arguments as the Fit, or a trial, was given them.
        args: the same as the run follows them: without what ``fast_dev_run`` leaves out, with the batch size that was
            found to fit into memory, and, once the plan is settled, with epochs and fractions of the run turned into
            updates.
        num_train_epochs: passes over the data; 0 before the plan is settled.
        batches: of an update: one, or those of a round, see ``Turns``. Each takes ``gradient_accumulation_steps``
            micro-batches.

    Example:
        >>> Plan.of(FitArguments(max_steps=4, logging_steps=0.5)).args.logging_steps
        0.5
    """

    given: FitArguments
    args: FitArguments
    num_train_epochs: int = 0
    batches: int = 1

    @classmethod
    def of(cls, given: FitArguments) -> "Plan":
        """The plan of a run whose length isn't known yet."""
        return cls(given, tried(given))

    def of_batches(self, batches: int) -> "Plan":
        """The plan of a run whose updates take so many batches."""
        return replace(self, batches=batches)

    @property
    def accumulated(self) -> int:
        """The micro-batches of an update, where ``gradient_accumulation_schedule`` says nothing else."""
        return self.args.gradient_accumulation_steps * self.batches

    @property
    def unsettled(self) -> FitArguments:
        """The arguments as they were given, with the batch size that was found: epochs and fractions as they are."""
        return tried(self.given).replace(
            per_device_train_batch_size=self.args.per_device_train_batch_size,
            gradient_accumulation_steps=self.args.gradient_accumulation_steps,
        )

    @property
    def found_batch_size(self) -> int | None:
        """The samples per micro-batch, where they are fewer than were asked for; else None."""
        size = self.args.per_device_train_batch_size
        return size if size != self.given.per_device_train_batch_size else None

    def with_batch_size(self, args: FitArguments) -> "Plan":
        """The plan of a run with the batch size and accumulation of ``args``, not settled yet."""
        return Plan(self.given, replace(self, args=args).unsettled, batches=self.batches)

    def with_changes(self, changes: Mapping[str, Any]) -> "Plan":
        """The plan of a run for which some arguments were chosen: fields of FitArguments."""
        return replace(self, given=self.given.replace(**changes), args=self.args.replace(**changes))

    def with_groups_of(self, saved: Mapping[str, Any]) -> "Plan":
        """The plan of a run that goes on from a checkpoint whose options of the optimizer count: its groups are cut as
        they were when it was saved.
        """
        options = saved["arguments"].get(NAME, {})
        if self.given.resume_with == "arguments" or options == self.given.parameter_options:
            return self
        return replace(self, given=self.given.replace(**{NAME: options}), args=self.args.replace(**{NAME: options}))

    def settled(self, stream: DataStream) -> "Plan":
        """The plan with epochs, and fractions of the run, turned into updates.

        Raises:
            ValueError: the data has no length, and nothing else says when to stop; or what is due contradicts itself.
        """
        args = self.unsettled
        length = run_length(args, stream, stream.global_micro_batch * self.accumulated, self.batches)
        return self._of_length(args, length.num_train_epochs, length.max_steps)

    def has_updates_of(self, saved: Mapping[str, Any], stream: DataStream) -> bool:
        """Whether an update takes as many samples, and an epoch as many updates, as in the run that saved a checkpoint;
        see ``resumed``.
        """
        arguments = saved["arguments"]
        if any(arguments.get(name) != getattr(self.args, name) for name in LIMITS):
            return False
        batches = saved.get("turns", {}).get("batches", 1)
        sizes = (
            (
                saved["data"]["global_micro_batch"] * micro_batches_at(arguments, epoch) * batches,
                stream.global_micro_batch * micro_batches_at(vars(self.args), epoch) * self.batches,
            )
            for epoch in epochs_of(arguments) | epochs_of(vars(self.args))
        )
        return all(before == now for before, now in sizes)

    def resumed(self, saved: Mapping[str, Any], stream: DataStream) -> "Plan":
        """The plan of a run that goes on from a checkpoint whose global batch, or whose epochs' length, was another.

        Args:
            saved: the checkpoint's state, see ``checkpoint.read_state``.
            stream: of the run; it stands where the checkpoint left it.
        """
        args = self.unsettled
        total = stream.global_micro_batch * self.accumulated
        done = (saved["progress"]["global_step"], saved["data"]["epoch"], stream.fraction())
        length = run_length(args, stream, total, self.batches)
        return self._of_length(args, *length_of_resumed(args, length, total, done, self.batches))

    def _of_length(self, unsettled: FitArguments, num_train_epochs: int, max_steps: int) -> "Plan":
        return Plan(self.given, cadence.resolve(unsettled, max_steps), num_train_epochs, self.batches)


def tried(given: FitArguments) -> FitArguments:
    """The arguments of a run that is only tried, where ``fast_dev_run`` says so: it saves nothing, and no evaluation
    waits for a later update.
    """
    if not given.fast_dev_run:
        return given
    return given.replace(
        save_strategy="no", load_best_model_at_end=False, save_on_exception=False, requeue=False, eval_delay=0
    )
