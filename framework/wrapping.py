"""Models that compute their own loss (transformers', peft's) as TrainModules: what ``TrainModule.wrap`` does."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .pretrained.weights import Weights

CLASHES = ("loss", "metrics", "count_items", "build")
"""Names that a run asks a TrainModule for, and that mean something else on another class."""

Trained = TypeVar("Trained", bound=nn.Module)


def wrap_model(
    model: nn.Module, train_module: type[Trained], causal: bool | None, methods: Mapping[str, Any] | None = None
) -> Trained:
    """Give ``model`` the methods of TrainModule beside its own, and return it.

    A module around the model would put a prefix before every parameter's name; a subclass made for this object keeps
    the names, and whatever else the model can do (``generate``, ``save_pretrained``) stays where it was.

    Args:
        model: its forward returns a loss.
        train_module: the class TrainModule.
        causal: see TrainModule.causal; None finds out.
        methods: what else the class declares.

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
    model.__class__ = type(own.__name__, (own, train_module), declared | dict(methods or {}))
    assert isinstance(model, train_module)
    return model


def wrap_late(
    given: str | PathLike[str] | Callable[[], nn.Module],
    train_module: type[Trained],
    causal: bool | None,
    weights: str | PathLike[str] | None,
    dtype: torch.dtype | None,
    new_layers: Sequence[str],
) -> Trained:
    """Wrap a model that has no memory until it is placed, when each rank reads or draws its part of the values.

    Args:
        given: the model's directory, or a function that makes it.
        train_module: the class TrainModule.
        causal: see TrainModule.causal; None finds out.
        weights: the directory that a function's model takes its values from; None has ``init_weights`` draw them.
        dtype: of a directory's model.
        new_layers: layers whose values aren't taken from the files.

    Raises:
        TypeError, ValueError: an argument has no effect, or weights and model don't fit; see pretrained/weights.py.
    """
    from .pretrained.building import model_of, weights_of, without_memory
    from .pretrained.initialising import initialise_by_model

    if isinstance(given, str | PathLike):
        if weights is not None:
            raise ValueError(
                f"TrainModule.wrap({given!r}, weights={weights!r}) names two directories. Write wrap(lambda: "
                "AutoModelForCausalLM.from_config(config), weights=...) for a model of one with the weights of another."
            )
        model, weights = model_of(given, dtype), given
    elif not callable(given):
        raise TypeError(
            f"TrainModule.wrap takes a module, a model's directory, or a function that makes a module. Received: "
            f"{given!r:.200}"
        )
    else:
        if dtype is not None:
            raise ValueError(
                f"TrainModule.wrap(function, dtype={dtype}) has no effect on what the function makes. Write the dtype "
                "in it: from_config(config, dtype=...)."
            )
        model = without_memory(given)
    if weights is None and new_layers:
        raise ValueError(f"new_layers={new_layers!r} has no effect without weights.")
    found: Weights | None = None if weights is None else weights_of(model, weights, new_layers)

    def initial_values(self: Trained, name: str, part: tuple[slice, ...]) -> Tensor | None:
        return None if found is None else found.values(name, part)

    def init_weights(self: Trained, layer: nn.Module) -> None:
        if not initialise_by_model(self, layer):
            train_module.init_weights(self, layer)  # type: ignore[attr-defined]

    return wrap_model(
        model,
        train_module,
        causal,
        {"initial_values": initial_values, "init_weights": init_weights, "weights_note": str(found or "")},
    )


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
