"""A strategy of one's own: local SGD, whose ranks step on their own and average their weights every few updates.

    python examples/own_strategy.py    # two ranks; needs scikit-learn and torchmetrics; --help lists every option
    python examples/own_strategy.py --strategy.every 32                                  # averages more seldom
    stratagem fit examples/own_strategy.py:build --strategy local-sgd --max_steps 100    # its name is known there, too

It ends with a table: held-out loss and accuracy, and what a rank gives to all-reduce in an update, beside "ddp".
"""

from dataclasses import dataclass
from typing import Any

import torch
from digits import build, data
from stratagem import Fit, configure
from stratagem.precision import Precision
from stratagem.strategies import ProcessGroupOptions, ProcessGroupStrategy, register_strategy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class LocalSGDOptions(ProcessGroupOptions):
    """Options of LocalSGD.

    Args:
        every: updates between two averages. With 1 and plain SGD, it computes what "ddp" does.
    """

    every: int = 8


@register_strategy
class LocalSGD(ProcessGroupStrategy):
    """Ranks step on their own, and average weights and the optimizer's moments now and then (Stich, 2019). What is
    evaluated, saved or exported is an average; a run that goes on from a checkpoint ends as one without a break."""

    name = "local-sgd"
    Options = LocalSGDOptions
    gradients_are_alike = replicas_agree = False  # each rank has its own, and steps by them
    refused_turns = "all parameters are averaged at once. Use strategy='ddp'"
    updates_apart = 0  # that were made since the ranks last averaged

    def check_precision(self, precision: Precision) -> None:
        super().check_precision(precision)
        if precision.master_weights or precision.scales_loss:
            raise ValueError(f"local-sgd averages weights alone, and {precision.name!r} keeps more. Use 'bf16-mixed'.")

    def prepare_gradients(self) -> None:
        for parameter in self.named_parameters().values():  # one that this rank didn't use is stepped all the same
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        super().prepare_gradients()

    def clip_grad_norm(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        norm = super().clip_grad_norm(parameters, max_norm)  # all ranks leave an update out, or none: by one number
        return self.sum_over_data_ranks(norm) / self.gradient_ranks

    def step(self, refused: Tensor | None = None) -> None:
        super().step(refused)
        self.updates_apart += 1
        if self.updates_apart >= self.options.every:
            self.average()

    def settle(self) -> None:
        self.average()
        super().settle()

    @torch.no_grad()
    def average(self) -> None:
        """Average what the ranks' own updates have changed, in one message."""
        if self.updates_apart == 0:
            return
        state = [value for entries in self.optimizer_state().values() for value in entries.values()]
        moments = [value for value in state if isinstance(value, Tensor) and value.ndim]  # not "step", a number
        changed = [*self.held_weights().values(), *moments]
        together = self.sum_over_data_ranks(torch.cat([each.flatten() for each in changed])) / self.gradient_ranks
        for each, mean in zip(changed, together.split([each.numel() for each in changed]), strict=True):
            each.copy_(mean.view_as(each))
        self.weights_have_changed()
        self.updates_apart = 0

    def forget_module(self) -> None:
        super().forget_module()
        self.updates_apart = 0


class Traffic(TorchDispatchMode):
    total = 0  # bytes that this rank has given to all-reduce

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d" and "allreduce" in function.__name__:
            self.total += sum(tensor.nbytes for tensor in args[0])
        return function(*args, **(kwargs or {}))


ARGUMENTS = {
    "strategy": "local-sgd", "devices": 2, "output_dir": "output/own_strategy", "num_train_epochs": 5, "seed": 0,
    "per_device_train_batch_size": 16, "per_device_eval_batch_size": 256, "learning_rate": 3e-3,
    "logging_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 2,
}  # fmt: skip


def main() -> None:
    """Train under local SGD and under DDP, and compare."""
    run = configure(build, data, ARGUMENTS)
    table = ["    strategy   held-out loss   accuracy   bytes an update"]
    for given in (dict[str, Any](), dict[str, Any](strategy="ddp", output_dir=f"{run.values['output_dir']}/ddp")):
        fit = Fit.from_config(run, **given)
        with Traffic() as traffic:
            updates = fit.train(resume_from_checkpoint=run.resume).global_step
        found, sent = fit.evaluate(), traffic.total / updates
        table.append(f"{fit.strategy.name:>12} {found['eval_loss']:15.4f} {found['eval_accuracy']:10.4f} {sent:17,.0f}")
    if fit.strategy.is_main:
        print("\n".join(table))


if __name__ == "__main__":
    main()
