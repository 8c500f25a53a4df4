"""A strategy as one rank of a world that isn't there plays it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..base import ConfigureOptimizer, Prepare, Strategy, nothing_to_prepare
from ..mesh import clear_tensor_caches, forget_meshes
from .stage import Stage

Kind = TypeVar("Kind", bound=Strategy)


class PlayedRank(Strategy):
    """What a played rank does otherwise than a real one; ``play`` puts it before the strategy's own class.

    All other ranks are taken to say and to hold what this one does. Its device is the CPU, whose operators torch can
    compute the shapes of on any machine. Nothing has a value.

    Attributes:
        fake_stage: where its tensors are.
    """

    fake_stage: Stage

    def choose_device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def place(
        self, module: nn.Module, configure_optimizer: ConfigureOptimizer | None, prepare: Prepare = nothing_to_prepare
    ) -> None:
        """Place the module as the strategy does, with no values in it."""
        with self.fake_stage.placing():
            super().place(module, configure_optimizer, prepare)

    def place_turns(self, moved: Mapping[str, Sequence[str]]) -> None:
        """Place the turns in the same way."""
        with self.fake_stage.placing():
            super().place_turns(moved)

    def build(self, module: nn.Module) -> list[nn.Module]:
        """Build layers and buffers for real: how many there are may hang on numbers. Parameters are without memory."""
        with self.fake_stage.left():
            late = super().build(module)
        module.initial_values = no_values  # type: ignore[assignment]
        return late

    def begin_alike(self, module: nn.Module) -> None:
        """Exchange what has values for what has none; nothing is sent."""
        self.fake_stage.take(module)

    def move(self, module: nn.Module) -> nn.Module:
        """Leave the module where it is."""
        return module

    def to_device(self, batch: Any) -> Any:
        """The batch without its values."""
        return self.fake_stage.copied(batch)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Make the strategy's context, and note that the user's module computes."""
        with self.fake_stage.in_module(), super().forward_context():
            yield

    def backward(self, loss: Tensor) -> None:
        """Compute gradients as the strategy does."""
        with self.fake_stage.in_module():
            super().backward(loss)

    # Where no update can be played.

    def make_zero_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give parameters gradients of zeros, as memory holds them before a step."""
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.precision.unscale(self.stepping_optimizer())

    def step_by_zeros(self) -> None:
        """Step with those gradients, so that the optimizer makes its state."""
        self.step()

    # What the ranks would tell one another.

    def sum_on_host(self, values: list[int]) -> list[int]:
        """The sums if all ranks had these values."""
        return [value * self.world_size for value in values]

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """This rank's value, for every rank."""
        return [value] * self.world_size

    def gather_to_main(self, value: Any, group: Any = None) -> list[Any]:
        """This rank's value, for every rank."""
        return [value] * self.world_size

    def broadcast(self, value: Any) -> Any:
        """The value."""
        return value

    def barrier(self) -> None:
        """Wait for nobody."""

    def all_say(self, what: str, seconds: float) -> bool:
        """They do."""
        return True

    def copy_from(self, tensor: Tensor, source: int, to_all: bool) -> None:
        """Copy nothing."""


def no_values(name: str, part: Sequence[slice]) -> Tensor:
    """Values for a part of a late parameter that nobody has; see ``TrainModule.initial_values``."""
    return torch.empty([piece.stop - piece.start for piece in part])


def play(strategy: Kind, stage: Stage) -> Kind:
    """Have a strategy, which isn't set up, play one rank. ``world_of`` comes first.

    Raises:
        ValueError: it can't be played; says why.
    """
    if strategy.unplayed:
        raise ValueError(f"strategy={strategy.name!r} {strategy.unplayed}")
    kind = type(strategy)
    file, _, name = kind.played_by.partition(":")
    played = getattr(import_module(f"..{file}", __package__), name)
    strategy.__class__ = type(f"Played{kind.__name__}", (played, kind), {"fake_stage": stage})
    return strategy


@contextmanager
def world_of(rank: int, world_size: int) -> Iterator[None]:
    """In here, this process is a rank of a world whose other ranks aren't there: messages go nowhere.

    Args:
        rank: that is played.
        world_size: ranks.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        leave_behind()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def leave_behind() -> None:
    """In a copy of a process that is in a process group: forget the group, whose threads weren't copied. To leave
    it, or to free it, would wait for them.
    """
    own = dist.distributed_c10d
    world = own._world
    LEFT.append((world.default_pg, dict(world.pg_map), dict(world.pg_names)))
    for held in (world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config, world.pg_to_tag):
        held.clear()
    world.tags_to_pg.clear()
    own._update_default_pg(None)
    own._unregister_all_process_groups()
    forget_meshes()
    clear_tensor_caches()


LEFT: list[Any] = []  # what is never freed
