"""What operators do on one rank: the storages that they make and free, the messages that they send, their FLOPs."""

import bisect
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

aten = torch.ops.aten
DEVICE = torch.ops.prim.device.default
PLAIN = Tensor, nn.Parameter, FakeTensor  # any other class takes an operator apart, and has the parts computed
SENDING = "c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor"  # namespaces of operators that send
FORWARD, BACKWARD, RECOMPUTED, OTHER = "forward", "backward", "recomputed", "update"
PARAMETERS, GRADIENTS, STATE, BUFFERS = "parameters", "gradients", "optimizer_state", "buffers"
FROZEN, AVERAGES, HOST_AVERAGES = "frozen_parameters", "averaged_weights", "averaged_weights_on_host"
GATHERED, MESSAGES, ACTIVATIONS, TEMPORARY = "gathered", "messages", "activations", "temporary"

Formula = Callable[..., int]


def attention_flops(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """The FLOPs of attention's forward on the CPU, which torch's own table lacks."""
    return int(sdpa_flop(query, key, value, out_val=out_val))


def attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """The FLOPs of attention's backward on the CPU."""
    return int(sdpa_backward_flop(gradient, query, key, value))


class Piece:
    """A storage that is there, or was.

    Attributes:
        bytes: its size now.
        kind: what it holds, where that is known.
        phase, where: the part of the update, and the layer, that made it.
    """

    __slots__ = "bytes", "kind", "phase", "where"

    def __init__(self, size: int, kind: str, phase: str, where: str) -> None:
        self.bytes, self.kind, self.phase, self.where = size, kind, phase, where

    def resize(self, size: int) -> int:
        """Have another size; return by how much that changed."""
        change, self.bytes = size - self.bytes, size
        return change

    def hold(self, kind: str) -> None:
        """Hold something of a kind from here on."""
        self.kind = kind


@dataclass(frozen=True)
class Event:
    """A storage that was made, freed or changed its size: by so many bytes, in a phase and a layer."""

    piece: Piece
    change: int
    phase: str
    where: str


@dataclass(frozen=True)
class Message:
    """A collective.

    Attributes:
        operation: as "all_gather".
        bytes: of the whole tensor: what an all-gather gives each rank, what a reduce-scatter or all-reduce takes.
        ranks: of the group.
    """

    operation: str
    bytes: int
    ranks: tuple[int, ...]


class Recording(TorchDispatchMode):
    """Entered around whatever is to be recorded, real or played; events are kept from ``begin`` on.

    Storages are seen when an operator returns a tensor that lies in them, and go when torch frees them. What an
    operator needs for itself alone, while it runs, isn't seen.

    Attributes:
        events, messages: since ``begin``.
        flops: by phase.
        at_begin: the storages that were there at ``begin``, and their bytes then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[Piece, Any]] = {}
        self.events: list[Event] = []
        self.messages: list[Message] = []
        self.flops: dict[str, int] = {}
        self.at_begin: dict[int, tuple[Piece, int]] = {}
        self.is_on = False
        self.names: dict[int, str] = {}
        self.layers: list[str] = []
        self.turns: list[tuple[int, str]] = []  # (autograd's number from which on nodes are of that layer, its name)
        self.group_ranks: dict[str, tuple[int, ...]] = {}
        self._handles: list[Any] = []
        self._resize: Any = None

    def __enter__(self) -> "Recording":
        hooks = nn.modules.module
        self._handles = [
            hooks.register_module_forward_pre_hook(self._enter_layer),
            hooks.register_module_forward_hook(self._leave_layer, always_call=True),
        ]
        self._resize = resize = torch.UntypedStorage.resize_
        recording = self

        def seen(storage: torch.UntypedStorage, size: int) -> Any:
            resize(storage, size)
            recording.see_storage(storage, GATHERED)
            return storage

        setattr(torch.UntypedStorage, "resize_", seen)  # noqa: B010 (what a storage holds is changed by nothing else)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        setattr(torch.UntypedStorage, "resize_", self._resize)  # noqa: B010
        for handle in self._handles:
            handle.remove()

    def begin(self) -> None:
        """Forget what was recorded, and record from here on what changes."""
        self.events, self.messages, self.flops = [], [], {}
        self.turns.clear()
        self.at_begin = {key: (piece, piece.bytes) for key, (piece, _) in self.live.items()}
        self.is_on = True

    def end(self) -> None:
        """Record no more."""
        self.is_on = False

    # Layers.

    def name_layers(self, module: nn.Module) -> None:
        """Have layers be named as the module names them."""
        self.names = {id(layer): name for name, layer in module.named_modules()}

    def _enter_layer(self, layer: nn.Module, inputs: Any) -> None:
        self.layers.append(self.names.get(id(layer)) or (self.layers[-1] if self.layers else ""))
        self._turn()

    def _leave_layer(self, layer: nn.Module, inputs: Any, outputs: Any) -> None:
        if self.layers:
            self.layers.pop()
        self._turn()

    def _turn(self) -> None:
        if torch._C._current_graph_task_id() < 0:
            self.turns.append((torch.autograd._get_sequence_nr(), self.layers[-1] if self.layers else "loss"))

    def place(self) -> tuple[str, str]:
        """The phase of the update, and the layer, that is computed."""
        in_backward = torch._C._current_graph_task_id() >= 0
        if self.layers:
            return (RECOMPUTED if in_backward else FORWARD), self.layers[-1]
        if not in_backward:
            return OTHER, ""
        node = torch._C._current_autograd_node()
        if node is None:
            return BACKWARD, ""
        found = bisect.bisect_right(self.turns, (node._sequence_nr(), "\uffff")) - 1
        return BACKWARD, self.turns[found][1] if found >= 0 else ""

    # Operators.

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here, and torch's way around its compiler costs time at every operator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute an operator and see what it made."""
        if func is DEVICE:  # a fake tensor is asked for it at every turn
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = kwargs or {}
        if not all(kind in PLAIN for kind in types):
            return NotImplemented  # a class of its own takes the operator apart first
        out = func(*args, **kwargs)
        if func.namespace in SENDING:
            self._see_message(func, args, out)
        elif self.is_on:
            self._count_flops(func, args, kwargs, out)
        # A thousand chunks of a tensor lie where the first does.
        for tensor in tensors_in(out[:1] if func.is_view and isinstance(out, list | tuple) else (out,)):
            self.see(tensor)
        return out

    def _count_flops(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        formula = EXTRA_FLOPS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if formula is not None:
            phase, _ = self.place()
            self.flops[phase] = self.flops.get(phase, 0) + int(formula(*args, **kwargs, out_val=out))

    def _see_message(self, func: Any, args: Any, out: Any) -> None:
        name = func._schema.name.rpartition("::")[2]
        if name not in PLAIN_NAMES:
            return
        sides = [list(tensors_in((side,))) for side in (*args[:2], out)]
        for tensor in (tensor for side in sides for tensor in side):
            self.see(tensor, MESSAGES)
        if self.is_on:
            size = max(sum(t.numel() * t.element_size() for t in side) for side in sides)
            self.messages.append(Message(PLAIN_NAMES.get(name, name), size, self._ranks_of(args)))

    def _ranks_of(self, args: Any) -> tuple[int, ...]:
        for value in args:
            if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
                group: Any = dist.ProcessGroup.unbox(value)
                break
        else:
            name: Any = [value for value in args if isinstance(value, str)][-1]
            group = torch._C._distributed_c10d._resolve_process_group(name)
        if group.group_name not in self.group_ranks:
            self.group_ranks[group.group_name] = tuple(dist.get_process_group_ranks(group))
        return self.group_ranks[group.group_name]

    # Storages.

    def see(self, tensor: Tensor, kind: str = "", overrides: bool = False) -> None:
        """Note a tensor's storage, and what it holds; a kind that is known stays, unless it is overridden."""
        if tensor.layout is not torch.strided:
            for part in (tensor._indices(), tensor._values()):
                self.see(part, kind, overrides)
            return
        if tensor.is_meta and not isinstance(tensor, FakeTensor):
            return
        piece = self.see_storage(tensor.untyped_storage(), kind)
        if overrides:
            piece.hold(kind)

    def see_storage(self, storage: torch.UntypedStorage, kind: str = "") -> Piece:
        """Note a storage."""
        key, size = storage._cdata, storage.nbytes()
        found = self.live.get(key)
        if found is None:
            phase, where = self.place()
            piece = Piece(size, kind, phase, where)
            self.live[key] = piece, weakref.ref(storage, lambda _: self._forget(key))
            if size and self.is_on:
                self.events.append(Event(piece, size, phase, where))
            return piece
        piece = found[0]
        if kind and not piece.kind:
            piece.hold(kind)
        if size != piece.bytes:
            self._change(piece, size)
        return piece

    def _forget(self, key: int) -> None:
        piece, _ = self.live.pop(key)
        if piece.bytes:
            self._change(piece, 0)

    def _change(self, piece: Piece, size: int) -> None:
        change = piece.resize(size)
        if self.is_on:
            self.events.append(Event(piece, change, *self.place()))

    def note(self, kind: str, tensors: Iterable[Tensor]) -> int:
        """Note what some tensors are, each storage of a kind once.

        Returns:
            The bytes of their storages that had no kind before, or this one.
        """
        storages = {t.untyped_storage()._cdata: t for t in tensors if t.layout is torch.strided}
        for tensor in storages.values():
            self.see(tensor, kind, overrides=True)
        return sum(self.live[key][0].bytes for key in storages)


EXTRA_FLOPS: dict[Any, Formula] = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}
# Collectives by the names of torch's operators. Others wait; or send from host to host, as the message of an update is
# sent, which is a few numbers.
PLAIN_NAMES = {
    "all_reduce": "all_reduce", "all_reduce_": "all_reduce", "all_reduce_coalesced": "all_reduce",
    "allreduce_": "all_reduce", "allreduce_coalesced_": "all_reduce", "reduce_": "reduce",
    "all_gather_into_tensor": "all_gather", "all_gather_into_tensor_out": "all_gather", "allgather_": "all_gather",
    "_allgather_base_": "all_gather", "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter", "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter", "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast": "broadcast", "broadcast_": "broadcast",
    "all_to_all_single": "all_to_all", "alltoall_base_": "all_to_all", "alltoall_": "all_to_all",
    "shard_dim_alltoall": "all_to_all",
}  # fmt: skip


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
