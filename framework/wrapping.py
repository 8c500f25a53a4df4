"""Models that compute their own loss (transformers', peft's) as TrainModules: what ``TrainModule.wrap`` does."""

import inspect
from typing import Any, TypeVar

from torch import nn

CLASHES = ("loss", "metrics", "count_items", "build")
"""Names that a run asks a TrainModule for, and that mean something else on another class."""

Trained = TypeVar("Trained", bound=nn.Module)


def wrap_model(model: nn.Module, train_module: type[Trained], causal: bool | None) -> Trained:
    """Give ``model`` the methods of TrainModule beside its own, and return it.

    A module around the model would put a prefix before every parameter's name; a subclass made for this object keeps
    the names, and whatever else the model can do (``generate``, ``save_pretrained``) stays where it was.

    Args:
        model: its forward returns a loss.
        train_module: the class TrainModule.
        causal: see TrainModule.causal; None finds out.

    Raises:
        TypeError: the model has methods of the names that a run asks for.
        ValueError: ``causal`` must be said.
    """
    own = type(model)
    clashes = [n for n in CLASHES if hasattr(own, n) or n in vars(model) or n in model._modules]
    if clashes:
        raise TypeError(
            f"TrainModule.wrap can't wrap {own.__name__}: it has {', '.join(clashes)} of its own. "
            "Write a TrainModule that holds the model and calls it in forward."
        )
    shifts = shifts_labels(model, train_module) if causal is None else causal
    prompts = [c for c in getattr(model, "peft_config", {}).values() if getattr(c, "is_prompt_learning", False)]
    if shifts and prompts and causal is None:
        raise ValueError(
            f"TrainModule.wrap can't tell whether {own.__name__} predicts each row's first label: soft prompts may "
            "stand before it. Write wrap(model, causal=False) where they are virtual tokens (prompt tuning, p-tuning), "
            "which predict it, and causal=True where they are keys and values (prefix tuning)."
        )
    declared: dict[str, Any] = {"__module__": own.__module__, "wraps": own, "causal": shifts}
    if shifts:
        declared["item_name"] = "tokens"
    model.__class__ = type(own.__name__, (own, train_module), declared)
    assert isinstance(model, train_module)
    return model


def shifts_labels(model: nn.Module, train_module: type[nn.Module]) -> bool:
    """Whether the model's loss has position i predict label i + 1, so that no position predicts the first label.

    The outermost layer whose forward calls its ``loss_function`` says so: one that could be given ``shift_labels``
    instead shifts the labels itself. All decoders of transformers but a few old ones do it that way.
    """
    for layer in model.modules():
        forward = inspect.unwrap(type(layer).forward)
        if "loss_function" in getattr(getattr(forward, "__code__", None), "co_names", ()):
            return "shift_labels" in inspect.signature(layer.loss_function).parameters  # type: ignore[arg-type]
    return any(getattr(layer, "causal", False) for layer in model.modules() if isinstance(layer, train_module))
