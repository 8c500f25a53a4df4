"""A precision of one's own: bfloat16 weights without float32 copies, rounded at random, so that no update is lost.

    python examples/own_precision.py    # needs scikit-learn and torchmetrics; --help lists every option
    stratagem fit examples/own_precision.py:build --precision bf16-stochastic    # its name is known there, too

Rounded to the nearest bfloat16, a weight stays where it is when its update is smaller than 1/512 of it. Rounded up or
down by chance, the nearer one more often, it moves by the update on average (Zamirai et al., 2020). It ends with a
table: bytes kept for a weight, loss and accuracy beside float32, bfloat16 with float32 copies, and bfloat16 alone.
"""

import warnings
from typing import Any

import torch
from digits import build, data
from stratagem import Fit, configure
from stratagem.precision import BF16True, LostUpdates, register_precision
from stratagem.precision.master_weights import MASTER_WEIGHT, local, on_master_weights
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves


@register_precision
class StochasticBF16(BF16True):
    """Weights and arithmetic in bfloat16, moments in float32; each step is made in float32, and rounded at random.

    Args:
        seed: of the roundings. All ranks draw alike, and a run that goes on draws on.
    """

    name = "bf16-stochastic"

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed, self.steps = seed, 0

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> None:
        with on_master_weights(optimizer):  # copies that the optimizer's state holds, until they are rounded
            optimizer.step()
        self.steps += 1
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        draws = torch.Generator(parameters[0].device).manual_seed((self.seed << 32) + self.steps)
        for parameter in parameters:
            copy = optimizer.state[parameter].pop(MASTER_WEIGHT)
            local(parameter).copy_(round_at_random(local(copy), draws))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]

    def __repr__(self) -> str:
        return f"StochasticBF16(seed={self.seed})"


def round_at_random(numbers: Tensor, draws: torch.Generator) -> Tensor:
    """Round float32 numbers to one of their two neighbours in bfloat16, which has the upper 16 of their bits."""
    lower = torch.randint(2**16, numbers.shape, generator=draws, device=numbers.device, dtype=torch.int32)
    return ((numbers.view(torch.int32) + lower) & -(2**16)).view(torch.float32).bfloat16()


ARGUMENTS = {
    "output_dir": "output/own_precision", "precision": "bf16-stochastic", "num_train_epochs": 5, "seed": 0,
    "per_device_train_batch_size": 32, "per_device_eval_batch_size": 512, "learning_rate": 4e-4,
    "lr_scheduler_type": "constant", "logging_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 2,
}  # fmt: skip


def main() -> None:
    """Train in each format, and compare."""
    run = configure(build, data, ARGUMENTS)
    table = [f"{'precision':32} {'bytes a weight':>14} {'train loss':>11} {'held-out loss':>14} {'accuracy':>9}"]
    for name, other in {"": None, "fp32": "32-true", "bf16": "bf16-true", "rounded": BF16True(False)}.items():
        given: dict[str, Any] = {"precision": other, "output_dir": f"{run.values['output_dir']}/{name}"} if name else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LostUpdates)  # they are what is shown here
            fit = Fit.from_config(run, **given)
        loss, found = fit.train(resume_from_checkpoint=run.resume).training_loss, fit.evaluate()
        kept = [*fit.module.parameters(), *tree_leaves([*fit.optimizer.state.values()])]
        size = sum(tensor.nbytes for tensor in kept) / sum(p.numel() for p in fit.module.parameters())
        row = f"{fit.strategy.precision!r:32} {size:14.1f} {loss:11.4f} {found['eval_loss']:14.4f}"
        table.append(f"{row} {found['eval_accuracy']:9.4f}")
    if fit.strategy.is_main:
        print("\n".join(table))


if __name__ == "__main__":
    main()
