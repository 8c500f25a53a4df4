"""A placed module: its parameters and their state, by the names that the user's module gives them."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..precision.base import Precision
from ..precision.master_weights import MASTER_WEIGHT
from .duplicates import Part, part_of
from .local_parts import copy_each, local_part, placed_like


class PlacedModule:
    """The part of a strategy that hands state out and takes it back, for checkpoints, exports and comparisons.

    Names are fully qualified ("blocks.0.up.weight"). Tensors may be sharded (DTensor): no rank holds the whole model.

    Attributes:
        precision: the number format; set by ``Strategy.set_up``.
        module: the user's module; set by ``Strategy.place``, as are the next two.
        model: what the loop calls: ``module``, or a wrapper around it.
        optimizer: over the parameters as they are placed; None for a run that only evaluates.
        world_size: processes that it is placed on.
    """

    world_size: int = 1
    precision: Precision
    optimizer: Optimizer | None = None
    _module: nn.Module | None = None
    _model: nn.Module | None = None

    @property
    def module(self) -> nn.Module:
        """The user's module, where ``place`` has put it."""
        assert self._module is not None, "no module is placed"
        return self._module

    @module.setter
    def module(self, module: nn.Module) -> None:
        self._module = module

    @property
    def model(self) -> nn.Module:
        """What the loop calls: the module, or a wrapper around it."""
        assert self._model is not None, "no module is placed"
        return self._model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._model = model

    def forget_module(self) -> None:
        """Let go of the module, of the wrapper around it and of its optimizer."""
        self._module = self._model = self.optimizer = None

    def named_parameters(self, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
        """The placed parameters under the names that the user's module gives them; tied ones once, or by each name."""
        return dict(self.module.named_parameters(remove_duplicate=remove_duplicate))

    def stepped_parameters(self) -> Mapping[str, nn.Parameter]:
        """What the optimizer was given for the placed parameters, by their names."""
        return self.precision.masters(self.named_parameters())

    def tied_names(self) -> dict[str, str]:
        """Map each further name of a tied parameter to its first name."""
        first = {id(parameter): name for name, parameter in self.named_parameters().items()}
        return {
            name: first[id(parameter)]
            for name, parameter in self.named_parameters(remove_duplicate=False).items()
            if first[id(parameter)] != name
        }

    @property
    def holder_of_state(self) -> nn.Module:
        """What torch is asked for the model's state. It takes the name of a wrapper of its own ("module") out of every
        name, so a wrapper is asked only where it must be.
        """
        return self.module

    def model_state(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name, with whole shapes."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        state: dict[str, Tensor] = get_model_state_dict(self.holder_of_state)  # type: ignore[assignment]
        return self.precision.saved_weights(self.module, state)

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back a ``model_state`` whose tensors a checkpoint was read into. By default they are the model's own."""
        self.precision.take_weights(self.module, state)
        self.weights_have_changed()

    # Buffers that forward changes are each rank's own until they are shared: see strategies/buffers.py.

    def has_news_of_buffers(self) -> bool:
        """Whether the last update changed buffers that the ranks don't share yet."""
        return False

    def share_buffers(self, news: bool) -> None:
        """Give every rank those of rank 0's buffers that change, before an update.

        Args:
            news: ``has_news_of_buffers`` on any rank. The same on all.
        """

    def settle(self) -> None:
        """Have all ranks hold the same numbers, before the module is evaluated, saved or used between updates: share
        the buffers that changed. A strategy whose ranks' weights come apart brings them together here. Collective.
        """

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """The optimizer's state: parameter name to (state key to tensor or number)."""
        assert self.optimizer is not None
        state = self.optimizer.state
        return {name: lists_apart(state[p]) for name, p in self.stepped_parameters().items() if p in state}

    def load_optimizer_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace the optimizer's state by ``state``, whose tensors are placed as those of ``model_state``."""
        assert self.optimizer is not None
        parameters = self.stepped_parameters()
        self.optimizer.state.clear()
        for name, entries in state.items():
            self.optimizer.state[parameters[name]] = lists_together(entries)

    def stepping_optimizer(self) -> Optimizer:
        """The optimizer that makes the state: ``optimizer``, or what that one stands for."""
        assert self.optimizer is not None
        return self.optimizer

    def stand_in(self, parameter: Tensor) -> Tensor:
        """Make zeros that ``stepping_optimizer`` treats as it treats a parameter that it was given."""
        return torch.zeros_like(parameter, dtype=torch.float32 if self.precision.master_weights else parameter.dtype)

    def whole(self, tensor: Tensor) -> Tensor:
        """Gather a tensor of the model's state where it is sharded. Collective."""
        return tensor

    def full_state(self, leave_out: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors by name on the host, one at a time, but for those left out. Every rank iterates; rank 0 uses
        them.
        """
        for name, tensor in self.model_state().items():
            if name not in leave_out:
                yield name, self.whole(tensor).detach().cpu()

    def unwrapped(self) -> AbstractContextManager[Any]:
        """Make a context in which layers have the names that the user's module gives them, without any wrapper's."""
        return nullcontext()

    def full_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Whole gradients by parameter name on the host, one at a time, of the parameters that have one. Every rank
        iterates to the end; rank 0 uses them, and copies what it keeps.
        """
        for name, parameter in self.named_parameters().items():
            if parameter.grad is not None:
                yield name, self.whole(parameter.grad).cpu()

    def part_held(self, parameter: Tensor) -> Part | None:
        """Which part of a placed parameter this rank holds. Ranks that say the same hold the same numbers, but for a
        fault; None where no other rank holds them.
        """
        return part_of(parameter, self.world_size)

    def replicated(self) -> Iterator[tuple[str, Tensor, Part]]:
        """What other ranks hold as well, parameters and buffers: (name, this rank's numbers, part)."""
        for name, parameter in self.named_parameters().items():
            part = self.part_held(parameter)
            if part is not None:
                yield name, parameter, part
        with self.unwrapped():
            buffers = dict(self.module.named_buffers())
        for name, buffer in buffers.items():
            yield name, buffer, ()

    def reshard(self) -> None:
        """Hold shards alone again, where a forward that no backward followed has left some parameters whole."""

    # Other weights for a while, such as averages of the trained ones.

    def held_weights(self, parameters: Mapping[str, nn.Parameter] | None = None) -> dict[str, Tensor]:
        """This rank's parts of the weights that the optimizer steps, as plain tensors: masters where a precision keeps
        some. What is computed from them elementwise needs no other rank. They are the trained weights themselves.

        Args:
            parameters: what ``stepped_parameters`` gave since the module was placed; None walks over the module.
        """
        assert self.optimizer is not None
        state, found = self.optimizer.state, {}
        for name, parameter in (self.stepped_parameters() if parameters is None else parameters).items():
            if parameter.requires_grad:
                stepped = state[parameter].get(MASTER_WEIGHT, parameter) if parameter in state else parameter
                found[name] = local_part(stepped.detach())
        return found

    def weights_by_name(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give tensors like those of ``held_weights`` the form in which a checkpoint holds them: parameter names, and
        whole shapes. They share their memory where they can. Collective for some strategies.
        """
        parameters = self.stepped_parameters()
        return {name: placed_like(part, parameters[name]) for name, part in held.items()}

    def held_from(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn back what ``weights_by_name`` gave, or a checkpoint that holds it. Collective for some strategies."""
        return {name: local_part(weight.detach()) for name, weight in weights.items()}

    @contextmanager
    def with_weights(self, held: Mapping[str, Tensor]) -> Iterator[None]:
        """In here the module computes with other weights; afterwards it has its own again, to the bit.

        Args:
            held: like ``held_weights``, on any device and in any dtype.
        """
        self.reshard()
        parameters = self.named_parameters()
        places = [local_part(parameters[name].detach()) for name in held]
        own = [place.clone() for place in places]
        copy_each(places, list(held.values()))
        self.weights_have_changed()
        try:
            yield
        finally:
            self.reshard()
            copy_each([local_part(parameters[name].detach()) for name in held], own)
            self.weights_have_changed()

    def weights_have_changed(self) -> None:
        """Tell the precision, which may keep what it computed from weights, that these were changed."""
        self.precision.weights_have_changed(self.module)


def lists_apart(entries: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state without lists of tensors (LBFGS' history): a list's items are entries of their own, named
    "<key>.<index>", and their number stands for it.
    """
    found: dict[str, Any] = {}
    for key, value in entries.items():
        if isinstance(value, list):
            found |= {key: {"items": len(value)}, **{f"{key}.{i}": item for i, item in enumerate(value)}}
        else:
            found[key] = value
    return found


def lists_together(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Put the state together again that ``lists_apart`` took apart."""
    lengths = {key: value["items"] for key, value in entries.items() if isinstance(value, dict)}
    items = {f"{key}.{i}" for key, length in lengths.items() for i in range(length)}
    whole = {key: value for key, value in entries.items() if key not in items}
    return whole | {key: [entries[f"{key}.{i}"] for i in range(length)] for key, length in lengths.items()}
