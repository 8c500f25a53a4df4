"""fit.summary() and repr(fit): numbers by hand, a run that stays as it was, words where there is nothing to show."""

import random
from typing import Any

import numpy
import pytest
import torch
from stratagem import Fit, TrainModule
from stratagem.framework import random_state
from tiny import Dropping, MakeFit, Regressor, regression_rows
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset


class Stack(TrainModule):
    """Three alike blocks of a list, attention in each, under a head that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))
        self.head = nn.Linear(8, 1).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Reading(Regressor):
    """Looks at its input's numbers on the way, which a copy without memory can't."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if bool((x > -1e9).all()) else x


class Late(Regressor):
    """Has its layers only once it is built."""

    def __init__(self) -> None:
        TrainModule.__init__(self)

    def build(self) -> None:
        self.hidden = nn.Linear(3, 4)
        self.head = nn.Linear(4, 1)


TABLE = """\
layer      type       input   output  parameters  trainable  FLOPs
------------------------------------------------------------------
Regressor  Regressor  [1, 3]  [1, 1]          21      100 %     32
  hidden   Linear     [1, 3]  [1, 4]          16      100 %     24
  head     Linear     [1, 4]  [1, 1]           5      100 %      8
------------------------------------------------------------------
21 parameters: 21 trainable, 0 frozen; 0.0 MiB with buffers
32 FLOPs in a forward of one sample"""


def test_a_small_module_by_hand(make_fit: MakeFit) -> None:
    fit = make_fit(Regressor(), regression_rows(8), max_steps=2)
    assert str(fit.summary()) == repr(fit.summary()) == TABLE  # 2 * 3 * 4, 2 * 4
    fit.train()
    assert str(fit.summary()) == TABLE


@pytest.mark.parametrize("kind", [Reading, Late])
def test_a_module_that_reads_numbers_or_is_built_late_has_the_same_table(
    make_fit: MakeFit, kind: type[Regressor]
) -> None:
    table = TABLE.replace("Regressor  Regressor", f"{kind.__name__:<9}  {kind.__name__:<9}")
    summary = make_fit(kind(), regression_rows(8), max_steps=1).summary()
    assert summary.flops == 32 and summary.layers[0].trainable == 21
    assert [line.split() for line in str(summary).splitlines()[2:5]] == [
        line.split() for line in table.splitlines()[2:5]
    ]


def test_alike_blocks_share_a_row_and_the_depth_is_a_choice(make_fit: MakeFit) -> None:
    fit = make_fit(Stack(), max_steps=1, eval_data=[{"x": torch.zeros(5, 8)}])
    rows = [line.split("  ") for line in str(fit.summary(2)).splitlines()]
    block = 4 * 8 * 8 + 4 * 8 + 2 * 8 * 16 + 16 + 8 + 2 * 2 * 8  # attention, feed forward, two norms
    (shared,) = [row for row in rows if "0 to 2, each" in row]
    assert f"{block:,}" in [cell.strip() for cell in shared]
    assert len(str(fit.summary(0)).splitlines()) == 6 and len(str(fit.summary(1)).splitlines()) == 8
    summary = fit.summary()
    # Queries, keys, values and output; scores and their values; two layers: by 2 for a product and a sum.
    attention = 5 * 4 * 8 * 8 + 2 * 5 * 5 * 8
    assert summary.traced["blocks.1"].flops == 2 * (attention + 2 * 5 * 8 * 16)
    assert summary.flops == 3 * summary.traced["blocks.1"].flops + 2 * 5 * 8
    assert f"{3 * block + 9:,} parameters: {3 * block:,} trainable, 9 frozen" in str(summary)
    with pytest.raises(ValueError, match=r"depth counts layers.* Received: -1"):
        fit.summary(-1)


class Random(list[Any]):
    """Draws numbers for each sample, as augmentation does."""

    def __getitem__(self, index: Any) -> Any:
        sample = super().__getitem__(index)
        return {**sample, "x": sample["x"] + random.random() + float(numpy.random.rand()) + torch.rand(1)}


@pytest.mark.parametrize("when", ["before placement", "in training", "after a run"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_summary_leaves_a_run_as_it_was(make_fit: MakeFit, when: str, workers: int) -> None:
    def run(looks: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
        torch.manual_seed(0)
        options = {"max_steps": 6, "logging_steps": 1, "dataloader_num_workers": workers, "shuffle": True}
        fit = make_fit(Dropping(), Random(regression_rows(8)), per_device_train_batch_size=2, **options)

        def look() -> None:
            modes = [layer.training for layer in fit.module.modules()]
            states, buffers = random_state.capture(), {n: b.clone() for n, b in fit.module.named_buffers()}
            hooks = [dict(layer._forward_hooks) for layer in fit.module.modules()]
            assert fit.summary().flops
            assert random_state.capture() == states
            assert [layer.training for layer in fit.module.modules()] == modes
            assert [dict(layer._forward_hooks) for layer in fit.module.modules()] == hooks
            assert all(torch.equal(buffer, buffers[name]) for name, buffer in fit.module.named_buffers())

        if looks and when == "before placement":
            look()
        if looks and when == "in training":
            step, fit.training_step = fit.training_step, lambda *a: (look(), step(*a))[1]  # type: ignore[method-assign]
        fit.train()
        if looks and when == "after a run":
            look()
            fit.train()
        elif when == "after a run":
            fit.train()
        losses = {str(n): log["loss"] for n, log in enumerate(fit.state.log_history) if "loss" in log}
        return losses, {name: tensor.clone() for name, tensor in fit.module.state_dict().items()}

    (losses, weights), (expected, plain) = run(True), run(False)
    assert losses == expected
    assert all(torch.equal(weights[name], plain[name]) for name in plain)


def test_hooks_of_the_user_hear_of_the_run_alone(make_fit: MakeFit) -> None:
    module, heard = Regressor(), []
    module.hidden.register_forward_hook(lambda *_: heard.append(1))
    fit = make_fit(module, regression_rows(8), max_steps=1)
    assert fit.summary().flops == 32 and heard == []
    fit.train()
    assert heard == [1]


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        raise AssertionError("nobody may read it")


class Failing(Regressor):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not today")


@pytest.mark.parametrize(
    ("module", "data", "why"),
    [
        (Regressor, Endless(), "shapes and FLOPs need a batch: fit.summary(batch=...)"),
        (Failing, regression_rows(8), "a forward of one sample fails (RuntimeError: not today)"),
    ],
    ids=["a stream", "a failure"],
)
def test_what_cant_be_shown_is_said(make_fit: MakeFit, module: type[Regressor], data: Any, why: str) -> None:
    fit = make_fit(module(), data, max_steps=1)
    summary = fit.summary()
    assert summary.flops is None and summary.traced == {}
    assert str(summary).splitlines()[0].split() == ["layer", "type", "parameters", "trainable"]
    assert str(summary).splitlines()[-1] == f"No shapes and FLOPs: {why}."
    assert summary.layers[0].trainable == 21


def test_a_batch_can_be_given_and_a_loaders_collation_is_used(make_fit: MakeFit) -> None:
    fit = make_fit(Regressor(), Endless(), max_steps=1)
    summary = fit.summary(batch={"x": torch.zeros(5, 3)})
    assert summary.traced["hidden"].outputs == ((5, 4),) and summary.flops == 5 * 32
    assert str(summary).endswith("160 FLOPs in a forward of the batch that was given")

    def double(samples: list[Any]) -> Any:
        return {"x": torch.stack([s["x"] for s in samples] * 2), "y": torch.stack([s["y"] for s in samples] * 2)}

    loader = DataLoader(regression_rows(8), batch_size=4, collate_fn=double)  # type: ignore[arg-type]
    assert make_fit(Regressor(), loader, max_steps=1).summary().traced["head"].inputs == ((2, 4),)


def test_checkpointed_blocks_are_traced_as_they_are(make_fit: MakeFit) -> None:
    data = [{"x": torch.zeros(5, 8)}]
    before = make_fit(Stack(), eval_data=data, max_steps=1).summary()

    class Trained(Stack):
        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return outputs.square().mean()

    fit = make_fit(Trained(), data, max_steps=1, gradient_checkpointing=True)
    fit.train()
    assert fit.summary().traced == before.traced


# repr.


def test_a_fit_reads_as_what_it_is(make_fit: MakeFit, tmp_path: Any) -> None:
    fit = make_fit(Regressor(), regression_rows(16), max_steps=4, per_device_train_batch_size=8)
    lines = [
        "Fit(",
        "  module: Regressor",
        "  strategy: Single(), precision: 32-true, cpu, rank 0 of 1",
        "  update 0 of 4, epoch 0.00",
        f"  output_dir: '{tmp_path / 'output'}'",
        ")",
    ]
    assert repr(fit).splitlines() == lines
    fit.train()
    lines[1], lines[3] = "  module: Regressor, placed", "  update 4 of 4, epoch 2.00"
    assert repr(fit).splitlines() == lines


def test_a_fit_that_was_never_made_can_be_printed(make_fit: MakeFit) -> None:
    assert repr(object.__new__(Fit)) == "Fit()"
    only = repr(make_fit(Regressor(), eval_data=regression_rows(2)))
    assert "module: Regressor" in only and "update" not in only
