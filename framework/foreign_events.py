"""Checks of what callbacks define: hooks of other trainers, misspelt events, and methods that can't be called."""

import difflib
import inspect
import warnings
from collections.abc import Collection, Mapping
from typing import Any

LIGHTNING, COMPOSER, KERAS = "Lightning", "Composer", "Keras"

STEP_BEGINS = "on_step_begin, before an update, or on_substep_end, after each micro-batch but its last"
STEP_ENDS = "on_step_end, after an update, or on_substep_end, after each micro-batch but its last"
NONE_BEFORE = "none: evaluate() of a subclass of Fit is called for each evaluation"
STATE = "state_dict(self) and load_state_dict(self, state) of the callback"

HOOKS: Mapping[str, tuple[str, str]] = {
    # Lightning.
    "setup": (LIGHTNING, "on_init_end"),
    "teardown": (LIGHTNING, "on_train_end"),
    "on_fit_start": (LIGHTNING, "on_train_begin"),
    "on_fit_end": (LIGHTNING, "on_train_end"),
    "on_train_start": (LIGHTNING, "on_train_begin"),
    "on_train_epoch_start": (LIGHTNING, "on_epoch_begin"),
    "on_train_epoch_end": (LIGHTNING, "on_epoch_end"),
    "on_train_batch_start": (LIGHTNING, STEP_BEGINS),
    "on_train_batch_end": (LIGHTNING, STEP_ENDS),
    "on_sanity_check_start": (LIGHTNING, NONE_BEFORE),
    "on_sanity_check_end": (LIGHTNING, "on_evaluate"),
    "on_validation_start": (LIGHTNING, NONE_BEFORE),
    "on_validation_end": (LIGHTNING, "on_evaluate"),
    "on_validation_epoch_start": (LIGHTNING, NONE_BEFORE),
    "on_validation_epoch_end": (LIGHTNING, "on_evaluate"),
    "on_validation_batch_start": (LIGHTNING, "on_prediction_step, after each batch"),
    "on_validation_batch_end": (LIGHTNING, "on_prediction_step"),
    "on_test_start": (LIGHTNING, NONE_BEFORE),
    "on_test_end": (LIGHTNING, "on_evaluate"),
    "on_test_epoch_start": (LIGHTNING, NONE_BEFORE),
    "on_test_epoch_end": (LIGHTNING, "on_evaluate"),
    "on_test_batch_start": (LIGHTNING, "on_prediction_step, after each batch"),
    "on_predict_start": (LIGHTNING, "none: predict() of a subclass of Fit is called for each prediction"),
    "on_predict_epoch_start": (LIGHTNING, "none: predict() of a subclass of Fit is called for each prediction"),
    "on_predict_epoch_end": (LIGHTNING, "on_predict"),
    "on_predict_batch_start": (LIGHTNING, "on_prediction_step, after each batch"),
    "on_save_checkpoint": (LIGHTNING, f"on_save, and {STATE}"),
    "on_load_checkpoint": (LIGHTNING, f"on_train_begin, after everything is restored, and {STATE}"),
    "on_before_backward": (LIGHTNING, "none: training_step of a subclass of Fit is called for each micro-batch"),
    "on_after_backward": (LIGHTNING, "on_pre_optimizer_step, after the last backward of an update"),
    "on_before_optimizer_step": (LIGHTNING, "on_pre_optimizer_step"),
    "on_before_zero_grad": (LIGHTNING, "on_optimizer_step, when gradients are still there"),
    # Composer.
    "run_event": (COMPOSER, "a method for each event"),
    "fit_start": (COMPOSER, "on_train_begin"),
    "fit_end": (COMPOSER, "on_train_end"),
    "epoch_start": (COMPOSER, "on_epoch_begin"),
    "epoch_end": (COMPOSER, "on_epoch_end"),
    "epoch_checkpoint": (COMPOSER, "on_save"),
    "batch_start": (COMPOSER, STEP_BEGINS),
    "batch_end": (COMPOSER, STEP_ENDS),
    "batch_checkpoint": (COMPOSER, "on_save"),
    "before_train_batch": (COMPOSER, "on_step_begin"),
    "after_train_batch": (COMPOSER, "on_step_end"),
    "after_backward": (COMPOSER, "on_pre_optimizer_step, after the last backward of an update"),
    "eval_start": (COMPOSER, NONE_BEFORE),
    "eval_end": (COMPOSER, "on_evaluate"),
    "eval_batch_end": (COMPOSER, "on_prediction_step"),
    "predict_end": (COMPOSER, "on_predict"),
    # Keras.
    "on_batch_begin": (KERAS, "on_step_begin"),
    "on_batch_end": (KERAS, "on_step_end"),
    "on_train_batch_begin": (KERAS, "on_step_begin"),
    "on_test_begin": (KERAS, NONE_BEFORE),
    "on_test_batch_begin": (KERAS, "on_prediction_step, after each batch"),
    "on_test_batch_end": (f"{LIGHTNING}'s and {KERAS}", "on_prediction_step"),
    "on_predict_begin": (KERAS, "none: predict() of a subclass of Fit is called for each prediction"),
    "on_predict_end": (f"{LIGHTNING}'s and {KERAS}", "on_predict"),
    "on_predict_batch_begin": (KERAS, "on_prediction_step, after each batch"),
    "on_predict_batch_end": (f"{LIGHTNING}'s and {KERAS}", "on_prediction_step"),
    "set_model": (KERAS, "fit.module, of the fit that each event is given"),
    "set_params": (KERAS, "args, that each event is given"),
}
"""Hooks that nothing here calls: whose they are, and what is called instead."""


def check_callback(callback: Any, base: type, events: Collection[str]) -> None:
    """Warn of what a callback defines and nothing calls, and refuse what can't be called as it is.

    Args:
        callback: an instance of ``base``.
        base: Callback.
        events: the names of the events.

    Raises:
        TypeError: an event's method has parameters that it would not be given; the message says what to write.
    """
    kind = type(callback)
    for name in dir(kind):
        if hasattr(base, name) or not callable(getattr(kind, name, None)):
            continue
        if name in HOOKS:
            whose, ours = HOOKS[name]
            warn(f"{kind.__name__}.{name} is never called: that is {whose}'s name. Here it is {ours}.")
        elif name.startswith("on_"):
            nearest = difflib.get_close_matches(name, events, n=1)
            ours = f"Did you mean {nearest[0]}?" if nearest else f"The events are {', '.join(events)}."
            warn(f"{kind.__name__}.{name} is never called: no event has that name. {ours}")
    for event in events:
        method, original = getattr(kind, event, None), getattr(base, event)
        if method is not original:
            check_parameters(kind, event, method, original)


def check_parameters(kind: type, event: str, method: Any, original: Any) -> None:
    """Refuse a method that can't be called as the events are, as one written for another trainer."""
    parameters = inspect.signature(original).parameters.values()
    named = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # a callable that hides its parameters
        return
    try:
        signature.bind(None, None, None, None, **dict.fromkeys(named))
    except TypeError as error:
        called = ", ".join(["args", "state", "control", *(f"{name}=..." for name in named)])
        used = [name for name in named if name in signature.parameters]
        written = ", ".join(["self", "args", "state", "control", *(["*", *used] if used else []), "**context"])
        raise TypeError(
            f"{kind.__name__}.{event} is called as {event}({called}), and can't be: {error}. Write {event}({written})."
        ) from None


def warn(text: str) -> None:
    """Warn the user, whose class it is."""
    warnings.warn(text, stacklevel=6)
