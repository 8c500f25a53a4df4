"""Callbacks: what one may override, and the run's list of them, which tells each event to those that hear it."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .arguments import FitArguments
from .foreign_events import check_callback
from .state import Control, TrainState

EVENTS = (
    "on_init_end",
    "on_train_begin",
    "on_epoch_begin",
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_log",
    "on_evaluate",
    "on_prediction_step",
    "on_predict",
    "on_save",
    "on_epoch_end",
    "on_train_end",
    "on_exception",
)


class Callback:
    """Hears the events of a run. Override the methods of the events you want to hear of; the others cost nothing.

    Every event receives the run's arguments, its state, and the flags by which a callback asks for something (see
    Control). By keyword it receives ``fit``, the Fit that is running, and what the event is about: an override names
    those that it uses and ends in ``**context``. The order of the events is written down in ``framework/loop.py``.

    A callback with ``state_dict`` and ``load_state_dict`` is saved in checkpoints and restored. Its state holds JSON
    types and tensors (a moving average of the weights), in mappings with string keys and in lists. The state of rank 0
    is the one that is saved; of a sharded tensor, each rank saves its part.

    Example:
        >>> class StopBelow(Callback):
        ...     def on_log(self, args, state, control, *, logs, **context):
        ...         if logs.get("loss", 1.0) < 0.1:
        ...             control.stop_training("the loss is below 0.1")
    """

    def on_init_end(self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any) -> None:
        """The Fit is constructed."""

    def on_train_begin(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Everything is placed and restored; the first epoch comes next."""

    def on_epoch_begin(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """A pass over the data begins, or is continued after a resume."""

    def on_step_begin(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """The first micro-batch of an update comes next."""

    def on_substep_end(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """A micro-batch is done that isn't the last of its update."""

    def on_pre_optimizer_step(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Gradients are complete, unscaled and clipped; the optimizer has not stepped. Of a module that is trained in
        turns, it comes for each turn that is made, with its name as ``turn``; so does the next event.
        """

    def on_optimizer_step(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """The optimizer has stepped; gradients are still there."""

    def on_step_end(self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any) -> None:
        """The update is over; flags set here are acted on at once."""

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
        """``logs`` (name to number) is about to be handed to the loggers; changes to it are logged."""

    def on_evaluate(
        self,
        args: FitArguments,
        state: TrainState,
        control: Control,
        *,
        fit: Any,
        metrics: Mapping[str, float],
        **context: Any,
    ) -> None:
        """An evaluation gave ``metrics``."""

    def on_prediction_step(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """A batch of an evaluation or prediction is done."""

    def on_predict(
        self,
        args: FitArguments,
        state: TrainState,
        control: Control,
        *,
        fit: Any,
        metrics: Mapping[str, float],
        **context: Any,
    ) -> None:
        """A prediction is over; ``metrics`` holds what its labels allowed."""

    def on_save(
        self,
        args: FitArguments,
        state: TrainState,
        control: Control,
        *,
        fit: Any,
        path: Path,
        **context: Any,
    ) -> None:
        """A checkpoint was saved as ``path``; with ``async_save`` it may still be on its way there."""

    def on_epoch_end(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """A pass over the data is over; flags set here are acted on at once."""

    def on_train_end(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Training is over."""

    def on_exception(
        self,
        args: FitArguments,
        state: TrainState,
        control: Control,
        *,
        fit: Any,
        exception: BaseException,
        **context: Any,
    ) -> None:
        """Training is ending with ``exception``: close here what the callback holds open. With ``auto_find_batch_size``
        the exception may say that memory ran out, and training begins again with ``on_train_begin``.
        """

    # The next two are called on the main process alone; with async_save, in the thread that writes checkpoints.

    def checkpoint_published(self, path: Path) -> None:
        """A checkpoint is whole and in its place. Return soon: the next one can't be written before."""

    def checkpoints_to_keep(self) -> Iterable[Path]:
        """Return checkpoints that this callback still needs, so that ``save_total_limit`` doesn't remove them yet."""
        return ()


class Callbacks:
    """The callbacks of a run and, for each event, the methods that override it.

    Args:
        callbacks: they hear events in this order.
        last: these hear events after all others, also after those that are added later.
    """

    def __init__(self, callbacks: Iterable[Callback], last: Iterable[Callback] = ()) -> None:
        self.first, self.last = list(callbacks), list(last)
        self.find_listeners()
        for callback in self.first:
            check_callback(callback, Callback, EVENTS)

    def find_listeners(self) -> None:
        """Collect, for each event, the methods of the callbacks that override it.

        Raises:
            TypeError: one of the callbacks isn't a Callback.
        """
        self.all = [*self.first, *self.last]
        for callback in self.all:
            if not isinstance(callback, Callback):
                raise TypeError(
                    "callbacks takes instances of stratagem.Callback, e.g. callbacks=[MyCallback()]. "
                    f"Received: {callback!r}"
                )
        self.listeners: dict[str, list[Callable[..., None]]] = {
            event: [getattr(c, event) for c in self.all if getattr(type(c), event) is not getattr(Callback, event)]
            for event in EVENTS
        }

    def add(self, callback: Callback) -> None:
        """Add a callback, after those that were given."""
        self.first.append(callback)
        self.find_listeners()
        check_callback(callback, Callback, EVENTS)

    def pop(self, callback: Callback | type[Callback]) -> Callback | None:
        """Remove a callback: the instance, or the first one of the class.

        Returns:
            The callback that was removed; None where there is no such one.
        """
        found = [c for c in self.all if c is callback or type(c) is callback]
        if not found:
            return None
        self.first = [other for other in self.first if other is not found[0]]
        self.last = [other for other in self.last if other is not found[0]]
        self.find_listeners()
        return found[0]

    def emit(self, event: str, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Call the listeners of an event, in the order of the callbacks.

        Args:
            event: its name, one of EVENTS.
            args, state, control: what every listener is given first.
            **context: what listeners are given by keyword: ``fit``, and what the event is about.
        """
        for listener in self.listeners[event]:
            listener(args, state, control, **context)

    def listen(self, event: str, callback: Callback) -> None:
        """Have a callback hear an event, after all others, where the callback doesn't hear it yet."""
        listener = getattr(callback, event)
        if listener not in self.listeners[event]:
            self.listeners[event] = [*self.listeners[event], listener]

    def stop_listening(self, event: str, callback: Callback) -> None:
        """Have a callback no longer hear an event. The callback may ask for this while it hears that event."""
        listener = getattr(callback, event)
        self.listeners[event] = [other for other in self.listeners[event] if other != listener]

    def checkpoint_published(self, path: Path) -> None:
        """Tell the callbacks that a checkpoint is in its place, before rotation asks which ones to keep."""
        for callback in self.all:
            callback.checkpoint_published(path)

    def checkpoints_to_keep(self) -> set[Path]:
        """Return the checkpoints that any of the callbacks still needs."""
        return {path for callback in self.all for path in callback.checkpoints_to_keep()}

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the callbacks that have one, by class and place, so that two of one class stay apart."""
        return {key: callback.state_dict() for key, callback in self.stateful().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the callbacks whose states were saved."""
        for key, callback in self.stateful().items():
            if key in state:
                callback.load_state_dict(state[key])

    def stateful(self) -> dict[str, Any]:
        """Return the callbacks that have a state, by class and place."""
        seen: dict[str, int] = {}
        found = {}
        for callback in self.all:
            if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict"):
                name = type(callback).__name__
                found[f"{name}-{seen.get(name, 0)}"] = callback
                seen[name] = seen.get(name, 0) + 1
        return found
