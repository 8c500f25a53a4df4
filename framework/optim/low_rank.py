"""GaLore and APOLLO, which keep moments of projected gradients, with their state in plain tensors."""

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from .adapted_optimizers import count_in_numbers

GALORE: Mapping[str, Any] = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
APOLLO: Mapping[str, Any] = {
    "rank": 128,
    "proj": "random",
    "scale_type": "channel",
    "update_proj_gap": 200,
    "scale": 1.0,
    "proj_type": "std",
}
"""The options of parameter groups that are projected, with the defaults of transformers."""

KEPT = ("ortho_matrix", "seed")  # the attributes of a projector that are saved; the others are options of its group
PREFIX = "projector."  # begins the names of a projector's attributes in the state of a parameter


def split_projected(
    module: nn.Module, groups: list[dict[str, Any]], targets: str | list[str], options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Split parameter groups into weights that are projected and other parameters.

    Args:
        module: its linear layers are candidates.
        groups: parameter groups with all trainable parameters of the module.
        targets: parts of the names of layers; one regular expression of the whole name; or "all-linear".
        options: what is added to the groups that are projected.

    Raises:
        ValueError: no linear layer has such a name.
    """
    linear = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    chosen = {id(layer.weight) for name, layer in linear.items() if is_target(name, targets)}
    projected, others = [], []
    for group in groups:
        mine = [p for p in group["params"] if id(p) in chosen]
        projected.append({**group, "params": mine, **options})
        others.append({**group, "params": [p for p in group["params"] if id(p) not in chosen]})
    if not any(group["params"] for group in projected):
        raise ValueError(
            f"optim_target_modules={targets!r} names no linear layer with a trainable weight. There are "
            f"{', '.join(linear) or 'none'}."
        )
    held = [group for group in (*others, *projected) if group["params"]]
    return sorted(held, key=lambda group: "lr" in group)  # those with rates of their own last


def is_target(name: str, targets: str | list[str]) -> bool:
    """Return whether the targets include the layer of this name."""
    if isinstance(targets, str):
        return targets.replace("_", "-") == "all-linear" or re.fullmatch(targets, name) is not None
    return any(part in name for part in targets)


def with_plain_state(package: str, class_name: str, name: str) -> Callable[..., Any]:
    """Make a subclass of a package's optimizer whose projectors a checkpoint can hold: between two steps, the matrices
    and counters of projectors are entries in the state of parameters.

    Args:
        package, class_name: where the optimizer is.
        name: the name of the class that is made; the packages call theirs "AdamW", as torch does.

    Raises:
        ImportError: the package isn't installed.
    """
    made_by: Any = getattr(import_module(package), class_name)

    class PlainState(made_by):
        """Builds projectors from the state before a step, and stores them in the state after it."""

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> None:
            """Step the optimizer, with its projectors in place."""
            assert closure is None, "nothing here calls a closure"
            count_in_numbers(self)
            projected = [(group, p) for group in self.param_groups if "rank" in group for p in group["params"]]
            for group, parameter in projected:
                state = self.state[parameter]
                kept = {key: state.pop(key) for key in list(state) if key.startswith(PREFIX)}
                if kept:
                    state["projector"] = self.projector(group, state)
                    vars(state["projector"]).update({key.removeprefix(PREFIX): to_number(kept[key]) for key in kept})
            super().step()
            for _, parameter in projected:
                state = self.state[parameter]
                made = vars(state.pop("projector")) if "projector" in state else {}
                state.update({f"{PREFIX}{key}": make_contiguous(made[key]) for key in KEPT if key in made})

        def projector(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> Any:
            """Make a projector of the package's, with the options of a group."""
            if hasattr(self, "_initialize_projector"):
                return self._initialize_projector(group, state)
            options = ("rank", "update_proj_gap", "scale", "proj_type")
            home = import_module(f"{package}.galore_projector")
            return home.GaLoreProjector(**{option: group[option] for option in options})

    PlainState.__name__ = PlainState.__qualname__ = name
    return PlainState


def make_contiguous(value: Any) -> Any:
    """Return a tensor in the layout that a checkpoint restores: the layout decides how products are rounded."""
    return value.contiguous() if isinstance(value, torch.Tensor) else value


def to_number(value: Any) -> Any:
    """Return a number for a 0-dim tensor, and anything else as it is."""
    return value.item() if isinstance(value, torch.Tensor) and value.ndim == 0 else value
