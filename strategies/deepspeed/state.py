"""A ZeRO engine's parameters and optimizer state as plain tensors by name, and back: what the one checkpoint format
holds. DeepSpeed's own checkpoints, which are pickled, are neither written nor read.

ZeRO cuts flat groups of parameters, so a rank's share of a matrix is no rectangle. Here each parameter is gathered in
turn and cut by rows (a DTensor): one whole parameter at a time is all that a rank ever holds.

The names with an underscore are DeepSpeed's own, of the 0.19 releases.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.overrides import TorchFunctionMode

from ..mesh import whole_of


class ZeroState:
    """Reads and writes the state of an engine at stages 1 to 3. Every method is collective.

    Args:
        engine: made by ``deepspeed.initialize``.
        groups: the optimizer's groups as they were before, each a sequence of the module's parameters.
        mesh: all ranks, in one dimension.
    """

    def __init__(self, engine: Any, groups: Sequence[Sequence[nn.Parameter]], mesh: DeviceMesh) -> None:
        self.zero = engine.optimizer
        self.base = engine.optimizer.optimizer
        self.module = engine.module
        self.stage = engine.zero_optimization_stage()
        self.mesh = mesh
        self.group_of = {id(parameter): number for number, group in enumerate(groups) for parameter in group}
        self.shapes = {id(p): getattr(p, "ds_shape", p.shape) for p in self.module.parameters()}

    def flat_shards(self) -> Iterator[tuple[int, Tensor]]:
        """This rank's flat float32 shards, each with the number of its group; the optimizer's state is kept by them."""
        if self.stage == 3:
            for number, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
                yield self.zero.sub_group_to_group_id[number], flat
        else:
            yield from enumerate(self.zero.single_partition_of_fp32_groups)

    def relink(self) -> None:
        """Have stages 1 and 2 find the optimizer's state of every group; by themselves they do it once, and not again
        where the state has been replaced.
        """
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    # Parameters.

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by name, tied ones by each: the float32 master weights, cut by rows; plain where every rank
        has the whole anyway.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        done: dict[int, Tensor] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if id(parameter) not in done:
                if id(parameter) in self.group_of:
                    whole = safe_get_full_fp32_param(parameter)
                    done[id(parameter)] = self.rows(whole.detach().view(self.shapes[id(parameter)]))
                elif self.stage == 3:
                    with self.gathered(parameter):
                        done[id(parameter)] = self.rows(parameter.detach())
                else:
                    done[id(parameter)] = parameter.detach()
            yield name, done[id(parameter)]

    @torch.no_grad()
    def load_parameters(self, state: Mapping[str, Tensor]) -> None:
        """Take parameters by name, cut as ``parameters`` gives them; others stay."""
        for name, parameter in self.module.named_parameters():
            if name not in state:
                continue
            whole = whole_of(state[name])
            if self.stage == 3:
                with self.gathered(parameter, modifier_rank=0):
                    parameter.data.copy_(whole)
            else:
                parameter.data.copy_(whole)
            if id(parameter) in self.group_of:
                self.set_master(parameter, whole)

    def set_master(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Replace a parameter's float32 master weights."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if self.stage == 3:
            safe_set_local_fp32_param(parameter, own_piece(parameter, whole))
        else:
            safe_set_full_fp32_param(parameter, whole)

    # Other weights for a while. The flat shards have no names that a checkpoint knows.

    def held(self) -> dict[str, Tensor]:
        """This rank's flat float32 shards, under names that are its own."""
        return {f"shard {number}": flat.detach() for number, (_, flat) in enumerate(self.flat_shards())}

    @contextmanager
    def masters(self, held: Mapping[str, Tensor]) -> Iterator[None]:
        """In here the float32 master weights are others; those that the module computes with stay."""
        places = self.held()
        own = {name: place.clone() for name, place in places.items()}
        for name, place in places.items():
            place.copy_(held[name])
        try:
            yield
        finally:
            for name, place in places.items():
                place.copy_(own[name])

    def trained(self) -> dict[str, Tensor]:
        """The master weights of trained parameters by name, tied ones once, cut by rows."""
        names = {name for name, p in self.module.named_parameters() if id(p) in self.group_of}
        return {name: weight for name, weight in self.parameters() if name in names}

    def held_from(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut weights by name into flat shards."""
        with self.masters(self.held()):
            for name, parameter in self.module.named_parameters():
                if name in weights:
                    self.set_master(parameter, whole_of(weights[name]))
            return {name: flat.clone() for name, flat in self.held().items()}

    # Gradients, between the last backward and the step.

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield whole gradients by name, on the host."""
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self.module.named_parameters():
            if id(parameter) in self.group_of:
                gradient = safe_get_full_grad(parameter)
                if gradient is not None:
                    yield name, gradient.detach().view(self.shapes[id(parameter)]).cpu()

    # The optimizer's state.

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """Parameter name to (key to value): moments cut by rows, counters as they are. Empty before the first step."""
        from deepspeed.utils import safe_get_full_optimizer_state

        held = {group: (flat, self.base.state[flat]) for group, flat in self.flat_shards() if flat in self.base.state}
        if not held:
            return {}
        self.relink()
        found: dict[str, dict[str, Any]] = {}
        for name, parameter in self.module.named_parameters():
            if id(parameter) not in self.group_of:
                continue
            flat, entries = held[self.group_of[id(parameter)]]
            found[name] = {}
            for key, value in entries.items():
                if is_moment(value, flat):
                    whole = safe_get_full_optimizer_state(parameter, key)
                    found[name][key] = self.rows(whole.detach().view(self.shapes[id(parameter)]))
                else:
                    found[name][key] = value.clone() if isinstance(value, Tensor) else value
        return found

    def load_optimizer_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace the optimizer's state. A group has one counter of steps: its furthest parameter's. A parameter
        without state (no gradient has reached it) gets moments of 0.
        """
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self.base.state.clear()
        if not state:
            return
        parameters = dict(self.module.named_parameters())
        of_group: dict[int, dict[str, Any]] = {}
        for name, entries in state.items():
            merged = of_group.setdefault(self.group_of[id(parameters[name])], {})
            for key, value in entries.items():
                if not self.is_counter(parameters[name], key, value):
                    merged[key] = value.dtype
                elif key not in merged or float(value) > float(merged[key]):
                    merged[key] = value
        for group, flat in self.flat_shards():
            if group in of_group:
                self.base.state[flat] = {
                    key: torch.zeros_like(flat.data, dtype=value) if isinstance(value, torch.dtype) else copied(value)
                    for key, value in of_group[group].items()
                }
        self.relink()
        for name, parameter in parameters.items():
            for key, value in state.get(name, {}).items():
                if self.is_counter(parameter, key, value):
                    continue
                if self.stage == 3:
                    safe_set_local_optimizer_state(parameter, own_piece(parameter, whole_of(value)), key)
                else:
                    safe_set_full_optimizer_state(parameter, whole_of(value), key)

    # Shapes.

    @contextmanager
    def gathered(self, parameter: nn.Parameter, modifier_rank: int | None = None) -> Iterator[None]:
        """In here a stage-3 parameter is whole; afterwards ``modifier_rank``'s values are everybody's."""
        import deepspeed

        with ScalarsAsBytes(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank):
            yield

    def rows(self, whole: Tensor) -> Tensor:
        """This rank's rows of a whole tensor, as a copy; a number stays one."""
        if not whole.ndim:
            return whole.clone()
        rows = torch.chunk(whole, self.mesh.size())
        rank = self.mesh.get_local_rank()
        own = rows[rank].clone() if rank < len(rows) else whole.new_empty((0, *whole.shape[1:]))
        return DTensor.from_local(
            own, self.mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
        )

    def is_counter(self, parameter: nn.Parameter, key: str, value: Any) -> bool:
        """Whether an entry of a parameter's state counts something, instead of having the parameter's shape."""
        return key == "step" or not isinstance(value, Tensor) or tuple(value.shape) != tuple(self.shapes[id(parameter)])


class ScalarsAsBytes(TorchFunctionMode):
    """In here a tensor without dimensions can be viewed as bytes, by which DeepSpeed broadcasts every parameter."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.view and args[0].ndim == 0 and args[1:] == (torch.uint8,):
            return args[0].reshape(1).view(torch.uint8)
        return function(*args, **(kwargs or {}))


def is_moment(value: Any, flat: Tensor) -> bool:
    """Whether an entry of the optimizer's state has a number for each one of the flat shard."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.numel() == flat.numel()


def copied(value: Any) -> Any:
    """Copy a tensor; return any other value as it is."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def own_piece(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """This rank's piece of a parameter as stage 3 cuts it: flat, the last one filled up with zeros. (DeepSpeed's
    setters of whole tensors fail where the ranks don't divide them.)
    """
    import deepspeed

    held: Any = parameter
    size = held.ds_tensor.numel()
    rank = deepspeed.comm.get_rank(group=held.ds_process_group)
    piece = whole.reshape(-1)[rank * size : (rank + 1) * size].float()
    return nn.functional.pad(piece, (0, size - piece.numel()))


StepEngine = Callable[[], None]


class EngineOptimizer(torch.optim.Optimizer):
    """Stands for the optimizer inside an engine: groups of the module's own parameters, whose options count.

    The engine's groups hold flat shards, or nothing between two steps; schedules, checkpoints and logs go by these.

    Args:
        base: the optimizer inside the engine; its state is this one's.
        groups: its groups as they were before.
        step_engine: makes the step.
    """

    def __init__(
        self, base: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]], step_engine: StepEngine
    ) -> None:
        super().__init__([dict(group) for group in groups], dict(base.defaults))
        self.base, self.step_engine = base, step_engine
        self.state = base.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Hand the options on and have the engine step."""
        assert closure is None
        for group, own in zip(self.base.param_groups, self.param_groups, strict=True):
            for name, value in own.items():
                if name != "params":
                    group[name] = value
        self.step_engine()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The engine drops gradients when it steps."""
