"""DeepSpeed's ZeRO: optimizer state, gradients and parameters cut over ranks, by the package's own engine."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...precision.base import Precision
from ..base import ConfigureOptimizer, Prepare, RunDescription, nothing_to_prepare
from ..duplicates import Part
from ..mesh import CONTEXT, REPLICATE, SHARD, TENSOR
from ..process_group import ProcessGroupOptions, ProcessGroupStrategy
from ..sparse_gradients import check_dense
from ..updating import Names
from .checks import (
    NO_NESTED_TENSORS,
    check_package,
    check_parameters,
    check_precision,
    met_nested,
    optimizer_problem,
)
from .config import fill, given_stage, read
from .engine import EngineLinear, destroy, destroy_all, environment, forget_groups, initialize
from .holdings import held_apart
from .order import GradientOrder
from .state import EngineOptimizer, ZeroState


@dataclass(frozen=True)
class DeepSpeedOptions(ProcessGroupOptions):
    """Options of DeepSpeed.

    Args:
        config: the path of a ds_config.json, or its content. Every ``"auto"`` in it is filled from the run's arguments.
        stage: what the ranks share out: 0 nothing, 1 the optimizer's state, 2 also gradients, 3 also parameters. None
            takes the config's, or 2.
        offload_optimizer: keep the optimizer's state, and step, in host memory (stages 1 to 3).
        offload_parameters: keep parameters in host memory between uses (stage 3).
    """

    config: str | Path | Mapping[str, Any] | None = None
    stage: int | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False

    def __post_init__(self) -> None:
        if self.stage not in (None, 0, 1, 2, 3) or isinstance(self.stage, bool):
            raise ValueError(f"DeepSpeed(stage=...) takes 0, 1, 2 or 3. Received: {self.stage!r}")


class DeepSpeed(ProcessGroupStrategy):
    """``strategy="deepspeed"`` (ZeRO stage 2), ``"deepspeed_stage_0"`` to ``"deepspeed_stage_3"``: the engine of
    the DeepSpeed package (Rajbhandari et al., 2020). See DeepSpeedOptions, and docs/deepspeed.md for what a config may
    say.

    As under FSDP1, a parameter that a backward doesn't reach has a gradient of 0: weight decay moves it. At stage 3
    every rank's forward must call the same layers in the same order: others wait for one another until ``timeout``.

    Example:
        ``Fit(module, data, strategy=DeepSpeed(config="ds_config.json", stage=3), devices=2)``
    """

    name = "deepspeed"
    played_by = "deepspeed.played:PlayedDeepSpeed"
    refused_turns = (
        "its engine has one optimizer, one loss scale and one backward an update. Use strategy='fsdp2', which shards "
        "as ZeRO does, or 'ddp'"
    )
    parameter_form = "flat"
    Options = DeepSpeedOptions
    options: DeepSpeedOptions
    refused_arguments: ClassVar[Mapping[str, str]] = {
        "contrastive_chunks": "can't be had under strategy='deepspeed', whose engine counts backwards, and reduces "
        "gradients by that count. Use strategy='fsdp2', or 'ddp'",
    }
    engine: Any = None
    linear: AbstractContextManager[None] = nullcontext()
    zero_state: ZeroState | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        check_package()
        self.config = read(self.options.config)
        self.stage = given_stage(self.config, self.options.stage)
        self.filled: dict[str, Any] = {}

    def mesh_shape(self, world_size: int) -> dict[str, int]:
        """Put all ranks into the dimension of shards, at stage 0 too, where each rank holds a replica."""
        return {REPLICATE: 1, SHARD: world_size, CONTEXT: 1, TENSOR: 1}

    def check_precision(self, precision: Precision) -> None:
        """Refuse what ZeRO can't compute in."""
        super().check_precision(precision)
        check_precision(precision)

    def expect(self, run: RunDescription) -> None:
        """Fill the config in from the run."""
        options = self.options
        with environment():
            self.filled = fill(
                self.config,
                run,
                stage=self.stage,
                world_size=self.world_size,
                computes_in_bf16=self.precision.compute_dtype is torch.bfloat16,
                offload_optimizer=options.offload_optimizer,
                offload_parameters=options.offload_parameters,
            )

    def optimizer_problem(self, optimizer: Optimizer) -> str | None:
        """Why the engine can't step with an optimizer, and what to use instead; None where it can."""
        return optimizer_problem(optimizer)

    def configuration(self) -> Mapping[str, Any]:
        """Return the DeepSpeed config with the run's values in the place of every "auto"."""
        return self.filled

    def place(
        self, module: nn.Module, configure_optimizer: ConfigureOptimizer | None, prepare: Prepare = nothing_to_prepare
    ) -> None:
        """Move the module and make the optimizer, both whole; the engine cuts them. For evaluation alone nothing is
        cut.
        """
        super().place(module, configure_optimizer, prepare)
        if self.optimizer is None:
            return
        check_parameters(module, self.stage)
        check_dense(module, self.name)
        assert self.filled, "expect() comes before place()"
        groups = [{**group, "params": list(group["params"])} for group in self.optimizer.param_groups]
        self.engine = initialize(module, self.optimizer, self.filled)
        if self.stage == 3:
            self.linear = EngineLinear()
        self.model = self.engine
        if self.stage:
            self.zero_state = ZeroState(self.engine, [group["params"] for group in groups], self.mesh[SHARD])
        if self.stage and self.world_size > 1:
            GradientOrder(self.engine.optimizer, self.stage, module.parameters())
        base = self.engine.optimizer.optimizer if self.stage else self.optimizer
        self.optimizer = EngineOptimizer(base, groups, self.step_engine)

    # One update.

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Make the precision's context, with the engine's linear function."""
        with self.linear, super().forward_context():
            yield

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Tell the engine whether this micro-batch ends the update, where it reduces gradients."""
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Have the engine compute the gradients; the loss is weighed already, so the engine doesn't divide it."""
        try:
            with self.linear:
                self.engine.backward(loss, scale_wrt_gas=False)
        except RuntimeError as error:
            if self.stage == 3 and met_nested(error):
                raise ValueError(NO_NESTED_TENSORS) from error
            raise

    def clip_grad_norm(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """Compute the norm as the engine would in its step, which then clips by this very norm."""
        if not self.stage:
            return super().clip_grad_norm(parameters, max_norm)
        from deepspeed.runtime.utils import combine_grad_norm_groups

        zero = self.engine.optimizer
        if self.stage == 3:
            groups = zero._get_norm_groups()
            zero._get_norm_groups = lambda: groups
            norm = combine_grad_norm_groups(groups)
        else:
            norm = zero.scaled_global_norm()
            zero.scaled_global_norm = lambda norm_type=2: norm
        zero.clip_grad = max_norm
        return torch.where(norm < 0, torch.inf, norm)  # how the engine marks a norm that isn't finite

    def step_engine(self) -> None:
        """Have the engine step with the norm of this update, and clip only where this update asked for it."""
        self.engine.step()
        if self.stage:
            zero = self.engine.optimizer
            vars(zero).pop("_get_norm_groups", None)
            vars(zero).pop("scaled_global_norm", None)
            zero.clip_grad = 0.0

    def step_was_skipped(self) -> bool:
        """Whether the engine skipped the step, as ZeRO does where gradients aren't finite."""
        return bool(self.stage and self.engine.optimizer.overflow)

    @property
    def forward_waits(self) -> bool:
        """Whether ranks wait for one another in a forward: stage 3 gathers its parameters."""
        return self.stage == 3

    @property
    def judges_gradients(self) -> bool:
        """Whether the engine skips updates whose gradients aren't finite: at every stage but 0."""
        return self.stage > 0

    @property
    def reads_at_once(self) -> bool:
        """Always: at stages 1 to 3 the engine waits for its device in every step anyway. At stage 0 on the CPU."""
        return self.stage > 0 or super().reads_at_once

    def skip(self) -> None:
        """Have the engine drop the gradients, as it does where their norm isn't finite; at stage 0 the loop does."""
        if self.stage:
            invalid = torch.tensor(-1.0, device=self.device)
            zero = self.engine.optimizer
            if self.stage == 3:
                zero._get_norm_groups = lambda: [invalid]
            else:
                zero.scaled_global_norm = lambda norm_type=2: invalid
            self.step()
        else:
            super().skip()

    def suspects(self) -> Names:
        """Look at the gradients while the engine has them, one whole one at a time. Collective at stages 1 to 3."""
        if not self.stage:
            return super().suspects()
        names = [name for name, gradient in self.full_gradients() if not bool(gradient.isfinite().all())]
        return lambda: names

    # State.

    def part_held(self, parameter: Tensor) -> Part | None:
        """Say that this rank holds parameters whole, or at stage 3 a shard that no other rank has."""
        return None if self.stage == 3 else ()

    def held_apart(self) -> Mapping[str, Sequence[Tensor]]:
        """The engine's shards, float32 master weights, gradients and buckets."""
        if self.engine is None or not self.stage:
            return super().held_apart()
        return held_apart(self.engine.optimizer, self.stage, self.module)

    @property
    def held_on_host(self) -> Collection[str]:
        """What the config offloads."""
        zero = self.filled.get("zero_optimization", {})
        offloads = {key: (zero.get(key) or {}).get("device") == "cpu" for key in ("offload_optimizer", "offload_param")}
        return [
            *(("parameters",) if offloads["offload_param"] else ()),
            *(("gradients", "optimizer_state") if offloads["offload_optimizer"] else ()),
        ]

    def model_state(self) -> dict[str, Tensor]:
        """Gather one parameter at a time and cut it by rows; buffers are given as they are."""
        state: dict[str, Tensor] = dict(self.module.state_dict(keep_vars=True))
        if self.zero_state is not None:
            state |= self.zero_state.parameters()
        return {name: tensor.detach() for name, tensor in state.items()}

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Give parameters back to the engine, one whole at a time; buffers were read in place."""
        if self.zero_state is not None:
            self.zero_state.load_parameters(state)

    def held_weights(self, parameters: Mapping[str, nn.Parameter] | None = None) -> dict[str, Tensor]:
        """This rank's flat shards of the master weights; at stage 0 the weights."""
        return super().held_weights(parameters) if self.zero_state is None else self.zero_state.held()

    def weights_by_name(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather one parameter at a time and cut it by rows."""
        if self.zero_state is None:
            return super().weights_by_name(held)
        with torch.no_grad(), self.zero_state.masters(held):
            return self.zero_state.trained()

    def held_from(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut into flat shards again."""
        if self.zero_state is None:
            return super().held_from(weights)
        with torch.no_grad():
            return self.zero_state.held_from(weights)

    @contextmanager
    def with_weights(self, held: Mapping[str, Tensor]) -> Iterator[None]:
        """Give the engine other master weights, and the module what follows from them."""
        state = self.zero_state
        if state is None:
            with super().with_weights(held):
                yield
            return
        try:
            with state.masters(held):
                state.load_parameters(state.trained())
                yield
        finally:
            state.load_parameters(state.trained())

    def full_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Gather whole gradients, one at a time."""
        return super().full_gradients() if self.zero_state is None else self.zero_state.gradients()

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """The optimizer's state, cut by parameter instead of by flat group."""
        return super().optimizer_state() if self.zero_state is None else self.zero_state.optimizer_state()

    def stepping_optimizer(self) -> Optimizer:
        """The optimizer inside the engine."""
        return getattr(self.optimizer, "base", None) or super().stepping_optimizer()

    def stand_in(self, parameter: Tensor) -> Tensor:
        """Make a few zeros, which stand for a piece of the engine's flat float32 master weights."""
        if self.zero_state is None:
            return super().stand_in(parameter)
        return torch.zeros(8, device=parameter.device)

    def load_optimizer_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Cut the state into the flat groups again."""
        if self.zero_state is None:
            super().load_optimizer_state(state)
        else:
            with torch.no_grad():
                self.zero_state.load_optimizer_state(state)

    def release(self, module: nn.Module) -> None:
        """Let go of the engine, too. The module can't be used until the caller has put it back as it was."""
        self.leave_engine()
        super().release(module)

    def begin_again(self) -> None:
        """Let go of earlier runs' engines, too: ranks that wait for this one are woken when no one holds its groups."""
        destroy_all()
        forget_groups()
        super().begin_again()

    def leave_engine(self) -> None:
        """Destroy the engine, which takes its hooks off the module."""
        if self.engine is not None:
            destroy(self.engine)
            self.engine = self.zero_state = None
            self.linear = nullcontext()

    def tear_down(self) -> None:
        """Let go of the engine and leave the process group."""
        self.leave_engine()
        forget_groups()
        super().tear_down()
