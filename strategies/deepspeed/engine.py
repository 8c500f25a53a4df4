"""DeepSpeed's engines: how one is made around a module, and what must be taken apart so that nothing of it stays."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer

from ..environment import find_place
from .state import ScalarsAsBytes

# Engines of this process that nothing has destroyed, with the attributes that each parameter had before.
ENGINES: WeakKeyDictionary[Any, list[set[str]]] = WeakKeyDictionary()

# What DeepSpeed's back end keeps functions of torch in, and what newer versions of torch call them.
NEW_NAMES = {"all_gather_function": "all_gather_single", "reduce_scatter_function": "reduce_scatter_single"}


@contextmanager
def environment() -> Iterator[None]:
    """Set, in here, the environment variables that DeepSpeed looks for, and that torchrun alone sets."""
    place = find_place()
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))  # stage 3 reads it again and again
    wanted = {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
    }
    if not torch.accelerator.is_available():
        wanted["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed warns that it found no accelerator
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:  # set, they would say that torchrun started this process
            os.environ.pop(name, None)


def initialize(module: nn.Module, optimizer: Optimizer, filled: Mapping[str, Any]) -> Any:
    """Make an engine around the module and its optimizer.

    Args:
        module, optimizer: whole; the engine cuts them.
        filled: the config without an "auto".
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Shared memory for inference, which training doesn't use; it would be compiled at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # The optimizer and the schedule are the run's own, which agree with these sections. Clipping is by the limit of
    # each update, which may change from run to run.
    config = {key: value for key, value in filled.items() if key not in ("optimizer", "scheduler")}
    config["gradient_clipping"] = 0.0
    names = [set(vars(parameter)) for parameter in module.parameters()]
    try:
        with environment(), ScalarsAsBytes(), nothing_sent():
            back_end = deepspeed.accelerator.get_accelerator().communication_backend_name()
            deepspeed.init_distributed(back_end, dist_init_required=False)  # as initialize would
            use_new_names(deepspeed.comm.comm.cdb)
            engine = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)[0]
    except BaseException:
        restore_linear()
        raise
    ENGINES[engine] = names
    return engine


@contextmanager
def nothing_sent() -> Iterator[None]:
    """In here, a new engine doesn't broadcast rank 0's parameters: the ranks are alike."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    broadcast = DeepSpeedEngine._broadcast_model
    DeepSpeedEngine._broadcast_model = lambda engine: None
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model = broadcast


def use_new_names(backend: Any) -> None:
    """Have DeepSpeed's back end call torch's collectives by the names that torch has for them now. By the old ones,
    each call warns of its deprecation: six warnings an update.
    """
    for attribute, name in NEW_NAMES.items():
        if getattr(backend, attribute, None) is not None and hasattr(torch.distributed, name):
            setattr(backend, attribute, getattr(torch.distributed, name))


class EngineLinear:
    """The linear function of an engine of stage 3, which keeps no gathered weight for backward. DeepSpeed puts it in
    the place of torch's for all layers of the process, for good; here it is there while the engine computes, and no
    other run in the process meets it.

    Made right after the engine; entered around its forward and its backward, which may compute layers once more.
    """

    def __init__(self) -> None:
        self.own = nn.functional.linear
        restore_linear()
        self.of_torch = nn.functional.linear

    def __enter__(self) -> None:
        nn.functional.linear = self.own

    def __exit__(self, *_: object) -> None:
        nn.functional.linear = self.of_torch


def restore_linear() -> None:
    """Put torch's linear function back, where an engine of stage 3 has replaced it."""
    partitioning = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    saved = getattr(getattr(partitioning, "InsertPostInitMethodToModuleSubClasses", None), "linear_bk", None)
    if saved is not None:
        nn.functional.linear = saved


def destroy(engine: Any) -> None:
    """Take an engine's hooks off, and apart what it consists of. Python never finds it by itself: it doesn't look
    through hooks of parameters for cycles, and stage 3 keeps in globals the layers whose forward an exception ended and
    the parameters to release after each layer.
    """
    names = ENGINES.pop(engine, None)
    if names is None:
        return
    zero = engine.optimizer if engine.zero_optimization_stage() else None
    engine.destroy()
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    for parameter, own in zip(engine.module.parameters(), names, strict=True):
        for name in vars(parameter).keys() - own:
            del vars(parameter)[name]
    for part in (getattr(zero, "parameter_offload", None), zero, engine):
        if part is not None:
            vars(part).clear()
    offload = sys.modules["deepspeed.runtime.zero.parameter_offload"]
    offload.FWD_MODULE_STACK.clear()
    name = "_PartitionedParameterCoordinator__params_to_release"
    for cell in vars(offload.PartitionedParameterCoordinator)[name].__closure__:  # DeepSpeed wrapped the cache
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


def destroy_all() -> None:
    """Destroy every engine of this process."""
    for engine in tuple(ENGINES):
        destroy(engine)


def forget_groups() -> None:
    """Take the process groups out of DeepSpeed's globals, where it would find them in another world."""
    groups, comm = sys.modules.get("deepspeed.utils.groups"), sys.modules.get("deepspeed.comm.comm")
    if groups is not None and comm is not None:
        for name in ("_WORLD_GROUP", "_ZERO_PARAM_INTRA_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP", "mesh_device"):
            setattr(groups, name, None)
        comm.cdb = None  # type: ignore[attr-defined]
