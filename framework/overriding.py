"""Checks of what subclasses override: methods of Fit, and names of other trainers. See docs/overriding.md.

A method that is never called is worse than an error, since its author relies on it. So a Fit refuses the names of steps
of transformers' Trainer, warns of overrides of its own methods that it doesn't promise to call, and warns of names of
Lightning on a module; each message has the name that does the same here.
"""

import copy
import inspect
import itertools
import types
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

OVERRIDABLE = (
    "train", "training_step", "compute_loss", "compute_loss_context_manager", "get_batch_samples",
    "get_train_dataloader", "get_eval_dataloader", "evaluate", "predict", "log", "save_checkpoint", "export",
    "save_pretrained", "hyperparameter_search",
)  # fmt: skip
"""Methods of Fit that a subclass may override: Fit calls them wherever it needs what they do."""

OF_TRANSFORMERS = {
    "prediction_step": "compute_loss, which evaluate and predict call for each batch, with return_outputs=True",
    "evaluation_loop": "evaluate or predict",
    "prediction_loop": "evaluate or predict",
    "create_optimizer": "TrainModule.configure_optimizer(self, args)",
    "create_scheduler": "TrainModule.configure_scheduler(self, optimizer, args)",
    "create_optimizer_and_scheduler": "TrainModule.configure_optimizer and configure_scheduler",
    "get_optimizer_cls_and_kwargs": "TrainModule.configure_optimizer(self, args)",
    "get_decay_parameter_names": "TrainModule.configure_optimizer(self, args)",
    "get_test_dataloader": "get_eval_dataloader(self, data), which predict calls, too",
    "_get_train_sampler": "get_train_dataloader(self)",
    "_get_eval_sampler": "get_eval_dataloader(self, data)",
    "_prepare_inputs": "training_step(self, model, inputs, num_items_in_batch=None)",
    "_inner_training_loop": "training_step, get_batch_samples, or a Callback",
    "_maybe_log_save_evaluate": "log, evaluate and save_checkpoint, or a Callback",
    "_save_checkpoint": "save_checkpoint(self)",
    "_save": "save_checkpoint(self), export(self, path) or save_pretrained(self, directory)",
    "save_model": "export(self, path) or save_pretrained(self, directory)",
    "call_model_init": "Fit(module_init=)",
    "floating_point_ops": "TrainModule.flops_per_token(self, parameter_count)",
    "autocast_smart_context_manager": "compute_loss_context_manager(self)",
}
"""Names of transformers' Trainer that nothing here calls, to what is called instead."""

OF_LIGHTNING = {
    "training_step": "forward and loss(self, outputs, batch); for the rest of a step, Fit.training_step",
    "validation_step": "loss(self, outputs, batch) and metrics(self)",
    "test_step": "loss(self, outputs, batch) and metrics(self)",
    "predict_step": "forward",
    "configure_optimizers": "configure_optimizer(self, args) and configure_scheduler(self, optimizer, args)",
    "configure_model": "build(self)",
    "configure_callbacks": "Fit(callbacks=)",
    "configure_gradient_clipping": "FitArguments.max_grad_norm",
    "train_dataloader": "Fit(train_data=)",
    "val_dataloader": "Fit(eval_data=)",
    "predict_dataloader": "Fit.predict(data)",
    "optimizer_step": "a Callback's on_pre_optimizer_step and on_optimizer_step",
    "lr_scheduler_step": "configure_scheduler(self, optimizer, args)",
    "on_train_start": "a Callback's on_train_begin",
    "on_train_end": "a Callback's on_train_end",
    "on_train_epoch_start": "a Callback's on_epoch_begin",
    "on_train_epoch_end": "a Callback's on_epoch_end",
    "on_train_batch_start": "a Callback's on_step_begin",
    "on_train_batch_end": "a Callback's on_step_end",
    "on_validation_epoch_end": "a Callback's on_evaluate",
    "on_before_optimizer_step": "a Callback's on_pre_optimizer_step",
}
"""Names of a LightningModule that nothing here calls on a TrainModule, to what is called instead."""

READ_OF_LIGHTNING = {
    "log_dict": "self.log(name, value), once for each value",
    "current_epoch": "self.epoch, a 0-dim tensor with the fraction of the present pass over the data",
    "global_step": "self.update_number, a 0-dim tensor",
}
"""Names that a LightningModule reads of itself, to what a TrainModule reads."""

COUNT = "num_items_in_batch"


def check_fit(fit: type, base: type) -> None:
    """Refuse, or warn of, what a subclass of Fit defines and nothing calls.

    Args:
        fit: the class of the object.
        base: Fit.

    Raises:
        TypeError: the class has a name of transformers' Trainer that is never called, or a compute_loss that can't be
            called.
    """
    if fit is base:
        return
    own = {name for kind in own_classes(fit, base) for name, value in vars(kind).items() if callable(value)}
    for name in sorted(own & OF_TRANSFORMERS.keys()):
        raise TypeError(f"{fit.__name__}.{name} would never be called: that is transformers' name. Here it is "
                        f"{OF_TRANSFORMERS[name]}.")  # fmt: skip
    inner = sorted(name for name in own if hasattr(base, name) and name not in OVERRIDABLE and name[:2] != "__")
    if inner:
        warnings.warn(
            f"{fit.__name__} overrides {', '.join(inner)} of Fit, which another version may call otherwise, or "
            f"not at all. What is meant to be overridden: {', '.join(OVERRIDABLE)}.",
            stacklevel=3,
        )
    try:
        inspect.signature(fit.compute_loss).bind(None, None, None, return_outputs=True, num_items_in_batch=1)  # type: ignore[attr-defined]
    except TypeError as error:
        raise TypeError(
            f"{fit.__name__}.compute_loss is called as compute_loss(model, inputs, return_outputs=..., "
            f"{COUNT}=...), and can't be: {error}. Write compute_loss(self, model, inputs, return_outputs=False, "
            f"{COUNT}=None)."
        ) from None


def check_module(given: Any, base: type) -> None:
    """Warn of names of Lightning on a TrainModule.

    Args:
        given: the user's module.
        base: TrainModule.
    """
    module = type(given)
    methods = [value for kind in own_classes(module, base) for value in vars(kind).values() if callable(value)]
    codes = [code for each in methods if (code := getattr(inspect.unwrap(each), "__code__", None)) is not None]
    for name, ours in READ_OF_LIGHTNING.items():
        if not hasattr(given, name) and any(reads_of_self(code, name) for code in codes):
            warnings.warn(
                f"{module.__name__} reads self.{name}: that is Lightning's name. Here it is {ours}.", stacklevel=4
            )
    for name, ours in OF_LIGHTNING.items():
        if hasattr(module, name) and not hasattr(base, name):
            warnings.warn(
                f"{module.__name__}.{name} is never called: that is Lightning's name. Here it is {ours}.", stacklevel=3
            )


def own_classes(kind: type, base: type) -> list[type]:
    """Return the classes in which an object of ``kind`` finds its methods before those of ``base``."""
    order = kind.__mro__
    return list(order[: order.index(base)])


IN_PROGRAM = ("training_step", "compute_loss", "compute_loss_context_manager")


def check_called(fit: type, base: type, in_program: bool, in_turns: bool) -> None:
    """Refuse what a subclass of Fit overrides and nothing would call.

    Args:
        fit: the class of the object.
        base: where the methods are defined.
        in_program: whether updates are programs (``torch_compile="update"``).
        in_turns: whether the module is trained in turns.

    Raises:
        ValueError: names the methods.
    """
    own = [name for name in IN_PROGRAM if is_overridden(fit, base, name)]
    if own and in_turns:
        raise ValueError(
            f"A module with turns() has a loss for each turn, and {fit.__name__}.{' and '.join(own)} would not be "
            "called for them. Write what a turn computes into its loss method on the TrainModule."
        )
    if own and in_program:
        raise ValueError(
            f"torch_compile='update' makes an update one program, which doesn't call {fit.__name__}."
            f"{' and '.join(own)}. Write torch_compile=True, or the loss as loss(self, outputs, batch) on the "
            "TrainModule, or as compute_loss_func."
        )


# An overridden compute_loss.


def is_overridden(fit: type, base: type, name: str) -> bool:
    """Return whether a subclass overrides a method of Fit."""
    return getattr(fit, name) is not getattr(base, name)


def reads_count(fit: type, base: type) -> bool:
    """Return whether an overridden compute_loss reads ``num_items_in_batch``. An override that reads the count, and
    gets no loss from Fit's own method, divides by it.
    """
    methods = [vars(kind).get("compute_loss") for kind in own_classes(fit, base)]
    return any(reads(getattr(inspect.unwrap(method), "__code__", None)) for method in methods if callable(method))


def asks_base(fit: type, base: type) -> bool:
    """Return whether an overridden compute_loss may call Fit's own method."""
    methods = [vars(kind).get("compute_loss") for kind in own_classes(fit, base)]
    codes = [getattr(inspect.unwrap(method), "__code__", None) for method in methods if callable(method)]
    return any(code is None or {"super", "compute_loss", "objective"} & set(code.co_names) for code in codes)


def reads(code: types.CodeType | None) -> bool:
    """Return whether a function's code has a variable, a key or a keyword argument named ``num_items_in_batch``."""
    if code is None:
        return False
    import dis

    for instruction in dis.get_instructions(code):
        value = instruction.argval
        values = value if isinstance(value, tuple) else (value,)
        if COUNT in values and not instruction.opname.startswith(("STORE", "DELETE")):
            return True
    return any(reads(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))


def reads_of_self(code: types.CodeType, name: str) -> bool:
    """Return whether a function's code has ``self.<name>``, and sets no such attribute."""
    import dis

    if name in code.co_names:
        instructions = list(dis.get_instructions(code))
        found = [
            now.opname
            for before, now in itertools.pairwise(instructions)
            if now.argval == name and now.opname.endswith(("_ATTR", "_METHOD")) and is_self(before)
        ]
        if found:
            return "STORE_ATTR" not in found
    return any(reads_of_self(each, name) for each in code.co_consts if isinstance(each, types.CodeType))


def is_self(instruction: Any) -> bool:
    """Return whether an instruction loads the variable ``self``."""
    loaded = instruction.argval[-1:] if isinstance(instruction.argval, tuple) else (instruction.argval,)
    return "self" in loaded and instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))


def own_inputs(inputs: Any) -> Any:
    """Copy a mapping batch, so that an override may remove entries, as ``inputs.pop("labels")`` does."""
    return copy.copy(inputs) if isinstance(inputs, Mapping) else inputs


def loss_and_outputs(found: Any) -> tuple[Any, Any, Mapping[str, Tensor]]:
    """Read what an overridden compute_loss returned: a loss, or (loss, outputs). A mapping in the place of the loss
    holds extras too.

    Returns:
        (loss, outputs, extras); outputs is None where there are none.
    """
    loss, outputs = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(loss, Mapping):
        return loss, outputs, {}
    if "loss" not in loss:
        raise ValueError(f"compute_loss returned a mapping without 'loss'. Its keys are {', '.join(map(repr, loss))}.")
    return loss["loss"], outputs, {name: value.detach() for name, value in loss.items() if name != "loss"}


def warn_options_without_effect(fit: type, base: type, options: Mapping[str, Any]) -> None:
    """Warn of options that only Fit's own compute_loss knows, where an override never calls it.

    Args:
        fit: the class of the object.
        base: Fit.
        options: the name of an option to its value, which is true where the option is set.
    """
    given = [name for name, value in options.items() if value]
    if given and is_overridden(fit, base, "compute_loss") and not asks_base(fit, base):
        warnings.warn(
            f"{', '.join(given)} has no effect: {fit.__name__}.compute_loss computes the loss itself. Have it call "
            "super().compute_loss(...), or leave the argument out.",
            stacklevel=3,
        )
