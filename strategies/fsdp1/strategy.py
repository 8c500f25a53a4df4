"""Fully sharded data parallel by torch's first implementation, the ``FullyShardedDataParallel`` wrapper."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.optim import Optimizer

from ...precision.frozen import parts_by_layer
from ...precision.products import casts, float32_slots
from ...precision.quantized import check_storage
from ..base import ConfigureOptimizer, Prepare, nothing_to_prepare
from ..duplicates import Part
from ..environment import find_place
from ..frozen_units import makes_no_graph, units_to_gather
from ..gradient_norm import clip_by_norm
from ..host_memory import memory_of_host, warn_if_too_large
from ..materialize import has_meta, materialize
from ..mesh import CONTEXT, REPLICATE, SHARD, TENSOR, split_world
from ..process_group import ProcessGroupOptions, ProcessGroupStrategy
from ..sparse_gradients import check_dense
from ..used_outside import UsedOutside
from ..whole_parameters import is_indivisible_or_integer, whole_parameters
from .wrapping import wrapped_layers

WRAPPER = "_fsdp_wrapped_module."


@dataclass(frozen=True)
class FSDP1Options(ProcessGroupOptions):
    """Options of FSDP1.

    Args:
        reshard_after_forward: drop a block's gathered parameters after its forward (ZeRO-3), or keep them (ZeRO-2).
        replicas: hybrid sharding: this many copies of the model.
    """

    reshard_after_forward: bool = True
    replicas: int = 1


class FSDP1(ProcessGroupStrategy):
    """``strategy="fsdp1"``: flat shards (Zhao et al., 2023). New work is better served by "fsdp2". See FSDP1Options.

    A parameter that a backward doesn't reach has a gradient of 0 in here, elsewhere none: weight decay moves it.
    Parameters without dimensions, complex ones and integers are whole on every rank.

    Example:
        ``Fit(module, data, strategy=FSDP1(reshard_after_forward=False), devices=2)``
    """

    name = "fsdp1"
    played_by = "fsdp1.played:PlayedFSDP1"
    refused_turns = (
        "a flat shard holds parameters of several turns, and gradients for all of them. Use strategy='fsdp2', whose "
        "parameters are sharded one by one"
    )
    parameter_form = "flat"
    gradients_are_alike = False
    Options = FSDP1Options
    options: FSDP1Options
    loss_follows = False
    gathered: list[Any]

    def mesh_shape(self, world_size: int) -> dict[str, int]:
        """Put replicas outermost, and shards into what is left."""
        replicas = self.options.replicas
        return {REPLICATE: replicas, SHARD: split_world(world_size, "FSDP1", replicas=replicas), CONTEXT: 1, TENSOR: 1}

    @property
    def forward_waits(self) -> bool:
        """Whether ranks wait for one another in a forward: they gather its parameters."""
        return True

    def place(
        self, module: nn.Module, configure_optimizer: ConfigureOptimizer | None, prepare: Prepare = nothing_to_prepare
    ) -> None:
        """Wrap blocks and root; the optimizer is made over the views into flat shards."""
        options = self.options
        late = self.build(module)
        if self.rank == 0:
            warn_if_too_large(module, self.name, find_place().local_world_size, memory_of_host())
        self.begin_alike(module)
        prepare(module)
        check_dense(module, self.name)
        units = list(module.shard_units())  # type: ignore[operator]
        hybrid = options.replicas > 1
        kept_to_backward = ShardingStrategy._HYBRID_SHARD_ZERO2 if hybrid else ShardingStrategy.SHARD_GRAD_OP
        dropped = ShardingStrategy.HYBRID_SHARD if hybrid else ShardingStrategy.FULL_SHARD
        of_units = dropped if options.reshard_after_forward else kept_to_backward
        compute, reduce = self.precision.compute_dtype, self.precision.reduce_dtype
        mixed = casts(compute, self.precision.parameter_dtype)
        # Products' matrices are gathered in 16 bits, by the layers that hold them. Inputs and outputs pass as they are:
        # autocast casts where single-device runs do, and nowhere else.
        narrow = MixedPrecision(compute, reduce, cast_root_forward_inputs=False, _module_classes_to_ignore=())
        gathered = units_to_gather(module, units)
        kinds = dict.fromkeys((*gathered, module), False)
        layers = wrapped_layers(module, gathered, float32_slots(module)) if mixed else kinds
        policy_of = {layer: narrow if is_narrow else None for layer, is_narrow in layers.items()}
        frozen = parts_by_layer(module)

        def wrapping(layer: nn.Module) -> dict[str, Any]:
            if layer is module or layer not in policy_of:
                return {}
            cut = dropped if makes_no_graph(frozen.get(layer)) else of_units
            return {"mixed_precision": policy_of[layer], "sharding_strategy": cut}

        check_storage(module, self.name, flat=self.precision.parameter_dtype, cast_to=compute if mixed else None)
        # A layer that keeps some of its parameters whole is filled now, since they are no affair of param_init_fn.
        kept = set(map(id, whole_parameters(module, is_indivisible_or_integer)))
        early = [layer for layer in late if any(id(p) in kept for p in layer.parameters(recurse=False))]
        materialize(module, early, self.device)
        self.whole_parameters = whole_parameters(module, is_indivisible_or_integer)
        self.used_outside = UsedOutside(self.name, module, units, lambda tensor, shape: tensor.shape != shape)
        self.model = FullyShardedDataParallel(
            module,
            ignored_states=list(self.whole_parameters),
            device_mesh=self.mesh[REPLICATE, SHARD] if hybrid else self.mesh[SHARD],
            sharding_strategy=kept_to_backward,  # the loss may use the root's parameters
            auto_wrap_policy=CustomPolicy(wrapping),
            mixed_precision=policy_of[module],
            device_id=self.device,
            use_orig_params=True,
            # Called for each block before it is cut, so that no more than one block is whole at a time.
            param_init_fn=lambda unit: materialize(
                module, [layer for layer in unit.modules() if layer in late and has_meta(layer)], self.device
            ),
        )
        self.model.register_forward_hook(self.gather_for_loss)
        self.module = module
        kept = set(map(id, self.whole_parameters))
        self.used_outside.watch({name: p for name, p in self.named_parameters().items() if id(p) not in kept})
        self.optimizer = configure_optimizer(module) if configure_optimizer else None

    def release(self, module: nn.Module) -> None:
        """Let go; and take away the hooks of a forward that no backward followed, which keep flat shards and groups
        alive through autograd, where Python's garbage collector doesn't look.
        """
        for unit in FullyShardedDataParallel.fsdp_modules(self._model) if self._model is not None else ():
            if unit._handle and hasattr(unit._handle.flat_param, "_post_backward_hook_state"):
                unit._handle.flat_param._post_backward_hook_state[-1].remove()
        super().release(module)

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Make a context in which gradients aren't reduced before the last micro-batch."""
        assert isinstance(self.model, FullyShardedDataParallel)
        return nullcontext() if last else self.model.no_sync()

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Keep the root's parameters gathered for the loss, which may use them, too."""
        self.loss_follows, self.gathered = True, []
        try:
            with self.used_outside, super().forward_context():
                yield
        finally:
            self.loss_follows = False
            for handle in self.gathered:
                handle.reshard(False)

    def gather_for_loss(self, model: Any, inputs: Any, outputs: Any) -> None:
        """Gather the root's parameters once more after its forward: torch keeps them only where a backward follows."""
        if self.loss_follows and model._handle and not torch.is_grad_enabled():
            model._handle.unshard()
            self.gathered.append(model._handle)

    def clip_grad_norm(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """Clip by the norm over all shards, in the gradients' own dtype."""
        shards = (self.mesh[SHARD].get_group(),)
        norm, normed, each = clip_by_norm(parameters, max_norm, shards, self.whole_parameters)
        self.note_norms(normed, each)
        return norm

    def named_parameters(self, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
        """This rank's views into the flat shards, under the user's names."""
        return {name.replace(WRAPPER, ""): p for name, p in super().named_parameters(remove_duplicate).items()}

    def part_held(self, parameter: Tensor) -> Part | None:
        """The place of this rank's shard, which replicas hold, too; None where no other rank has it."""
        return (self.mesh.get_local_rank(SHARD),) if self.options.replicas > 1 else None

    @contextmanager
    def unwrapped(self) -> Iterator[None]:
        """Put every wrapped block in its wrapper's place, in here."""
        wrappers = [
            (parent, name, child)
            for parent in self.module.modules()
            for name, child in parent._modules.items()
            if isinstance(child, FullyShardedDataParallel)
        ]
        for parent, name, wrapper in wrappers:
            parent._modules[name] = wrapper.module
        try:
            yield
        finally:
            for parent, name, wrapper in wrappers:
                parent._modules[name] = wrapper

    def full_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield whole gradients; all of them are gathered at once, until the last one was taken."""
        with FullyShardedDataParallel.summon_full_params(self.model, writeback=False, with_grads=True):
            yield from super().full_gradients()

    @property
    def holder_of_state(self) -> nn.Module:
        """The root wrapper, which knows the shards."""
        return self.model

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state that a checkpoint was read into back into the flat shards."""
        whole: dict[str, Any] = {**self.model_state(), **state}
        # Every name is copied in turn, so the further ones of a tied parameter need its new values, too.
        whole |= {alias: whole[name] for alias, name in self.tied_names().items()}
        # The scales of quantized weights are in a state_dict, but no load_state_dict takes them; names were checked.
        set_model_state_dict(self.model, whole, options=StateDictOptions(strict=False))
        self.weights_have_changed()

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """The optimizer's state, cut by parameter instead of by flat shard."""
        assert self.optimizer is not None
        if not any(self.sum_on_host([len(self.optimizer.state)])):  # a rank may hold no trained share
            return {}
        return get_optimizer_state_dict(self.model, self.optimizer)["state"]  # type: ignore[return-value]

    def reshard(self) -> None:
        """Drop gathered parameters, which the next forward would find and use, and have names refer to the shards."""
        for unit in FullyShardedDataParallel.fsdp_modules(self.model):
            if unit._handle and unit._handle.uses_sharded_strategy:
                unit._handle.reshard(True)

    # Weights are cut as an optimizer's state is, which torch can do: an optimizer that steps nothing has them as such.

    def weights_by_name(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut by parameter instead of by flat shard. Collective."""
        with self.optimizing(self.holder_of(held)):
            return {name: entries["weight"] for name, entries in self.optimizer_state().items()}

    def held_from(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut into flat shards again. Collective."""
        parameters = self.named_parameters()
        empty = {name: torch.empty_like(parameters[name], dtype=weight.dtype) for name, weight in weights.items()}
        holder = self.holder_of(empty)
        with self.optimizing(holder):
            self.load_optimizer_state({name: {"weight": weight} for name, weight in weights.items()})
        held = {name: holder.state.get(parameters[name], {}) for name in weights}
        # A rank may hold no share of some.
        return {name: entries.get("weight", empty[name]) for name, entries in held.items()}

    def holder_of(self, held: Mapping[str, Tensor]) -> Optimizer:
        """Make an optimizer that steps nothing and has these pieces as its state."""
        parameters = self.named_parameters()
        holder = torch.optim.SGD([parameters[name] for name in held], lr=0.0)
        for name, piece in held.items():
            holder.state[parameters[name]] = {"weight": piece}
        return holder

    @contextmanager
    def optimizing(self, optimizer: Optimizer) -> Iterator[None]:
        """In here another optimizer is the one whose state is cut."""
        own, self.optimizer = self.optimizer, optimizer
        try:
            yield
        finally:
            self.optimizer = own

    def stand_in(self, parameter: Tensor) -> Tensor:
        """Make a few zeros, which stand for a piece of a flat shard."""
        return super().stand_in(parameter.new_zeros(8))

    def load_optimizer_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Cut the state into flat shards again."""
        assert self.optimizer is not None
        if not state:
            return
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()  # torch makes the state by a step, which schedule-free ones take in training only
        current = get_optimizer_state_dict(self.model, self.optimizer)
        flat: dict[int, dict[str, Any]] = {}
        hook = self.optimizer.register_load_state_dict_pre_hook(lambda _, given: flat.update(given["state"]))
        set_optimizer_state_dict(
            self.model,
            self.optimizer,
            {"state": {name: dict(held) for name, held in state.items()}, "param_groups": current["param_groups"]},
        )
        hook.remove()
        # Optimizer.load_state_dict has cast the state to the parameters' dtype; it belongs in its own.
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, held in flat.items():
            loaded = self.optimizer.state[parameters[index]]
            for key, value in held.items():
                if isinstance(value, Tensor) and value.dtype != loaded[key].dtype:
                    loaded[key] = value.to(loaded[key].device, copy=True)
