"""Context parallelism: each rank holds a part of every sequence, and attention reaches over all parts in a ring."""

import inspect
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import mha
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention as ring
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..batches import (
    LABELS,
    field_names,
    is_by_position,
    map_batch,
    refilled,
    tensors_of,
    with_fields,
)

POSITIONS = ("positions", "position_ids")
"""What forward may call the places of its tokens in the whole sequence."""

SEQUENCE = Shard(2)  # of queries, keys and values: (batch, heads, length, features)
# torch's plain kernel is left out: it would mask by the order in which the ranks hold the sequence.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]

attention_of_one = F.scaled_dot_product_attention


class ContextParallel:
    """Cuts batches along the sequence, and has causal attention see all of it (Liu et al., 2023).

    A sequence is cut into 2n pieces for n ranks, and rank r holds pieces r and 2n - 1 - r: a late token attends to more
    than an early one, so a piece from the head and one from the tail cost every rank the same.

    Args:
        mesh: the ranks that share a sequence; one dimension.
        module: the user's.

    Raises:
        ValueError: the module's forward takes neither ``positions`` nor ``position_ids``.
    """

    def __init__(self, mesh: DeviceMesh, module: nn.Module) -> None:
        self.mesh = mesh
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        self.option = f"context_parallel={self.size}"
        self.is_entered = self.attention_was_seen = False
        parameters = inspect.signature(module.forward).parameters
        names = [name for name in POSITIONS if name in parameters]
        if not names and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise ValueError(
                f"{self.option}: a rank holds two pieces of each sequence, and {type(module).__name__}.forward can't "
                "tell which. Give it a parameter named positions (or position_ids) and use it wherever a token's place "
                "counts: indices into the whole sequence, of shape (batch, length). A mapping batch without them is "
                "given them."
            )
        self.positions = names[0] if names else POSITIONS[0]
        by_place = [name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
        self.positions_index = by_place.index(names[0]) if names and names[0] in by_place else None  # of a tuple
        self.attention = torch.compiler.disable(self.attend)  # once: a compiled block recompiles for another function
        if mesh.device_type == "cpu":
            register_cpu_kernel()

    # Batches.

    def split(self, batch: Any) -> Any:
        """This rank's two pieces of every tensor of the batch whose dimension 1 is the sequence.

        The sequence is as long as the labels are (the batch's "labels", a tuple's last entry): one for each token, at
        the index of the token, so next-token labels are shifted beforehand, in the dataset.

        Args:
            batch: a mapping, to which positions are added where it has none, or a tuple, a dataclass or an attrs class,
                which bring them. Entries may be such containers in turn, of tensors that are cut as well.

        Raises:
            TypeError: it is none of them.
            ValueError: it has no sequence that can be cut evenly, or no positions.
        """
        if isinstance(batch, dict | UserDict):
            return refilled(batch, self.split_entries(dict(batch), "labels", self.positions))
        if isinstance(batch, Mapping):
            return self.split_entries(dict(batch), "labels", self.positions)
        if is_by_position(batch):
            named = LABELS in getattr(batch, "_fields", ())
            labels = batch._fields.index(LABELS) if named else len(batch) - 1
            parts = self.split_entries(dict(enumerate(batch)), labels, self.positions_index).values()
            return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
        if names := field_names(batch):
            entries = {name: getattr(batch, name) for name in names}
            brought = next((name for name in POSITIONS if name in entries), None)
            return with_fields(batch, self.split_entries(entries, LABELS, brought))
        raise TypeError(
            f"{self.option} cuts the tensors of a mapping, tuple or dataclass along dimension 1, and the batch is a "
            f"{type(batch).__name__}. Have the dataset's samples be mappings."
        )

    def split_entries(self, entries: dict[Any, Any], labels: Any, positions: Any) -> dict[Any, Any]:
        """The entries of a batch, those with the sequence cut.

        Args:
            entries: by name or by index.
            labels, positions: where these are, if they are there.
        """
        if isinstance(entries.get(labels), Tensor) and entries[labels].ndim < 2:
            raise ValueError(
                f"{self.option} computes the loss of a token where the token is, and so needs labels of shape "
                f"(batch, length). The batch's {labels!r} has the shape {tuple(entries[labels].shape)}."
            )
        long = {key: value for key, value in entries.items() if isinstance(value, Tensor) and value.ndim > 1}
        if not long:
            raise ValueError(f"{self.option} cuts tensors along dimension 1, and the batch holds none that has one.")
        name = labels if labels in long else next(iter(long))
        samples, length = long[name].shape[:2]
        pieces = 2 * self.size
        if length % pieces or not length:
            raise ValueError(
                f"{self.option} cuts a sequence into {pieces} equal pieces, and the batch's {name!r} has a length of "
                f"{length}. Pad sequences to a multiple of {pieces}."
            )
        if isinstance(positions, str) and positions not in entries:
            indices = torch.arange(length, device=long[name].device)
            entries[positions] = long[positions] = indices.expand(samples, length)

        def is_cut(tensor: Any) -> bool:
            return isinstance(tensor, Tensor) and tensor.ndim > 1 and tensor.shape[1] == length

        cut = {key for key, value in entries.items() if any(map(is_cut, tensors_of(value)))}
        if positions not in cut:
            raise ValueError(
                f"{self.option}: forward takes {self.positions} of shape (batch, {length}), and the batch doesn't hold "
                f"them as {'its entry ' * isinstance(positions, int)}{positions!r}. A mapping batch without "
                f"{self.positions!r} is given them."
            )
        if name == labels and cut <= {labels, positions}:
            raise ValueError(
                f"{self.option}: nothing else in the batch has a length of {length}, as its {name!r} does. Inputs and "
                "labels must be of one length; shift next-token labels in the dataset."
            )
        part = self.part
        return {key: map_batch(lambda t: part(t) if is_cut(t) else t, value) for key, value in entries.items()}

    def part(self, tensor: Tensor) -> Tensor:
        """This rank's pieces of a tensor, next to each other; in page-locked memory where the tensor is."""
        pieces = tensor.chunk(2 * self.size, dim=1)
        part = torch.cat((pieces[self.rank], pieces[-1 - self.rank]), dim=1)
        return part.pin_memory() if tensor.is_pinned() else part

    def join(self, outputs: Sequence[Any]) -> Any:
        """What forward returned for the parts of one batch, in the order of ranks, as for the whole batch: tensors are
        joined along dimension 1.
        """
        first = outputs[0]
        if isinstance(first, Tensor) and first.ndim > 1:
            heads, tails = zip(*(output.tensor_split(2, dim=1) for output in outputs), strict=True)
            return torch.cat([*heads, *reversed(tails)], dim=1)
        if isinstance(first, dict):
            return {key: self.join([output[key] for output in outputs]) for key in first}
        return tuple(map(self.join, zip(*outputs, strict=True))) if isinstance(first, tuple) else first

    # Attention.

    @contextmanager
    def whole_attention(self) -> Iterator[None]:
        """In here ``F.scaled_dot_product_attention``, and its backward, reach over the sequence of all ranks.

        Raises:
            ValueError: the first forward never called it.
        """
        if self.is_entered:
            yield
            return
        attention, fast_path = F.scaled_dot_product_attention, mha.get_fastpath_enabled()
        self.is_entered = True
        ring._enable_context_parallel_dispatcher()
        F.scaled_dot_product_attention = self.attention
        mha.set_fastpath_enabled(False)  # nn.MultiheadAttention evaluates in a kernel of its own
        try:
            yield
        finally:
            mha.set_fastpath_enabled(fast_path)
            F.scaled_dot_product_attention = attention
            ring._disable_context_parallel_dispatcher()
            self.is_entered = False
        if not self.attention_was_seen:
            raise ValueError(
                f"{self.option} reaches over the whole sequence in torch.nn.functional.scaled_dot_product_attention, "
                "which forward never called: each rank would have seen its own part alone. Call it by that name, as "
                "F.scaled_dot_product_attention(..., is_causal=True)."
            )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``F.scaled_dot_product_attention`` of this rank's queries to the keys of all ranks."""
        self.check_attention(query, key, attn_mask, dropout_p, is_causal)
        self.attention_was_seen = True
        query, key, value = (
            DTensor.from_local(part, self.mesh, [SEQUENCE], run_check=False) for part in (query, key, value)
        )
        with sdpa_kernel(KERNELS):
            output = attention_of_one(query, key, value, is_causal=True, scale=scale, enable_gqa=enable_gqa)
        assert isinstance(output, DTensor)
        return output.to_local()

    def check_attention(
        self, query: Tensor, key: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
    ) -> None:
        """Refuse what the ring can't compute.

        Raises:
            ValueError: names it.
        """
        if attn_mask is not None or not is_causal:
            asked = "an attn_mask" if attn_mask is not None else "is_causal=False"
            raise ValueError(
                f"{self.option} computes causal attention over whole sequences: scaled_dot_product_attention(..., "
                f"is_causal=True) without a mask. Received: {asked}. Pad at the end, with labels of -100."
            )
        if dropout_p:
            raise ValueError(
                f"{self.option} can't drop out attention weights: the ranks' kernels draw masks that the backward "
                f"pass doesn't find again. Use dropout_p=0.0. Received: {dropout_p}"
            )
        if query.ndim != 4 or query.shape[2] != key.shape[2]:
            raise ValueError(
                f"{self.option} takes queries, keys and values of shape (batch, heads, length, features) and of one "
                f"length. Received: {tuple(query.shape)} and {tuple(key.shape)}"
            )


def register_cpu_kernel() -> None:
    """Teach torch's ring attention the flash kernel of the CPU; it knows those of GPUs."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

    def attend(
        group: Any, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, **options: Any
    ) -> tuple[Tensor, ...]:
        return ring._templated_ring_attention(
            group, SEQUENCE.dim, forward, query, key, value, is_causal, dropout_p=dropout_p, **options
        )

    def attend_backward(group: Any, gradient: Tensor, *saved: Any, **options: Any) -> tuple[Tensor, ...]:
        *tensors, dropout_p, is_causal = saved
        given: tuple[Any, ...] = (gradient, "grad_out", *tensors, is_causal)
        return ring._templated_ring_attention_backward(
            group, SEQUENCE.dim, backward, *given, dropout_p=dropout_p, **options
        )

    ring.custom_ops[forward] = on_local_parts(attend)
    ring.custom_ops[backward] = on_local_parts(attend_backward)


def on_local_parts(attend: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """A handler for torch's dispatcher of distributed tensors: what ``attend`` computes of this rank's parts."""

    def handle(operator: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[DTensor, ...]:
        mesh = arguments[0].device_mesh
        local = [value.to_local() if isinstance(value, DTensor) else value for value in arguments]
        parts = attend(mesh.get_group(), *local, **options)
        return tuple(DTensor.from_local(part, mesh, [SEQUENCE], run_check=False) for part in parts)

    return handle
