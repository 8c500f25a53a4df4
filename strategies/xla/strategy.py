"""torch_xla's SPMD: one process and one program, which the compiler cuts over all devices by marked shardings."""

import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from ...precision.master_weights import MASTER_WEIGHT
from ...precision.names import did_you_mean
from ..base import ConfigureOptimizer, Prepare, Strategy, nothing_to_prepare
from ..batches import tensors_of
from ..devices import move_to
from ..materialize import materialize
from ..plans.plan import tie, tied_parameters
from .client import check_mesh, check_package, compilations, on_host, start
from .sharding import (
    AXES,
    DATA,
    FSDP,
    Partition,
    by_samples,
    mark,
    partitions,
)

BEGIN_AT_ZERO = ("Adam", "AdamW", "RMSprop", "SGD")  # whose state is 0 before their first step
WARM_UP = 3  # training programs that may be compiled: without optimizer state, with it, and one to spare


@dataclass(frozen=True)
class XLASPMDOptions:
    """Options of XLASPMD.

    Args:
        mesh: how the devices are arranged: "data" holds copies of the model, "fsdp" shards it, "tensor" cuts its layers
            by the module's ``tensor_parallel_plan()``. Their sizes' product is the number of devices; an axis that
            isn't named has one. None gives all devices to "fsdp".
    """

    mesh: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        for axis, size in (self.mesh or {}).items():
            if axis not in AXES:
                raise ValueError(
                    f"XLASPMD(mesh={dict(self.mesh or {})}): {axis!r} is no axis. {did_you_mean(axis, AXES)}"
                )
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"XLASPMD(mesh=...): an axis counts devices, at least 1. Received: {axis!r}: {size!r}")


class XLASPMD(Strategy):
    """``strategy="xla"``: TPUs (or a CPU as several devices) under torch_xla (Xu et al., GSPMD, 2021).

    One process feeds all devices of one host; a micro-batch holds ``per_device_train_batch_size`` samples for each
    device of "data" and "fsdp". Tensors are marked with how they lie on the mesh, and what a whole update asks for,
    with all its micro-batches, is compiled and executed as one program. A batch of another shape, such as the short
    last one of an epoch, is compiled once more. See XLASPMDOptions.

    A checkpoint is written from host memory, which holds the whole model for that time.

    Example:
        ``Fit(module, data, strategy=XLASPMD(mesh={"fsdp": 4, "tensor": 2}))``
    """

    name = "xla"
    unplayed = "is placed by XLA's compiler, which decides what is held and sent. Plan strategy='fsdp2' instead."
    refused_turns = (
        "it compiles a whole update, with one optimizer that moves all parameters. On GPUs, use strategy='fsdp2' or "
        "'ddp'"
    )
    Options = XLASPMDOptions
    options: XLASPMDOptions
    parameter_form = "lazy"
    takes_closure = False
    compiles_updates = True
    recompute_options: ClassVar[Mapping[str, Any]] = {}
    refused_arguments: ClassVar[Mapping[str, str]] = {
        "spike_updates": "would make the running mean a part of the compiled program, which is untested: leave it out; "
        "updates that aren't finite are left out all the same",
        "torch_compile": "has no effect under strategy='xla', which compiles whole updates. Leave it out",
        "auto_find_batch_size": "doesn't work under strategy='xla': a program that doesn't fit into memory ends the "
        "process's client. Choose per_device_train_batch_size",
        "contrastive_chunks": "can't be had under strategy='xla', where the random numbers of a piece would be part of "
        "the compiled program. Raise the number of devices instead",
    }
    unprofiled = (
        "the host only writes programs down, and the devices run them later, where torch's profiler doesn't see them; "
        "use torch_xla.debug.profiler, and leave profiler out"
    )
    reorders_sums = True  # the compiler has kernels of its own

    mesh: Any
    hooks: list[RemovableHandle]
    partitions: dict[str, Partition]
    updates: int
    compiled_before: int
    recompilations: int
    """Updates after the warm-up that had to be compiled."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        check_package()

    def choose_device(self) -> torch.device:
        """Make the mesh, and return the one device that stands for all of them."""
        from torch_xla.distributed.spmd import Mesh

        devices = start()
        sizes = {axis: (self.options.mesh or {FSDP: devices}).get(axis, 1) for axis in AXES}
        check_mesh(sizes, devices)
        self.devices_per_rank = sizes[DATA] * sizes[FSDP]
        self.mesh = Mesh(list(range(devices)), tuple(sizes.values()), tuple(sizes))
        self.hooks = []
        self.updates = self.recompilations = 0
        self.compiled_before = compilations()
        return torch.device("xla", 0)

    def place(
        self, module: nn.Module, configure_optimizer: ConfigureOptimizer | None, prepare: Prepare = nothing_to_prepare
    ) -> None:
        """Build and fill on the host, move, mark, and make the optimizer, whose state follows its parameters."""
        late = self.build(module)
        materialize(module, late, torch.device("cpu"))
        prepare(module)
        tied = tied_parameters(module)
        module.to(self.device)  # this makes new parameters, which unties them
        tie(tied)
        self.module = self.model = module
        self.partitions = partitions(module, self.mesh)
        for name, parameter in self.named_parameters().items():
            mark(parameter, self.mesh, self.partitions[name])
        for buffer in module.buffers():
            mark(buffer, self.mesh, (None,) * buffer.ndim)
        # Activations stay cut by samples, so that parameters are gathered for a block and not activations.
        for unit in module.shard_units():  # type: ignore[operator]
            self.hooks.append(unit.register_forward_hook(lambda _, inputs, outputs: self.mark_outputs(inputs, outputs)))
        self.optimizer = configure_optimizer(module) if configure_optimizer else None
        self.precision.initialize(module, self.optimizer)

    def mark_outputs(self, inputs: tuple[Any, ...], outputs: Any) -> Any:
        """Mark a block's outputs and their gradients as cut by samples, where they have as many as the inputs."""
        from torch_xla.distributed.spmd import mark_sharding_with_gradients

        samples = next((tensor.shape[0] for tensor in inputs if isinstance(tensor, Tensor) and tensor.ndim), None)

        def marked(value: Any) -> Any:
            if isinstance(value, Tensor) and value.device.type == "xla" and value.ndim and value.shape[0] == samples:
                return mark_sharding_with_gradients(value, self.mesh, by_samples(value))
            return value

        return tree_map(marked, outputs)

    # One update.

    def to_device(self, batch: Any) -> Any:
        """Move a micro-batch, cut by samples: the tensors that have as many as the first."""
        batch = move_to(batch, self.device)
        samples: list[int] = []

        for tensor in tensors_of(batch):
            if tensor.ndim:
                samples.append(tensor.shape[0])
                if tensor.shape[0] == samples[0]:
                    mark(tensor, self.mesh, by_samples(tensor))
        return batch

    def capturable_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups that may compute with tensors where others compute with Python's numbers."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return [group for group in groups if "capturable" in group]

    def step(self, refused: Tensor | None = None) -> None:
        """Step the optimizer, with its learning rates as tensors (see ``factor``), and mark the state that it makes in
        its first step: where the compiler had the choice, it could choose otherwise a step later, and compile twice.

        Args:
            refused: where it isn't 0, everything is what it was: the program chooses, so that the host needn't wait.
        """
        assert self.optimizer is not None
        is_first = not self.optimizer.state
        if refused is not None and is_first and type(self.optimizer).__name__ not in BEGIN_AT_ZERO:
            if refused.item():
                return
            refused = None
        groups = self.capturable_groups()
        learning_rates = [group["lr"] for group in groups]
        for group in groups:
            group["capturable"] = True  # steps are counted on the device; a count from the host would be a new program
            group["lr"] = self.factor(group["lr"])
        before = {} if refused is None else self.changing()
        super().step()
        if refused is not None:
            self.put_back(before, refused)
        for group, learning_rate in zip(groups, learning_rates, strict=True):
            group["lr"] = learning_rate
        if is_first:
            for name, entries in super().optimizer_state().items():
                for value in entries.values():
                    self.mark_like(name, value)

    def changing(self) -> dict[tuple[str, str], Tensor]:
        """Copy what a step changes: (parameter's name, key of the optimizer's state) to tensor, "" for the parameter.
        The copies are instructions of the program, and take memory only where the compiler can't do without.
        """
        return {place: tensor.detach().clone() for place, tensor in self.on_devices()}

    def on_devices(self) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """Yield the trainable parameters, and the tensors in the optimizer's state, that are on the devices."""
        for name, parameter in self.named_parameters().items():
            if parameter.requires_grad:
                yield (name, ""), parameter
        for name, entries in super().optimizer_state().items():
            for key, value in entries.items():
                if isinstance(value, Tensor) and value.device.type == "xla":
                    yield (name, key), value

    @torch.no_grad()
    def put_back(self, before: Mapping[tuple[str, str], Tensor], refused: Tensor) -> None:
        """Give everything the values from before a step where the step is refused. State that the step has made was 0
        before, and a master weight was its parameter.
        """
        for (name, key), tensor in self.on_devices():
            old = before.get((name, key))
            if old is None:
                old = before[name, ""].to(tensor.dtype) if key == MASTER_WEIGHT else torch.zeros_like(tensor)
            tensor.copy_(torch.where(refused > 0.0, old, tensor))

    def mark_like(self, name: str, value: Any) -> None:
        """Mark an entry of a parameter's optimizer state: as the parameter where it has as many numbers, else whole."""
        if isinstance(value, Tensor) and value.device.type == "xla":
            follows = value.shape == self.module.get_parameter(name).shape
            mark(value, self.mesh, self.partitions[name] if follows else (None,) * value.ndim)

    def factor(self, value: float) -> float | Tensor:
        """Make a tensor of a number: plain ones are a part of the program, and two that are equal make it another."""
        return torch.tensor([value]).to(self.device)[0]  # else it would be taken for a plain number

    def flush(self) -> None:
        """Compile the program that was gathered, where it is new, and have the devices begin with it."""
        before = self.compiled_before
        compiled = self.execute()
        if self.optimizer is not None and self.model.training:
            self.updates += 1
            if self.updates > WARM_UP and compiled > before:
                self.recompilations += 1
                if self.recompilations & (self.recompilations - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
                    warnings.warn(
                        f"Update {self.updates} had to be compiled, as {self.recompilations} so far beyond the first "
                        "ones: a shape or a setting differs from those before. Give batches one shape: pad them to one "
                        "length, and set dataloader_drop_last=True.",
                        stacklevel=2,
                    )

    def execute(self) -> int:
        """Have the devices begin with what is outstanding, which needn't be an update, and return the compilations."""
        import torch_xla

        torch_xla.sync()
        self.compiled_before = compilations()
        return self.compiled_before

    def read(self, tensors: Any, *, summed: bool = False) -> list[float]:
        """Copy the tensors to the host one by one: joining them first would be one more program to compile."""
        import torch_xla

        on_host = torch_xla._XLAC._xla_get_cpu_tensors(list(tensors))
        return torch.cat([tensor.reshape(-1).double() for tensor in on_host]).tolist()

    @staticmethod
    def recompute(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Compute anew by torch_xla's own function, whose barrier keeps the compiler from reusing the first result.

        Raises:
            ValueError: it knows one way only.
        """
        from torch_xla.utils.checkpoint import checkpoint

        if kwargs.pop("use_reentrant", True) is not True:
            raise ValueError(
                "gradient_checkpointing_kwargs={'use_reentrant': False} doesn't work under strategy='xla', whose own "
                "function is reentrant. Leave it out."
            )
        preserve = kwargs.pop("preserve_rng_state", True)
        return checkpoint(partial(function, **kwargs), *args, preserve_rng_state=preserve, use_reentrant=True)

    # Random numbers.

    def seed(self, seed: int) -> None:
        """Seed the generator that all devices share."""
        import torch_xla

        torch_xla.manual_seed(seed)

    def random_state(self) -> dict[str, Any]:
        """Return the state of the generator that all devices share."""
        from torch_xla.core import xla_model

        return {"xla": xla_model.get_rng_state()}

    def restore_random_state(self, state: Mapping[str, Any]) -> None:
        """Set the generator to where it stood; after a run on other devices, seed it from the host's state."""
        self.seed(state["xla"] if "xla" in state else zlib.crc32(state["torch"].encode()))

    # State: on the host, since a checkpoint is read in torch's own memory.

    def model_state(self) -> dict[str, Tensor]:
        """Whole parameters and buffers in host memory."""
        state = {name: on_host(tensor) for name, tensor in self.module.state_dict().items()}
        return self.precision.saved_weights(self.module, state)

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Move each tensor to the devices, cut as the one that it replaces; a copy in place would end whole."""
        own = self.module.state_dict(keep_vars=True)
        for name, tensor in state.items():
            moved = tensor.to(self.device)
            mark(moved, self.mesh, self.partitions.get(name, (None,) * tensor.ndim))
            own[name].data = moved
        super().load_model_state(state)
        self.execute()

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """The optimizer's state in host memory."""
        state = super().optimizer_state()
        return {name: {key: on_host(value) for key, value in entries.items()} for name, entries in state.items()}

    def stand_in(self, parameter: Tensor) -> Tensor:
        """Make zeros on the host, where nothing is compiled for a trial."""
        return super().stand_in(torch.zeros(parameter.shape, dtype=parameter.dtype))

    def load_optimizer_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Move what was on the devices back there, cut as its parameter is."""
        counted = {id(p) for group in self.capturable_groups() for p in group["params"]}

        def placed(name: str, value: Any) -> Any:
            if isinstance(value, Tensor) and (value.ndim or id(self.module.get_parameter(name)) in counted):
                value = value.to(self.device)
                self.mark_like(name, value)
            return value

        super().load_optimizer_state(
            {name: {key: placed(name, value) for key, value in entries.items()} for name, entries in state.items()}
        )
        self.execute()

    def full_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield whole gradients, after what is outstanding was executed."""
        self.execute()
        yield from super().full_gradients()

    def release(self, module: nn.Module) -> None:
        """Take the hooks off the blocks, and let go of the module."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        super().release(module)
