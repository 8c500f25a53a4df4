"""Runs that are planned and made: modules as ``stratagem plan`` finds them, and what a real run of one comes to."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from stratagem import Average, Callback, Fit, TrainModule, Turn
from stratagem.framework.planning.recording import Recording
from stratagem.strategies import get_strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from training import Tagger, token_rows

UPDATES = 3


def build() -> Tagger:
    """A weight tied, a first dimension that ranks don't divide, a frozen layer, buffers."""
    return Tagger()


def data() -> list[dict[str, Tensor]]:
    """Tokens and labels."""
    return token_rows()


class Normed(Tagger):
    """The same with statistics that change in forward, which ranks share."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(6)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.mix(self.embed(tokens)) + self.position[self.order]
        for block in self.blocks:
            x = block(x)
        return self.head(self.statistics(x.transpose(1, 2)).transpose(1, 2))


def build_normed() -> Normed:
    return Normed()


class Late(TrainModule):
    """Layers that are made where they are placed, by parts."""

    def build(self) -> None:
        self.first, self.second = nn.Linear(6, 13), nn.Linear(13, 1)

    def init_weights(self, layer: nn.Module) -> None:
        layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.mse_loss(outputs, batch[1])


def build_late() -> dict[str, Any]:
    return {"module": Late(), "train_data": [(torch.randn(6), torch.randn(1)) for _ in range(64)]}


class Square(TrainModule):
    """A weight that is large enough to have moments of 8 bits, and a bias that isn't."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return outputs.square().mean()


def build_square() -> dict[str, Any]:
    return {"module": Square(), "train_data": [torch.ones(64) for _ in range(64)]}


class Pair(TrainModule):
    """A critic that has two turns before its generator has one, each with an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(4, 15), nn.Tanh(), nn.Linear(15, 1))
        self.generator = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 4))

    def turns(self) -> list[Turn]:
        return [
            Turn("critic", self.critic_loss, "critic", optim="adamw"),
            Turn("generator", self.generator_loss, "generator", optim="sgd", optim_args={"momentum": 0.9}, every=2),
        ]

    def critic_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.critic(self.generator(batch["noise"]).detach()).mean() - self.critic(batch["real"]).mean()

    def generator_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return -self.critic(self.generator(batch["noise"])).mean()


def build_pair() -> dict[str, Any]:
    rows = [{"real": torch.randn(4), "noise": torch.randn(3)} for _ in range(128)]
    return {"module": Pair(), "train_data": rows}


class ChoosingPair(Pair):
    """The same, whose generator goes another way for other numbers."""

    def generator_loss(self, batch: dict[str, Tensor]) -> Tensor:
        loss = super().generator_loss(batch)
        return loss if loss > 0 else -loss


def build_choosing_pair() -> dict[str, Any]:
    return {**build_pair(), "module": ChoosingPair()}


def build_averaged() -> dict[str, Any]:
    """Two averages, of which one lies in the host's memory."""
    return {"module": Tagger(), "train_data": data(), "callbacks": [Average(), Average(device="cpu")]}


def build_adapted() -> dict[str, Any]:
    """A peft model: adapters beside frozen weights."""
    from language_models import make, text_rows

    return {"module": make("lora"), "train_data": text_rows(64)}


def build_adapted_wide() -> dict[str, Any]:
    """Adapters that are large enough to have moments of 8 bits."""
    from language_models import llama, text_rows, with_adapters

    torch.manual_seed(0)
    return {"module": TrainModule.wrap(with_adapters(llama(64), rank=64)), "train_data": text_rows(64)}


def build_quantized(storage: torch.dtype = torch.uint8) -> dict[str, Any]:
    """The same beside weights of 4 bits."""
    from language_models import llama, quantized, text_rows, with_adapters

    torch.manual_seed(0)
    model = with_adapters(quantized(llama(64), storage), rank=64)
    return {"module": TrainModule.wrap(model), "train_data": text_rows(64)}


def build_quantized_in_float32() -> dict[str, Any]:
    """The same, with the codes in tensors that shards can be cut of."""
    return build_quantized(torch.float32)


def build_choosing() -> dict[str, Any]:
    from planned_models import build_choosing

    return build_choosing()


def build_writer() -> Any:
    from test_context_parallel import Writer, text_rows

    return {"module": Writer(), "train_data": text_rows()}


class Observer(Callback):
    """Records the last update of a run, from the end of the one before it, and measures what this rank holds."""

    def __init__(self) -> None:
        self.recording = Recording()
        self.gradients = 0

    def on_train_begin(self, *context: Any, **more: Any) -> None:
        self.recording.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, fit: Fit, **more: Any) -> None:
        named = fit.strategy.named_parameters().values()
        own = [p.grad for p in named if p.grad is not None]
        size = size_of([*own, *fit.strategy.held_apart().get("gradients", ())])
        self.gradients = max(self.gradients, size)  # of several turns, the one that has most

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == UPDATES - 1:
            self.recording.begin()
        if state.global_step == UPDATES:
            self.recording.__exit__(None, None, None)
            self.recording.end()


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory that tensors lie in, each once."""
    storages = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def observed(target: str, strategy: str, options: dict[str, Any], directory: str, **arguments: Any) -> dict[str, Any]:
    """Train a few updates for real, and say what this rank held and sent."""
    module, name = target.split(":")
    made = getattr(import_module(module), name)()
    given = made if isinstance(made, dict) else {"module": made, "train_data": data()}
    observer, averages = Observer(), given.pop("callbacks", ())
    fit = Fit(
        **given,
        strategy=type(get_strategy(strategy))(**options) if options else strategy,
        callbacks=[observer, *averages],
        loggers=(),
        progress=False,
        save_strategy="no",
        max_steps=UPDATES,
        output_dir=directory,
        **arguments,
    )
    fit.train()
    held = fit.strategy
    named, apart = held.named_parameters().values(), held.held_apart()
    state = held.stepping_optimizer().state.values()
    sent = Counter((m.operation, len(m.ranks)) for m in observer.recording.messages if len(m.ranks) > 1)
    size: Counter[tuple[str, int]] = Counter()
    for message in observer.recording.messages:
        if len(message.ranks) > 1:
            size[message.operation, len(message.ranks)] += message.bytes
    # What bitsandbytes keeps of a weight beside its codes: a scale for each block, and what the codes stand for.
    packed = [layer.quant_state for layer in held.module.modules() if hasattr(layer, "quant_state")]
    packing = [part for state in packed for part in (state.absmax, state.code, state.offset)]
    packing += [part for state in packed for part in (state.state2.absmax, state.state2.code)]  # of the scales' own
    frozen = [*(p for p in named if not p.requires_grad), *packing, *apart.get("frozen_parameters", ())]
    return {
        "parameters": size_of([*(p for p in named if p.requires_grad), *apart.get("parameters", ())]),
        "frozen_parameters": size_of(frozen),
        "gradients": observer.gradients,
        "optimizer_state": size_of(
            [
                *(v for entries in state for v in entries.values() if isinstance(v, Tensor)),
                *apart.get("optimizer_state", ()),
            ]
        ),
        "buffers": size_of(held.module.buffers()),
        "groups": [
            [getattr(p, "ds_numel", p.numel()) for p in group["params"]] for group in held.optimizer.param_groups
        ],
        "averaged_weights": size_of(p for average in averages if average.device is None for p in average.parts()),
        "averaged_weights_on_host": size_of(p for average in averages if average.device for p in average.parts()),
        "sent": sorted((*key, count, size[key]) for key, count in sent.items()),
    }


def planned(target: str, world: int, ranks: list[int], values: dict[str, Any]) -> list[dict[str, Any]]:
    """Play ranks of a world, each in a process that is forked from this one, and return their accounts."""
    from stratagem.framework.configuration.writing import text_of
    from stratagem.framework.planning import child

    found = []
    with tempfile.TemporaryDirectory() as directory:
        (config := Path(directory) / "config.yaml").write_text(text_of(values, target))
        asked = {"config": str(config), "words": None, "fit": "stratagem:Fit", "ranks_per_node": world}
        (request := Path(directory) / "request.json").write_text(json.dumps(asked))
        for rank in ranks:
            answer = Path(directory) / f"{rank}.json"
            process = os.fork()
            if not process:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
                os.environ["LOCAL_RANK"] = str(rank)
                try:
                    child.main(request, answer)
                finally:
                    os._exit(0)
            os.waitpid(process, 0)
            found.append(json.loads(answer.read_text()))
    return found
