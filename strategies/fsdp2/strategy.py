"""Fully sharded data parallel by torch's ``fully_shard``, alone or with tensor parallelism on one mesh."""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import _composable_state
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.utils._pytree import tree_map

from ...precision.base import ShapesOnRank
from ...precision.products import casts, float32_slots
from ...precision.quantized import check_storage
from ..alike import broadcast_module, move_module
from ..base import ConfigureOptimizer, Prepare, RunDescription, nothing_to_prepare
from ..environment import find_place
from ..frozen_units import has_own_format, makes_no_graph, units_to_gather
from ..gradient_norm import clip_by_norm
from ..host_memory import memory_of_host, warn_if_too_large
from ..materialize import materialize
from ..mesh import (
    CONTEXT,
    REPLICATE,
    SHARD,
    TENSOR,
    split_world,
    submesh,
    whole_of,
)
from ..plans.cut_features import CutFeatures
from ..plans.plan import apply_plan, groups_split_by_mesh, local_shapes, plan_of
from ..process_group import ProcessGroupOptions, ProcessGroupStrategy
from ..sparse_gradients import check_dense
from ..used_outside import UsedOutside
from ..whole_parameters import whole_parameters
from .gathering import gather_by_parameter, parameter_groups
from .gradients_in_forward import GradientsInForward
from .root_units import RootUnits, root_units
from .used_parameters import UsedParameters

if TYPE_CHECKING:
    from .context_parallel import ContextParallel


@dataclass(frozen=True)
class FSDP2Options(ProcessGroupOptions):
    """Options of FSDP2.

    Args:
        reshard_after_forward: drop a block's gathered parameters after its forward and gather them again for backward
            (ZeRO-3); False keeps them between the two (ZeRO-2), for more memory and less traffic.
        replicas: hybrid sharding: this many copies of the model, each sharded over world / replicas ranks.
        tensor_parallel: ranks that hold each layer together, by the module's ``tensor_parallel_plan()``.
        loss_parallel: with tensor_parallel, keep the logits sharded by class up to the loss.
        cpu_offload: keep parameters, gradients and optimizer state in host memory.
        find_unused_parameters: some ranks' backward doesn't reach some parameters in some updates: they take part with
            a gradient of 0 there; where no rank reaches one, momentum and weight decay move it (torch 2.13). Without it
            such an update is refused. Every rank must call the same blocks of ``shard_units()`` all the same. A large
            embedding or head is then gathered with the whole module, and not for its own forward alone.
        context_parallel: ranks that share each sample and hold a part of its sequence, for sequences too long for one.
            They shard the model too. Attention must be ``F.scaled_dot_product_attention(..., is_causal=True)``, without
            mask or dropout; whatever else mixes positions sees a rank's part alone. A part is two pieces of the
            sequence that are no neighbours, so forward takes ``positions`` (or ``position_ids``): indices into the
            whole sequence, (batch, length), which a mapping batch without them is given. Labels are one for each token
            and shifted in the dataset; lengths are multiples of 2 * context_parallel.
    """

    reshard_after_forward: bool = True
    replicas: int = 1
    tensor_parallel: int = 1
    loss_parallel: bool = False
    cpu_offload: bool = False
    find_unused_parameters: bool = False
    context_parallel: int = 1

    def __post_init__(self) -> None:
        if self.loss_parallel and self.tensor_parallel == 1:
            raise ValueError("FSDP2(loss_parallel=True) has no effect without tensor_parallel=2 or more.")


class FSDP2(ProcessGroupStrategy):
    """``strategy="fsdp2"`` (or "fsdp"): every rank keeps a shard of parameters, gradients and optimizer state.

    Placed in this order: build on the meta device, cast, tensor parallelism, shard blocks and root, fill the shards,
    optimizer. (Zhao et al., 2023; Rajbhandari et al., 2020.) Gathered one at a time are the blocks of
    ``shard_units()``, and a large embedding and head beside them (see root_units.py). Parameters without dimensions and
    complex ones are whole on every rank. See FSDP2Options.

    Example:
        ``Fit(module, data, strategy=FSDP2(tensor_parallel=2), devices=4)``
    """

    name = "fsdp2"
    played_by = "fsdp2.played:PlayedFSDP2"
    parameter_form = "dtensor"
    gradients_are_alike = False
    replicas_differ = (
        ProcessGroupStrategy.replicas_differ
        + " With tensor parallelism: a parameter near a layer with a style of your own, so that nobody knows on which "
        'features it is used; tensor_parallel_plan can say it ("used_on_cut", "used_on_whole").'
    )
    Options = FSDP2Options
    options: FSDP2Options
    context: "ContextParallel | None" = None
    cut_features: CutFeatures | None = None
    compiles_blocks = False
    is_loss_parallel = False
    gathered: Mapping[int, Any] = {}  # by the ids of shards

    @property
    def splits_classes(self) -> bool:
        """Whether loss parallelism keeps the logits cut by class."""
        return self.options.loss_parallel

    @property
    def forward_waits(self) -> bool:
        """Whether ranks wait for one another in a forward: they gather its parameters, or sum its activations."""
        return True

    @property
    def placement(self) -> str:
        """The strategy's column in the table of precisions: FSDP2 with cut layers has one of its own."""
        return f"{self.name} x tp" if self.options.tensor_parallel > 1 else self.name

    def mesh_shape(self, world_size: int) -> dict[str, int]:
        """Put replicas outermost and tensor-parallel ranks innermost, and shards into what is left."""
        options = self.options
        degrees = {
            "replicas": options.replicas,
            "context_parallel": options.context_parallel,
            "tensor_parallel": options.tensor_parallel,
        }
        shards = split_world(world_size, type(self).__name__, **degrees)
        return {
            REPLICATE: options.replicas,
            SHARD: shards,
            CONTEXT: options.context_parallel,
            TENSOR: options.tensor_parallel,
        }

    def shapes_on_rank(self, module: nn.Module) -> ShapesOnRank:
        """What tensor parallelism leaves of each layer that the plan cuts. Shards are whole again when they compute."""
        return local_shapes(module, self.tensor_parallel_size) if self.tensor_parallel_size > 1 else {}

    def check_module(self, module: nn.Module) -> None:
        """Refuse a module without a plan to cut it by."""
        if self.tensor_parallel_size > 1:
            plan_of(module, self.tensor_parallel_size)

    def expect(self, run: RunDescription) -> None:
        """Note whether blocks are compiled."""
        super().expect(run)
        self.compiles_blocks = run.compiles_blocks

    def place(
        self, module: nn.Module, configure_optimizer: ConfigureOptimizer | None, prepare: Prepare = nothing_to_prepare
    ) -> None:
        """Shard the module in place; the optimizer is made over the shards."""
        options = self.options
        if options.context_parallel > 1:
            from .context_parallel import ContextParallel

            self.context = ContextParallel(submesh(self.mesh, CONTEXT), module)
        meta_layers = self.build(module)
        check_dense(module, self.name)
        self.begin_alike(module)
        if options.tensor_parallel > 1:
            tensor_mesh = submesh(self.mesh, TENSOR)
            self.cut_features = apply_plan(module, tensor_mesh, self.gather, loss_parallel=options.loss_parallel)
        prepare(module)
        # Once is enough: torch says it in every forward whose output is a view, such as that of any 3-D Linear.
        warnings.filterwarnings("once", message="FSDP2-wrapped module .* returned a view tensor")
        units = list(module.shard_units())  # type: ignore[operator]
        said = None if options.tensor_parallel > 1 else "mixed torch.Tensor and DTensor"
        self.used_outside = UsedOutside(self.name, module, units, is_sharded, said)
        self.shard(module)
        materialize(module, meta_layers, torch.device("cpu") if options.cpu_offload else self.device)
        self.whole_parameters = whole_parameters(module)
        for parameter in self.whole_parameters:  # whole parameters aren't offloaded
            parameter.data = parameter.data.to(self.device)
        kept = set(map(id, self.whole_parameters))
        self.used_outside.watch({name: p for name, p in module.named_parameters() if id(p) not in kept})
        if options.loss_parallel:  # in evaluation metrics and predictions want all classes
            module.register_forward_hook(lambda layer, _, out: out if layer.training else tree_map(whole_of, out))
        self.module = self.model = module
        self.optimizer = configure_optimizer(module) if configure_optimizer else None

    def begin_alike(self, module: nn.Module) -> None:
        """Broadcast rank 0's values. Ordinary parameters stay where they are: each moves when it is sharded."""
        if self.rank == 0:
            warn_if_too_large(module, self.name, find_place().local_world_size, memory_of_host())
        move_module(module, self.device, plain_stay=True)
        broadcast_module(module, self.device)

    def shard(self, module: nn.Module) -> None:
        """Shard the module's blocks, and then the rest of it, over the mesh's data dimensions, by ``fully_shard``."""
        options = self.options
        compute, reduce = self.precision.compute_dtype, self.precision.reduce_dtype
        mixed = casts(compute, self.precision.parameter_dtype)
        check_storage(module, self.name, flat=None, cast_to=compute if mixed else None)
        # One dimension shards; two replicate over the first and shard over the second.
        mesh = submesh(self.mesh, *((REPLICATE, SHARD) if options.replicas > 1 else (SHARD,)))
        if options.context_parallel > 1:  # context-parallel ranks shard the model, too
            mesh = submesh(self.mesh, SHARD, CONTEXT)._flatten("shards")
            if options.replicas > 1:
                mesh = DeviceMesh._concatenate([submesh(self.mesh, REPLICATE), mesh])
        common: dict[str, Any] = {
            "mesh": mesh,
            "reshard_after_forward": options.reshard_after_forward,
            "ignored_params": set(whole_parameters(module)),
            "offload_policy": CPUOffloadPolicy(pin_memory=self.device.type != "cpu")
            if options.cpu_offload
            else OffloadPolicy(),
        }
        # What products read is gathered in 16 bits. Inputs and outputs pass as they are: autocast casts where single-
        # device runs do, and nowhere else.
        policy = MixedPrecisionPolicy(compute, reduce, cast_forward_inputs=False) if mixed else MixedPrecisionPolicy()
        kept = float32_slots(module) if mixed else set()
        blocks = units_to_gather(module, list(module.shard_units()))  # type: ignore[operator]
        frozen = [unit for unit, mark in blocks.items() if mark is not None]
        # Ranks that use different layers of the root are why the option is there: each gathers the same messages.
        around = {} if options.find_unused_parameters else root_units(module, blocks, common["ignored_params"], frozen)
        for unit in (*blocks, *around):
            mark = blocks.get(unit)
            # What follows the blocks has its backward at once, as the root has; what makes no graph has none.
            drops = makes_no_graph(mark) or (options.reshard_after_forward and not around.get(unit, False))
            by_itself = MixedPrecisionPolicy() if has_own_format(mark) else policy
            fully_shard(unit, mp_policy=by_itself, **{**common, "reshard_after_forward": drops})
            if by_itself is policy:
                gather_by_parameter(unit, kept)
        # The root's backward follows its forward at once: dropping its parameters would only gather them twice.
        fully_shard(module, mp_policy=policy, **{**common, "reshard_after_forward": False})
        gather_by_parameter(module, kept)
        self.sum_alike(module)
        self.root_units = RootUnits(module, list(around))
        self.gradients_in_forward = GradientsInForward(module, options.tensor_parallel > 1, options.loss_parallel)

    def sum_alike(self, module: nn.Module) -> None:
        """Have every rank sum gradients of the same parameters, or stop where they don't."""
        if self.options.find_unused_parameters:
            if not hasattr(module, "set_reduce_scatter_unused_params"):
                raise ValueError(
                    f"FSDP2(find_unused_parameters=True) needs torch 2.13, and this is torch {torch.__version__}. Use "
                    "strategy='fsdp1', or DDP(find_unused_parameters=True)."
                )
            sharded: Any = module
            sharded.set_reduce_scatter_unused_params(True)
            return
        names = {(id(m), key): f"{p}.{key}".lstrip(".") for p, m in module.named_modules() for key in m._parameters}
        for unit in (m for m in module.modules() if isinstance(m, FSDPModule)):
            UsedParameters(unit, names, self.all_say)

    def release(self, module: nn.Module) -> None:
        """Let go; and have torch forget that these layers are sharded, or it refuses to shard them again."""
        super().release(module)
        self.context = self.cut_features = None
        for layer in module.modules():
            _composable_state._module_state_mapping.pop(layer, None)

    def place_turns(self, moved: Mapping[str, Sequence[str]]) -> None:
        """Take note of the turns, and of where parameters are whole while they are gathered."""
        super().place_turns(moved)
        units = [unit for unit in self.module.modules() if isinstance(unit, FSDPModule)]
        # The first forward, in a turn, would settle the dtypes of sums by the parameters that require gradients then.
        fully_shard.state(self.module)._lazy_init()  # type: ignore[attr-defined]
        self.gathered = {
            id(parameter.sharded_param): parameter
            for unit in units
            for group in parameter_groups(unit)
            for parameter in group.fsdp_params
        }

    def set_moving(self, parameters: Sequence[nn.Parameter], moving: bool) -> None:
        """Have shards and gathered parameters require gradients, or stand still: torch sees to the latter only where it
        gathers them anew, and sums zeros for one that it doesn't.
        """
        super().set_moving(parameters, moving)
        for parameter in parameters:
            whole = getattr(self.gathered.get(id(parameter)), "_unsharded_param", None)
            if whole is not None:
                whole.requires_grad_(moving)

    def forget_module(self) -> None:
        """Let go of the parameters, too."""
        super().forget_module()
        self.gathered = {}

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are reduced, and parameters resharded, in the last micro-batch's backward."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        self.model.set_is_last_backward(last)
        if self.cut_features:
            return self.cut_features.watch(self.compiles_blocks, self.turn_now)
        return nullcontext()

    def named_parameters(self, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
        """The shards, under the user's names."""
        self.reshard()
        return super().named_parameters(remove_duplicate)

    def model_state(self) -> dict[str, Tensor]:
        """Shards and buffers by name."""
        self.reshard()
        return super().model_state()

    def reshard(self) -> None:
        """Drop the root's gathered parameters, which an evaluation's last forward leaves."""
        if isinstance(self.module, FSDPModule):
            self.module.reshard()
            self.root_units.reshard()
            self.gradients_in_forward.reshard()

    def split_batch(self, batch: Any) -> Any:
        """Cut this rank's part out of the sequence."""
        return self.context.split(batch) if self.context else batch

    def join_outputs(self, outputs: Sequence[Any]) -> Any:
        """Join the ranks' outputs to those for the whole sequence."""
        return self.context.join(outputs) if self.context else super().join_outputs(outputs)

    @contextmanager
    def own_operators(self) -> Iterator[None]:
        """Put loss parallelism's cross-entropy and context parallelism's attention in the place of torch's, in here."""
        enters = self.options.loss_parallel and not self.is_loss_parallel  # torch's context can't be entered twice
        self.is_loss_parallel = self.is_loss_parallel or enters
        try:
            with (
                loss_parallel() if enters else nullcontext(),
                self.context.whole_attention() if self.context else nullcontext(),
            ):
                yield
        finally:
            self.is_loss_parallel = self.is_loss_parallel and not enters

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Enter the precision's context and ``own_operators``; an error in a layer used outside of a block names it."""
        with (
            self.used_outside,
            self.root_units,
            self.gradients_in_forward,
            super().forward_context(),
            self.own_operators(),
        ):
            yield

    def local_loss(self, loss: Tensor) -> Tensor:
        """Make a plain tensor of the loss, which loss parallelism leaves spread over the mesh."""
        return whole_of(loss)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients within ``own_operators``, whose backward isn't torch's either."""
        if self.cut_features:
            self.cut_features.see_loss(loss)
        self.gradients_in_forward.see_loss(loss)
        with self.used_outside, self.own_operators():
            super().backward(loss)

    def prepare_gradients(self) -> None:
        """Sum gradients of which each tensor-parallel rank has a part; then bring all to their true size."""
        if self.cut_features:
            self.cut_features.sum_gradients(self.named_parameters, self.turn_now)
        super().prepare_gradients()

    @property
    def held_on_host(self) -> Collection[str]:
        """What ``cpu_offload`` keeps there."""
        return ("parameters", "gradients", "optimizer_state") if self.options.cpu_offload else ()

    def clip_grad_norm(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """Clip by the norm over all shards; torch's own function fails where parameters lie on different meshes."""
        norm, normed, each = clip_by_norm(parameters, max_norm)
        self.note_norms(normed, each)
        return norm

    def step(self, refused: Tensor | None = None) -> None:
        """Step the optimizer, mesh by mesh where there are several."""
        several = self.options.tensor_parallel > 1 or self.whole_parameters
        with groups_split_by_mesh(self.optimizer_in_turn) if several else nullcontext():
            super().step(refused)


def is_sharded(parameter: Tensor, shape: torch.Size) -> bool:
    """Whether a parameter lies on the mesh's data dimensions; gathered, it is plain, or cut by tensor parallelism."""
    return isinstance(parameter, DTensor) and parameter.device_mesh.mesh_dim_names != (TENSOR,)
