"""InRun: what a module says to the run that trains it, and reads of it, in forward and loss."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .counters import DTYPES, Counters
from .logged import Logged, check_is_in_forward, refuse_options

Function = TypeVar("Function", bound=Callable[..., Any])


class Yielding:
    """An attribute of a class that gives way to a module's own of that name, whether layer, parameter, buffer or other.

    Args:
        function: the method.
        is_read: whether it is called where it is read, as a property.
    """

    def __init__(self, function: Callable[..., Any], is_read: bool) -> None:
        self.function, self.is_read, self.__doc__ = function, is_read, function.__doc__
        self.name = function.__name__

    def __get__(self, module: nn.Module | None, kind: type | None = None) -> Any:
        # There is no __set__, so that what is assigned on the module itself comes first.
        if module is None:
            return self if self.is_read else self.function
        for own in (module._modules, module._buffers, module._parameters):
            if self.name in own:
                return own[self.name]
        return self.function(module) if self.is_read else self.function.__get__(module, kind)


def yielding(function: Function) -> Function:
    """Make a method that gives way, see Yielding."""
    return cast(Function, Yielding(function, is_read=False))


def yielding_property(function: Callable[[Any], Tensor]) -> property:
    """Make a property that gives way, see Yielding."""
    return cast(property, Yielding(function, is_read=True))


class OfRun:
    """What a module reaches of its run, and may hold: a copy of the module has a copy of it, which no run knows.

    Args:
        device: of the module.

    Attributes:
        logged: collects what it logs.
        counters: what it reads.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.logged, self.counters = device, Logged(), Counters(device)


class InRun(nn.Module):
    """The part of a TrainModule that knows of the run. A module's own attributes and layers of its names come first."""

    _of_run: OfRun | None = None

    def _enter_run(self, device: torch.device) -> OfRun:
        """Have a Fit's run be this module's, on a device. Several Fits of one module share what it reaches."""
        of_run = self._of_run
        if of_run is None or of_run.device != device:
            of_run = OfRun(device)
        of_run.counters.begin(0, 0.0, compiles=False)
        self._share_run(of_run)
        return of_run

    def _share_run(self, of_run: OfRun) -> None:
        """Have all layers that are TrainModules reach what this one does."""
        self._of_run = of_run
        for layer in self.modules():
            if isinstance(layer, InRun) and layer._of_run is not of_run:
                layer._share_run(of_run)

    @yielding
    def log(self, name: str, value: Tensor | float, items: Tensor | float | None = None, **options: Any) -> None:
        """Log a value beside the loss, from anywhere in ``forward`` and ``loss``.

        A log of training has, by this name, the mean over the updates since the last log in which it was logged; in an
        update it is one mean over the items of all micro-batches and ranks. An evaluation has ``eval_<name>``, the
        mean over all items of the data. ``predict``, and a forward without a Fit, log nothing. The value is copied, and
        nothing waits for the device. What backward computes once more counts once.

        A name may be logged on some ranks, in some updates or micro-batches alone, or several times in one: the mean is
        over all that was logged. A layer inside that is a TrainModule logs by its own ``log``; give another one this
        method: ``Block(self.log)``.

        Args:
            name: the same on every rank; not one that a log has by itself, as "loss".
            value: the mean over the items of the micro-batch on this rank: a number or a 0-dim tensor.
            items: so many items on this rank are what it is a mean over, where those aren't the micro-batch's.
            **options: refused; those of Lightning's ``log`` with what to write instead.

        Raises:
            ValueError: it is called outside of forward and loss, the value isn't 0-dim, or the name is taken.
            TypeError: the value isn't a number, or there is no such option.

        Example:
            >>> def loss(self, outputs, batch):
            ...     hits = (outputs.argmax(-1) == batch["labels"])[batch["is_rare"]]
            ...     self.log("accuracy_of_rare", hits.float().mean(), items=hits.numel())
            ...     return nn.functional.cross_entropy(outputs, batch["labels"])
        """
        refuse_options(name, options)
        check_no_replica(self, "log()")
        if self._of_run is not None:
            self._of_run.logged.add(name, value, items)
        elif not torch.compiler.is_compiling():
            check_is_in_forward()

    @yielding_property
    def update_number(self) -> Tensor:
        """The updates that the run has made so far, as ``state.global_step`` counts them: 0 in the first update, the
        same in all of an update's micro-batches, and 0 where no Fit has the module.

        0-dim, int64, on the device, and always of the same memory, which changes in place between two updates: what is
        computed of it needs no wait and is compiled once. ``int(module.update_number)`` reads it.

        Example:
            >>> def loss(self, outputs, batch):
            ...     weight = (self.update_number / 1000).clamp(max=1.0)
            ...     return outputs["error"] + weight * outputs["penalty"]
        """
        return read_counter(self, "update_number")

    @yielding_property
    def epoch(self) -> Tensor:
        """The passes over the data that the run has made so far, as ``state.epoch`` has them, with the fraction of the
        present one. 0-dim, float32; else as ``update_number``.
        """
        return read_counter(self, "epoch")

    # torch registers nothing under a name that an object answers to already, unless it is registered.

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, also under a name of this class."""
        make_way(name, self._parameters)
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Register a buffer, also under a name of this class."""
        make_way(name, self._buffers)
        super().register_buffer(name, tensor, persistent)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a layer, also under a name of this class."""
        make_way(name, self._modules)
        super().add_module(name, module)


def logged_of(module: InRun) -> Logged:
    """Return what collects the logs of a module; one that collects nothing where no Fit has it."""
    return Logged() if module._of_run is None else module._of_run.logged


def read_counter(module: InRun, name: str) -> Tensor:
    """Return a counter of the run that trains a module."""
    check_no_replica(module, name)
    of_run = module._of_run
    return torch.zeros((), dtype=DTYPES[name]) if of_run is None else of_run.counters.read(name)


def check_no_replica(module: nn.Module, what: str) -> None:
    """Refuse what a copy of the module that ``strategy="dp"`` has made for a device asks for.

    Raises:
        ValueError: it is such a copy.
    """
    if "_is_replica" in vars(module):
        raise ValueError(
            f"{what} in forward: strategy='dp' runs forward on copies of the module on several devices. Write it in "
            "loss, or use strategy='ddp'."
        )


def make_way(name: str, registered: dict[str, Any]) -> None:
    """Have torch take a name that one of ours is in the way of."""
    if isinstance(vars(InRun).get(name), Yielding):
        registered.setdefault(name, None)
