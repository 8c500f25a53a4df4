"""What every strategy promises: the verbs of a run, in the order in which the loop uses them."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from ..precision.base import Precision, ShapesOnRank
from ..precision.frozen import check_frozen_parts, convert_frozen
from ..precision.linear_layers import put_back
from ..precision.names import did_you_mean
from .devices import default_device, move_to
from .matrix import check_cell
from .updating import Updating

ConfigureOptimizer = Callable[[nn.Module], Optimizer]
Prepare = Callable[[nn.Module], None]


def nothing_to_prepare(module: nn.Module) -> None:
    """Leave the module as it is."""


@dataclass(frozen=True)
class NoOptions:
    """Options of a strategy that has none."""


@dataclass(frozen=True)
class RunDescription:
    """What a run is, for a strategy whose own configuration says some of it again.

    Attributes:
        micro_batch_size: samples a device and micro-batch.
        gradient_accumulation_steps: micro-batches an update.
        max_grad_norm: 0 where gradients aren't clipped.
        optimizer: its name; None where the module brings its own.
        learning_rate, betas, epsilon, weight_decay: of the optimizer.
        schedule: its name; None where the module brings its own.
        warmup_steps, total_steps: of the schedule.
        compiles_blocks: whether blocks are compiled.
        compiles_checkpointed_blocks: whether blocks are both compiled and computed again in backward.
    """

    micro_batch_size: int
    gradient_accumulation_steps: int
    max_grad_norm: float
    optimizer: str | None
    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    schedule: str | None
    warmup_steps: int
    total_steps: int
    compiles_blocks: bool
    compiles_checkpointed_blocks: bool


class Strategy(Updating):
    """Places a module on devices and runs the steps of an update there.

    The verbs, in the order in which a run uses them::

        set_up                      process group, device, mesh
        expect                      what the run is, where it trains
        place                       convert, shard or wrap the module, then make the optimizer
        for each update:
            for each micro-batch:
                split_batch         on the host, before its items are counted; in evaluation too
                to_device           in evaluation too
                accumulate(last)    entered around forward and backward; gradients are reduced on the last
                forward_context     entered around forward and loss
                backward
            prepare_gradients       unscale
            clip_grad_norm          the true norm over all shards; find_nonfinite where gradients aren't clipped
            step, skip              the step may be left out by loss scaling, or by a flag on the device
            flush                   when the gradients are gone; in evaluation after each micro-batch
        place_turns, turn           after place, and around all of the above, where a module is trained in turns
        sum_over_data_ranks, read, gather, broadcast, barrier
        model_state, optimizer_state, load_optimizer_state
        tell_failure, release, begin_again      where a run that failed is begun anew; attempt is entered around it
        tear_down

    The base class is one process on one device. It doubles as the degree-1 case of all others: the loop knows no other
    path.

    Args:
        **options: fields of the class's ``Options``, a frozen dataclass.

    Attributes:
        name: the word that chooses it (``strategy="ddp"``).
        options: see ``Options``.
        device: where this rank's tensors live; set by ``set_up``.
        rank, world_size, ...: see Ranks.
        precision, module, model, optimizer: see PlacedModule.
        moved, turn_now: see TurnTaking.
        gradients_are_alike, normed, ...: see Updating.
    """

    name: ClassVar[str]
    Options: ClassVar[type] = NoOptions
    needs_ranks: ClassVar[bool] = False
    """Whether it is worth starting a process per device for."""
    parameter_form: ClassVar[str] = "whole"
    """What the optimizer is given: "whole" parameters, "dtensor" for shards that know their whole, or "flat" for pieces
    that know nothing of rows and columns."""
    gradients_are_final_in_backward: ClassVar[bool] = False
    """Whether what backward accumulates in a parameter is the gradient of the whole update, or its last part: then an
    optimizer may consume it there and then (LOMO)."""
    takes_closure: ClassVar[bool] = True
    """Whether an optimizer may compute loss and gradients again within its step, by a closure (LBFGS)."""
    replicas_agree: ClassVar[bool] = True
    """Whether ranks hold the same numbers after each update, where they hold the same part: a run in which they don't
    is ended. Where they may differ for a while, ``settle`` brings them together."""
    replicas_differ: ClassVar[str] = (
        "Something changed them on some ranks alone: a callback or an optimizer that goes by the rank, values drawn "
        "from a rank's own random numbers, or a gradient that isn't averaged over the ranks."
    )
    """The likely cause, where ranks hold other numbers of what they hold alike."""
    refused_arguments: ClassVar[Mapping[str, str]] = {}
    """Arguments of a run that have no effect here, or can't be: why not, and what to write instead."""
    chooses: ClassVar[bool] = False
    """Whether it stands for another one, which is chosen among candidates when a Fit is made."""
    candidates_to_measure: int = 0
    """Of how many candidates the fastest is taken, where it stands for another one; 0 goes by their plans."""
    unprofiled: ClassVar[str] = ""
    """Why profilers don't see what runs here, and what to use instead; "" where they do."""
    unplayed: ClassVar[str] = ""
    """Why no rank can be played in a process without the others (strategies/played/), and what to plan instead, after
    the strategy's name; "" where it can."""
    played_by: ClassVar[str] = "played.rank:PlayedRank"
    """The class, as "file:Class" of this folder, that says what a played rank does otherwise than a real one."""
    device: torch.device = torch.device("cpu")

    # For one strategy: DP runs copies of the module, and XLASPMD recomputes by a function of its own.
    runs_copies: ClassVar[bool] = False
    """Whether forward runs on copies of the module, made anew each time."""
    recompute: Callable[..., Any] = staticmethod(checkpoint)
    """Called as torch.utils.checkpoint.checkpoint: computes a block's activations anew in backward."""
    recompute_options: ClassVar[Mapping[str, Any]] = {"use_reentrant": False}

    def __init__(self, **options: Any) -> None:
        known = [field.name for field in dataclasses.fields(self.Options)]
        for option in options:
            if option not in known:
                hint = did_you_mean(option, known) if known else "It has none."
                raise TypeError(f"{type(self).__name__} has no option {option!r}. {hint}")
        self.options = self.Options(**options)

    @property
    def learns_first_graph(self) -> bool:
        """Whether every backward must have the graph of the first one."""
        return False

    @property
    def splits_classes(self) -> bool:
        """Whether the loss is given logits cut by class over ranks, which not every loss can take."""
        return False

    @property
    def reorders_sums(self) -> bool:
        """Whether sums inside a layer are added in another order than on one device."""
        return self.tensor_parallel_size > 1

    @property
    def placement(self) -> str:
        """The strategy's column in the table of precisions (strategies/matrix.py)."""
        return self.name

    # Set up and place.

    def check_precision(self, precision: Precision) -> None:
        """Refuse a precision that can't work here. Fit asks before anything is started, and ``set_up`` again: it may be
        called without Fit.

        Raises:
            ValueError: says why, and what works.
        """
        check_cell(precision.name, self.placement)
        refused = precision.refused_parameters
        for kind in sorted(self.parameter_kinds() & refused.keys()):
            raise ValueError(f"precision={precision.name!r} under strategy={self.name!r}: {refused[kind]}")

    def check_module(self, module: nn.Module) -> None:
        """Refuse a module that can't be placed here, as far as its layers tell before it is built and placed.

        Raises:
            ValueError: says why, and what works.
        """

    def set_up(self, precision: Precision) -> None:
        """Choose the device and make the process group; ``precision`` is bound to both.

        Raises:
            ValueError: this strategy can't run in that precision, or on this many ranks; the message names what works.
        """
        self.precision = precision
        self.check_precision(precision)
        self.device = self.choose_device()
        precision.set_up(self.device, self.max_over_ranks)

    def choose_device(self) -> torch.device:
        """Return the device that this rank computes on."""
        return default_device()

    def parameter_kinds(self) -> frozenset[str]:
        """What the placed parameters are, for ``Precision.refused_parameters``: the word of ``parameter_form``, and
        "tensor_parallel" where layers are cut.
        """
        return frozenset((self.parameter_form, *(("tensor_parallel",) if self.tensor_parallel_size > 1 else ())))

    def shapes_on_rank(self, module: nn.Module) -> ShapesOnRank:
        """The weights that this rank will compute with a part of: layer name to the part's shape."""
        return {}

    def build(self, module: nn.Module) -> list[nn.Module]:
        """Build the late layers, and bring the module into the dtypes and layers of the precision.

        Returns:
            The late layers, whose parameters have no memory yet.
        """
        from .materialize import build_on_meta, has_meta

        put_back(module)
        build_on_meta(module)
        check_frozen_parts(module)
        self.precision.convert_module(module)
        convert_frozen(module)  # a precision of the user's own may know nothing of them
        self.precision.replace_layers(module, self.shapes_on_rank(module))
        return [layer for layer in module.modules() if has_meta(layer)]

    def begin_alike(self, module: nn.Module) -> None:
        """Have all ranks begin from rank 0's values of what was made before ``build``; late layers are filled alike."""

    def move(self, module: nn.Module) -> nn.Module:
        """Return the module with its tensors on the device that it computes on."""
        return module.to(self.device)

    def place(
        self, module: nn.Module, configure_optimizer: ConfigureOptimizer | None, prepare: Prepare = nothing_to_prepare
    ) -> None:
        """Put the module where it runs, and make its optimizer when its parameters are final. Called once.

        Args:
            module: the user's module, on any device.
            configure_optimizer: module to optimizer; None when nothing is trained.
            prepare: changes the module's blocks (activation checkpointing, compilation) when all layers are there, and
                before they are sharded or wrapped.
        """
        from .materialize import materialize

        late = self.build(module)
        self.begin_alike(module)
        materialize(module, late, self.device)
        prepare(module)
        self.module = self.model = self.move(module)
        self.optimizer = configure_optimizer(module) if configure_optimizer else None
        self.precision.initialize(module, self.optimizer)

    # One update.

    def split_batch(self, batch: Any) -> Any:
        """Return this rank's part of a micro-batch whose sequences it shares with other ranks."""
        return batch

    def to_device(self, batch: Any) -> Any:
        """Return a micro-batch with its tensors on the device that the module computes on."""
        return batch if self.device.type == "cpu" else move_to(batch, self.device)

    def join_outputs(self, outputs: Sequence[Any]) -> Any:
        """Join, on the host, what forward gave each rank that shares a micro-batch to what one device would give."""
        return outputs[0]

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Make a context for one micro-batch's forward and backward; the last one of an update reduces gradients."""
        self.precision.begin_micro_batch(last)
        return nullcontext()

    def forward_context(self) -> AbstractContextManager[Any]:
        """Make a context for forward and loss."""
        return self.precision.forward_context()

    def local_loss(self, loss: Tensor) -> Tensor:
        """The loss as a plain 0-dim tensor on this rank, where the strategy's forward leaves it spread or repeated."""
        return loss

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss`` (scaled where the precision scales) to those of the update."""
        self.precision.backward(loss)

    def gradients(self, loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Return what ``backward`` would add to the gradients of some tensors, and add it to none; None for those that
        the loss doesn't depend on.
        """
        return list(torch.autograd.grad(self.precision.scale(loss), tensors, allow_unused=True))

    # Beginning again after a failure that another attempt may not meet: between ``tell_failure`` and another run.

    def release(self, module: nn.Module) -> None:
        """Let go of what ``place`` made and registered. The caller then puts the module back as it was before that.

        Args:
            module: the user's, perhaps placed only in part.
        """
        self.forget_module()

    def begin_again(self) -> None:
        """Meet the other ranks again and set up anew; ``place`` may follow. Collective, and the waiting ranks are woken
        by it: their collectives fail. Nothing outside may hold a process group or a mesh any more.

        Raises:
            RuntimeError: another rank has ended instead, or doesn't come.
        """
        self.set_up(self.precision)

    def tear_down(self) -> None:
        """Leave the process group. The strategy can be set up again."""

    # For one strategy: DeepSpeed's engine runs by a configuration of its own. FSDP2 asks whether blocks are compiled.

    def expect(self, run: RunDescription) -> None:
        """Take note, before ``place``, of the run that will train the module; not of one that only evaluates.

        Raises:
            ValueError: the strategy was configured for another run.
        """

    def configuration(self) -> Mapping[str, Any]:
        """Return the configuration of the package that does the work, for the log; JSON types. See ``expect``."""
        return {}

    def held_apart(self) -> Mapping[str, Sequence[Tensor]]:
        """Tensors that this rank holds elsewhere than in the module, its gradients and the optimizer's state, by what
        they are: "parameters", "frozen_parameters", "gradients", "optimizer_state" (master weights, too), "messages".
        """
        return {}

    @property
    def held_on_host(self) -> Collection[str]:
        """What lies in the host's memory instead of the device's, in the words of ``held_apart``."""
        return ()

    def optimizer_problem(self, optimizer: Optimizer) -> str | None:
        """Why the optimizer can't step the parameters as they are placed here, and what to use instead; None where it
        can.
        """
        return None

    # For one strategy. XLASPMD gathers what a device is to do before the device begins, and its devices draw their own
    # random numbers.

    def factor(self, value: float) -> float | Tensor:
        """Return a number that changes from micro-batch to micro-batch in the form in which the device takes it."""
        return value

    def flush(self) -> None:
        """Have the device begin with what it was given so far, where operations are gathered before they run."""

    def seed(self, seed: int) -> None:
        """Seed the device's random number generators, where torch's own functions don't reach them."""

    def random_state(self) -> dict[str, Any]:
        """Return the state of those generators, as JSON types."""
        return {}

    def restore_random_state(self, state: Mapping[str, Any]) -> None:
        """Set those generators to a state that ``random_state`` gave, unless it was saved on other devices."""

    def __repr__(self) -> str:
        given = (
            f"{field.name}={getattr(self.options, field.name)!r}"
            for field in dataclasses.fields(self.Options)
            if getattr(self.options, field.name) != field.default
        )
        return f"{type(self).__name__}({', '.join(given)})"
