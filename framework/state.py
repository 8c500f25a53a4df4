"""The state of a run in plain objects, which can be printed, and which a checkpoint stores as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple


@dataclass
class TrainState:
    """Progress of a run.

    Attributes:
        global_step: updates done.
        max_steps: updates in the whole run.
        epoch: passes over the data done, with the fraction of the current pass.
        num_train_epochs: passes that the run will make.
        learning_rate: the learning rate of the last update.
        items_seen: items (labels, else samples) that were trained on, over all ranks since the start.
        num_input_tokens_seen: input tokens over all ranks since the start, where they are counted.
        skipped_updates: updates that were not made: their gradients weren't finite, or scaled ones overflowed, or their
            norm was a spike.
        train_loss_sum, train_loss_count: the sum and the number of the finite losses that were logged, one an update.
        train_batch_size: samples per micro-batch and rank, where ``auto_find_batch_size`` found that no more fit into
            memory; else None.
        best_metric: the best value of ``metric_for_best_model`` so far; None before the first evaluation.
        best_global_step: the update of the evaluation with ``best_metric``.
        evaluations: the value of that metric in each evaluation so far, by its update, which is text as in JSON.
        evaluation_is_due: whether an evaluation was due when a signal interrupted the run; it is made first on resume.
        log_history: every log of the run. A checkpoint keeps it in a file of its own, ``log_history.jsonl``, to which
            each save adds the new ones: append to it as you like, but what was saved is no longer changed in place.
    """

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    num_train_epochs: int = 0
    learning_rate: float = 0.0
    items_seen: int = 0
    num_input_tokens_seen: int = 0
    skipped_updates: int = 0
    train_loss_sum: float = 0.0
    train_loss_count: int = 0
    train_batch_size: int | None = None
    best_metric: float | None = None
    best_global_step: int = 0
    evaluations: dict[str, float] = field(default_factory=dict)
    evaluation_is_due: bool = False
    log_history: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields but ``log_history`` as JSON types, in no more time after many logs than after few."""
        return {name: value for name, value in vars(self).items() if name != "log_history"}

    def load(self, state: Mapping[str, Any]) -> None:
        """Set the fields to what ``to_dict`` returned."""
        for name, value in state.items():
            setattr(self, name, value)

    def load_history(self, entries: list[dict[str, Any]]) -> None:
        """Have these be the logs of the run so far."""
        self.log_history = entries

    def reset(self) -> None:
        """Go back to the beginning of a run. A Fit has one state for its whole life, so that users may keep it."""
        self.load(vars(TrainState()))

    def begin(self, num_train_epochs: int, max_steps: int, train_batch_size: int | None) -> None:
        """Note the length of the run, and the batch size that was found for it."""
        self.num_train_epochs, self.max_steps, self.train_batch_size = num_train_epochs, max_steps, train_batch_size

    def begin_step(self, learning_rate: float) -> None:
        """Note the learning rate that the optimizer steps with."""
        self.learning_rate = learning_rate

    def skip_update(self) -> None:
        """Count an update that was not made."""
        self.skipped_updates += 1

    def note_evaluation(self, metric: float) -> None:
        """Note what the evaluation of now gave."""
        self.evaluations[str(self.global_step)] = metric

    def note_best(self, metric: float) -> None:
        """Note that the evaluation of now is the best so far."""
        self.best_metric, self.best_global_step = metric, self.global_step

    def end_update(self, epoch: float) -> None:
        """Count one update more, after which so many passes over the data are done."""
        self.global_step += 1
        self.epoch = epoch

    def set_evaluation_due(self, is_due: bool) -> None:
        """Note whether an evaluation is still to be made, for which an interrupted run had no time."""
        self.evaluation_is_due = is_due

    def count(self, loss_sum: float, losses: int, items: int, tokens: int) -> None:
        """Add up what the updates since the last log were made of: their finite losses, items and tokens."""
        self.train_loss_sum += loss_sum
        self.train_loss_count += losses
        self.items_seen += items
        self.num_input_tokens_seen += tokens


class TrainOutput(NamedTuple):
    """What ``fit.train`` returns.

    Attributes:
        global_step: updates done since the start of the run, resumed ones included.
        training_loss: mean loss over the updates.
        metrics: run time in seconds and rates.
    """

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class PredictionOutput(NamedTuple):
    """What ``fit.predict`` returns.

    Attributes:
        predictions: the module's outputs over the whole data, concatenated along the first dimension, on the host; or
            the path that they were written to.
        label_ids: the labels in the same way; None where the data has none, and where they were written.
        metrics: loss and metrics where the data has labels.
    """

    predictions: Any
    label_ids: Any
    metrics: dict[str, float]


@dataclass
class Control:
    """What a callback asks the loop to do next.

    With several ranks, a flag that ``on_step_end`` or an earlier event of an update raises on any of them is obeyed by
    all at the end of the next update: it travels with a message that the ranks exchange anyway. Flags raised in
    ``on_log``, ``on_evaluate``, ``on_save`` and ``on_epoch_end`` are agreed at once.

    Attributes:
        should_log, should_evaluate, should_save: do so at the end of this update or epoch; cleared once it is done, and
            when the next update begins.
        should_epoch_stop: leave the epoch after this update; cleared when the next epoch begins.
        should_training_stop: leave training after this update; cleared when training begins.
        stop_reason: why training is left, in words for a person; see ``stop_training``. Other ranks aren't told.
    """

    should_log: bool = False
    should_evaluate: bool = False
    should_save: bool = False
    should_epoch_stop: bool = False
    should_training_stop: bool = False
    stop_reason: str = ""

    def stop_training(self, reason: str) -> None:
        """Ask to leave training after this update, and say why.

        Args:
            reason: what the run's last lines say: "eval_loss hasn't improved in 3 evaluations". The first one counts.
        """
        self.should_training_stop = True
        self.stop_reason = self.stop_reason or reason

    def begin_training(self, is_finished: bool) -> None:
        """Forget what was asked of the last run. One that is finished already is left before its first update."""
        self.should_training_stop, self.stop_reason = is_finished, ""

    def flags(self) -> list[int]:
        """Return the flags as numbers, in the order of the fields."""
        return [int(getattr(self, flag)) for flag in FLAGS]

    def set(self, flags: list[int]) -> None:
        """Set the flags from numbers, in the order of the fields."""
        for flag, value in zip(FLAGS, flags, strict=True):
            setattr(self, flag, bool(value))


FLAGS = tuple(each.name for each in fields(Control) if each.name.startswith("should_"))
