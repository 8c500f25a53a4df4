"""16-bit formats under every strategy: they learn, and an overflow on one rank is an overflow on all."""

import os
from typing import Any

import pytest
import torch
from ranks import Ranks
from stratagem import Callback
from stratagem.precision.half import FP16True
from stratagem.precision.loss_scaling import LossScaling
from stratagem.precision.mixed import FP16Mixed
from torch import Tensor
from torch.distributed.tensor import DTensor
from training import LENGTH, VOCABULARY, Tagger, curves, everywhere, make_fit, share_of_16, token_rows, train

pytestmark = pytest.mark.slow

UPDATES, OVERFLOWS_AT = 8, 3
SCALE = 256.0


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Watch(Callback):
    """Notes in each update whether this rank sees an overflow in its own gradients, and whether its weights move."""

    def __init__(self) -> None:
        self.sees: list[bool] = []
        self.moves: list[bool] = []

    def weights(self, fit: Any) -> list[Tensor]:
        return [local(p.detach()).clone() for p in fit.strategy.named_parameters().values() if p.requires_grad]

    def on_step_begin(self, *context: Any, fit: Any, **_: Any) -> None:
        self.before = self.weights(fit)

    def on_pre_optimizer_step(self, *context: Any, fit: Any, **_: Any) -> None:
        gradients = [p.grad for p in fit.strategy.named_parameters().values() if p.grad is not None]
        self.sees.append(not all(bool(local(g).isfinite().all()) for g in gradients))

    def on_step_end(self, *context: Any, fit: Any, **_: Any) -> None:
        pairs = zip(self.before, self.weights(fit), strict=True)
        self.moves.append(not all(torch.equal(a, b) for a, b in pairs))


class Amplified(Tagger):
    """Multiplies a sample's features by its "gain"; 1e30 is no float16 number."""

    def forward(self, tokens: Tensor, gain: Tensor) -> Tensor:
        x = (self.mix(self.embed(tokens)) + self.position[self.order]) * gain[:, None, None]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Promoting(Tagger):
    """Adds a float32 buffer to 16-bit features, in front of a block and in front of a layer of its own."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.mix(self.embed(tokens)) + self.position[self.order]
        for block in self.blocks:
            x = block(x)
        return self.head(x + self.position)


class Faulty(LossScaling):
    """On the last rank alone, the first number of its last gradient overflows in one update."""

    updates = 0

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        self.updates += 1
        last = int(os.environ.get("WORLD_SIZE", "1")) - 1
        if self.updates == OVERFLOWS_AT and int(os.environ.get("RANK", "0")) == last:
            gradients = [local(p.grad) for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            next(g for g in reversed(gradients) if g.numel()).view(-1)[0] = torch.inf
        super().unscale(optimizer)


class FaultyMixed(Faulty, FP16Mixed):
    """16-mixed."""


class FaultyTrue(Faulty, FP16True):
    """16-true."""


def train_watched(module: type[Tagger] = Tagger, data: Any = None, **arguments: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    watch = Watch()
    # No clipping: it would spread the overflow of one gradient to all.
    quiet = {"max_steps": UPDATES, "max_grad_norm": 0.0, "shuffle": False, "callbacks": [watch]}
    fit = make_fit(module(), data or token_rows(160), **quiet, **arguments)
    fit.train()
    skipped = fit.state.skipped_updates
    return {**curves(fit), "sees": watch.sees, "moves": watch.moves, "skipped": skipped}


def check_skip(results: list[dict[str, Any]]) -> None:
    """All ranks skipped one update, halved the scale, and kept the schedule where it was."""
    others = [update != OVERFLOWS_AT for update in range(1, UPDATES + 1)]
    scales = [SCALE if update < OVERFLOWS_AT else SCALE / 2 for update in range(1, UPDATES + 1)]
    # The first group's: from 0.003 to 0 over 8 updates, of which the third used its rate but didn't use it up.
    rates = [0.003 * (1 - step / UPDATES) for step in (0, 1, 2, 2, 3, 4, 5, 6)]
    for result in results:
        assert result["skipped"] == 1
        assert result["moves"] == others
        assert result["loss_scale"] == scales
        assert result["learning_rate"] == pytest.approx(rates)


@everywhere
@pytest.mark.parametrize("precision", [FP16Mixed(initial_scale=SCALE), FP16True(initial_scale=SCALE)], ids=str)
def test_overflow_in_one_ranks_batch(
    ranks: dict[int, Ranks], world: int, strategy: str, options: dict[str, Any], precision: LossScaling
) -> None:
    rows = [{**row, "gain": torch.tensor(1.0)} for row in token_rows(160)]
    rows[16 * OVERFLOWS_AT - 1]["gain"] = torch.tensor(1e30)  # the last sample of the third update: the last rank's
    rows[16 * OVERFLOWS_AT - 1]["labels"] = torch.arange(LENGTH) % VOCABULARY
    arguments = {"module": Amplified, "data": rows, "precision": precision}
    found = ranks[world].run(
        train_watched,
        strategy=strategy,
        options=options,
        per_device_train_batch_size=share_of_16(strategy, world, options),
        **arguments,
    )
    check_skip(found)
    expected = train_watched(per_device_train_batch_size=16, **arguments)
    check_skip([expected])
    for result in found:
        # float16 has 11 bits, and autocast rounds elsewhere than a policy does.
        assert result["loss"] == pytest.approx(expected["loss"], rel=0.02, nan_ok=True)


@everywhere
@pytest.mark.parametrize("faulty", [FaultyMixed, FaultyTrue])
def test_overflow_in_one_ranks_gradients(
    ranks: dict[int, Ranks], world: int, strategy: str, options: dict[str, Any], faulty: type[LossScaling]
) -> None:
    found = ranks[world].run(
        train_watched,
        strategy=strategy,
        options=options,
        per_device_train_batch_size=share_of_16(strategy, world, options) // 2,
        gradient_accumulation_steps=2,  # one change of the scale an update
        precision=faulty(initial_scale=SCALE),
    )
    check_skip(found)
    sees = [result["sees"] for result in found]
    assert sees[:-1] == [[False] * UPDATES] * (world - 1)  # only the last rank had one in its own gradients
    assert sees[-1] == [update == OVERFLOWS_AT for update in range(1, UPDATES + 1)]


@everywhere
@pytest.mark.parametrize("precision", ["bf16-mixed", FP16Mixed(initial_scale=SCALE)], ids=str)
def test_learns(ranks: dict[int, Ranks], world: int, strategy: str, options: dict[str, Any], precision: Any) -> None:
    expected = train(per_device_train_batch_size=16)
    found = ranks[world].run(
        train,
        strategy=strategy,
        options=options,
        precision=precision,
        per_device_train_batch_size=share_of_16(strategy, world, options) // 2,
        gradient_accumulation_steps=2,
    )
    assert found == [found[0]] * world
    assert "skipped_updates" not in found[0]
    # bfloat16 has 8 bits; an update that went wrong would be off by far more.
    assert found[0]["loss"] == pytest.approx(expected["loss"], rel=0.03)
    assert found[0]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)


@everywhere
def test_float32_buffers_meet_16_bit_layers(
    ranks: dict[int, Ranks], world: int, strategy: str, options: dict[str, Any]
) -> None:
    arguments = {"module": Promoting, "max_steps": 3}
    expected = train(per_device_train_batch_size=16, precision="bf16-mixed", **arguments)
    found = ranks[world].run(
        train,
        strategy=strategy,
        options=options,
        precision="bf16-mixed",
        per_device_train_batch_size=share_of_16(strategy, world, options),
        **arguments,
    )
    assert found[0]["loss"] == pytest.approx(expected["loss"], rel=2**-8)  # one rounding of bfloat16
