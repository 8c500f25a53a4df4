"""Row: an update of a tiny network, 32-32-1 with batches of 32, where Python and launches take the time."""

import tempfile
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ... import Fit, TrainModule
from ...framework.callbacks import Callback
from .measuring import CPU

TITLE = "An update of a tiny network (32-32-1, batch 32, AdamW, clipping, a schedule), one process"
ROUNDS = 3
LIMIT = "bare loop"
FEATURES, BATCH_SIZE, SAMPLES = 32, 32, 8192
WARM_UP, SEGMENT, UPDATES = 100, 50, 2_000


class Network(TrainModule):
    """The network."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.mse_loss(outputs, batch[1])


class Stopwatch(Callback):
    """Notes the computing time at every so many updates; the tenth fastest part of them is what no neighbour slowed."""

    def __init__(self) -> None:
        self.readings: list[float] = []

    def note(self, update: int) -> None:
        if update >= WARM_UP and update % SEGMENT == 0:
            self.readings.append(time.process_time())

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.note(state.global_step)

    def figures(self) -> dict[str, float]:
        parts = sorted(after - before for before, after in zip(self.readings, self.readings[1:], strict=False))
        return {CPU: parts[len(parts) // 10] / SEGMENT}


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, FEATURES, generator=generator), torch.randn(SAMPLES, 1, generator=generator)


def fitted(**arguments: Any) -> dict[str, float]:
    """A Fit."""
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as directory:
        Fit(
            Network(), TensorDataset(*samples()), callbacks=[watch], max_steps=UPDATES, output_dir=directory,
            save_strategy="no", per_device_train_batch_size=BATCH_SIZE, progress=False, loggers=(), **arguments,
        ).train()  # fmt: skip
    return watch.figures()


def bare() -> dict[str, float]:
    """The loop, written down, over batches that are there already."""
    network, watch = Network(), Stopwatch()
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0 - update / UPDATES)
    batches = list(zip(*(column.split(BATCH_SIZE) for column in samples()), strict=True))
    for update in range(1, UPDATES + 1):
        batch = batches[update % len(batches)]
        network.loss(network(batch[0]), batch).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        watch.note(update)
    return watch.figures()


def one_graph() -> dict[str, float]:
    """One graph by hand: the gradients, clipping and AdamW written down as one function of tensors, and no schedule."""
    network, watch = Network(), Stopwatch()
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    moments = [{name: torch.zeros_like(weight) for name, weight in weights.items()} for _ in range(2)]

    def find_loss(now: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(torch.func.functional_call(network, now, (x,)), y)

    @torch.compile(fullgraph=True)
    def update_of(x: Tensor, y: Tensor, count: Tensor) -> Tensor:
        gradients, loss = torch.func.grad_and_value(find_loss)(weights, x, y)
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        factor = (1.0 / (norm + 1e-6)).clamp(max=1.0)
        for name, weight in weights.items():
            gradient, mean, square = gradients[name] * factor, moments[0][name], moments[1][name]
            mean.lerp_(gradient, 0.1)
            square.mul_(0.999).add_(gradient * gradient, alpha=0.001)
            root = (square / (1 - 0.999**count)).sqrt() + 1e-8
            weight.mul_(1 - 1e-5).sub_(1e-3 * (mean / (1 - 0.9**count)) / root)
        count.add_(1)
        return loss

    columns = [column.split(BATCH_SIZE) for column in samples()]
    batches, count = list(zip(columns[0], columns[1], strict=True)), torch.ones(())
    for update in range(1, UPDATES + 1):
        update_of(*batches[update % len(batches)], count)
        watch.note(update)
    return watch.figures()


CONTESTANTS = {
    "stratagem": fitted,
    "stratagem, torch_compile=True": lambda: fitted(torch_compile=True),
    'stratagem, torch_compile="update"': lambda: fitted(torch_compile="update"),
    "bare loop": bare,
    "one graph by hand": one_graph,
}
