"""UpdateProgram: an update as one compiled program, where ``torch_compile="update"`` asks for it.

The first update of a run is made in the usual way, operation by operation: it makes the optimizer's state. From then on
an update is one call, which changes parameters and that state in place. What decides is what a checkpoint holds (how
many updates were made, what the batch is like), so that a resumed run makes each update in the way in which an
uninterrupted one does.
"""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...strategies.batches import tensors_of
from ..data.stand_in import StandIn
from ..measures.tokens import TokenCounter
from ..objective import Count, Objective
from ..optim.traced_step import CannotTraceError, options_of
from .one_graph import Held, compile_update, mark_loss
from .run import Run
from .shortcut import Shortcut, shortcut_to

MOST = 16
"""Programs of a run that are compiled because options of the optimizer's groups have changed."""

LossAndExtras = tuple[Tensor, Mapping[str, Tensor]]
Program = Callable[[nn.Module, Any, Tensor | None], LossAndExtras]
"""(model, batch on the device, items in it where the loss asks for them) to loss and extras, with the update made."""


class CannotCompileError(ValueError):
    """An update that can't be one program; says why, and what to write instead."""

    def __init__(self, why: object) -> None:
        super().__init__(
            f"torch_compile='update' can't make one program of this run's updates: {str(why).strip()}\nMend that, or "
            "write torch_compile=True, which compiles the module's blocks."
        )


class UpdateProgram:
    """Makes updates by a compiled program: forward, loss, gradients, clipping and the optimizer's step.

    Each kind of batch (the shapes of its tensors) has a program of its own, so that which one makes an update follows
    from the update alone.

    Args:
        run: begun.
        objective: finds the loss.
        count_tokens: counts a batch's tokens.
        emit: tells the callbacks of an event.
    """

    def __init__(self, run: Run, objective: Objective, count_tokens: TokenCounter, emit: Callable[[str], None]) -> None:
        self.run, self.objective, self.count_tokens, self.emit = run, objective, count_tokens, emit
        strategy = run.strategy
        self.groups = run.optimizer.param_groups
        trainable = [parameter for parameter in strategy.named_parameters().values() if parameter.requires_grad]
        dtype = torch.float32 if strategy.device.type == "mps" else torch.float64
        rates = torch.zeros(len(self.groups), dtype=dtype, device=strategy.device)
        self.held = Held(run.optimizer, trainable, run.args.max_grad_norm or 0.0, rates)
        self.rates_on_host = rates.numpy() if strategy.device.type == "cpu" else None
        self.functions: dict[tuple[torch.Size, ...], tuple[types.FunctionType, Program]] = {}
        self.shortcut: Shortcut | None = None
        self.made_anew = 0

    def update(self, micro_batches: Sequence[Any]) -> bool:
        """Make an update, and end it.

        Args:
            micro_batches: of the update, as the data gave them.

        Returns:
            Whether it was made, or left out for its gradients; False where it is to be made in the usual way.

        Raises:
            CannotCompileError, CannotTraceError: it can't be one program.
        """
        run, state, held = self.run, self.run.state, self.held
        run.stepping.settle_schedule()
        if state.global_step == state.skipped_updates:
            return False
        [inputs] = micro_batches
        if isinstance(inputs, StandIn):
            return False
        count = self.objective.count(inputs)
        if isinstance(count, int) and count == 0:
            return False
        run.averages.count(count, self.count_tokens(inputs))
        self._take_rates()
        state.begin_step(self.groups[0]["lr"])
        logged = self.objective.logged
        logged.open()
        loss, extras = self._call(run.strategy.to_device(inputs), count)
        run.averages.note(logged.take(count, run.strategy.local_loss, taken=extras))
        logged.close()
        for name, value in extras.items():
            run.averages.add_share(name, value)
        assert held.measure is not None and held.each is not None
        run.stepping.take_update(loss, held.measure, held.normed, held.each)
        self.emit("on_optimizer_step")
        run.stepping.settle_known_schedule()
        run.end_update(loss)
        return True

    def _take_rates(self) -> None:
        """Put the learning rates where the program reads them."""
        if self.rates_on_host is not None:
            for number, group in enumerate(self.groups):
                self.rates_on_host[number] = group["lr"]
        else:
            rates = torch.tensor([float(group["lr"]) for group in self.groups], dtype=self.held.rates.dtype)
            self.held.rates.copy_(rates.pin_memory(), non_blocking=True)

    def _call(self, inputs: Any, count: Count) -> LossAndExtras:
        """Make the update of a batch on the device."""
        model = self.run.strategy.model
        num_items = torch.as_tensor(count, device=self.run.strategy.device) if self.objective.takes_num_items else None
        if not self.held.is_current():
            self._begin_anew()
        shortcut = self.shortcut
        if shortcut is not None and shortcut.holds(model, inputs, num_items):
            return shortcut.call(model, inputs, num_items)
        from torch import _dynamo
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        kind = tuple([tensor.shape for tensor in tensors_of(inputs)])
        if kind not in self.functions:
            self.functions[kind] = self._make_program()
        function, program = self.functions[kind]
        try:
            # Profilers would be told where the program begins: two calls that take a tenth of a small program's time.
            with _dynamo.config.patch(record_runtime_overhead=False):
                found = program(model, inputs, num_items)
        except FailOnRecompileLimitHit as error:
            raise CannotCompileError(
                "a Python value that forward or loss reads keeps changing, and each of its values is another program; "
                "TORCH_LOGS=recompiles names it. Make it a buffer, a tensor that changes in place, as "
                "self.update_number and self.epoch are."
            ) from error
        except TorchDynamoException as error:
            inner = getattr(error, "inner_exception", error)
            raise (inner if isinstance(inner, CannotTraceError) else CannotCompileError(inner)) from error
        self.shortcut = shortcut_to(function)
        return found

    def _begin_anew(self) -> None:
        """Let go of programs that were made with other options of the optimizer than it has now.

        Raises:
            CannotCompileError: that happens again and again.
        """
        if self.functions:
            self.made_anew += 1
            if self.made_anew > MOST:
                raise CannotCompileError(
                    "options of the optimizer's groups beside the learning rate keep changing, and each choice of them "
                    f"is another program: {options_of(self.run.optimizer)}. A schedule that moves the momentum does "
                    "that, as OneCycleLR with cycle_momentum."
                )
        self.functions, self.shortcut = {}, None
        self.held.hold()

    def _make_program(self) -> tuple[types.FunctionType, Program]:
        """Make a program, which the first call compiles, and refuse callbacks that would hear nothing.

        Raises:
            CannotCompileError: names the callbacks.
        """
        listeners = self.run.callbacks.listeners["on_pre_optimizer_step"]
        if listeners:
            heard_by = sorted({type(getattr(each, "__self__", each)).__name__ for each in listeners})
            raise CannotCompileError(
                f"{', '.join(heard_by)} hears on_pre_optimizer_step, and in a program nothing comes between the "
                "gradients and the step."
            )
        from torch import _dynamo, _inductor

        objective, forward_context = self.objective, self.run.strategy.forward_context

        def find_loss(model: nn.Module, inputs: Any, num_items: Tensor | None) -> LossAndExtras:
            with forward_context():
                outputs = objective.forward(model, inputs)
                loss, extras = objective.loss(outputs, inputs, num_items)
            return mark_loss(loss), extras

        # torch.compile keeps what it has compiled, and counts it, by the code of a function. Each program has a code of
        # its own, so that it meets batches of one kind alone, and nothing in it is compiled for any size.
        function = types.FunctionType(
            find_loss.__code__.replace(), find_loss.__globals__, find_loss.__name__, None, find_loss.__closure__
        )
        args, held = self.run.args, self.held
        # The guards have compared the sizes already.
        options = {**_inductor.list_mode_options(args.torch_compile_mode), "size_asserts": False}
        # Inductor's own CUDA graphs leave out programs that change their inputs, as this one does.
        replays = bool(options.pop("triton.cudagraphs", False)) and self.run.strategy.device.type == "cuda"
        backend = args.torch_compile_backend or "inductor"
        _dynamo.allow_in_graph(mark_loss)
        program = torch.compile(
            function,
            fullgraph=True,
            dynamic=False,  # else sizes that another run in this process had would make it a program for any size
            backend=lambda graph, inputs: compile_update(graph, inputs, held, backend, options, replays),
        )
        return function, program
