"""Bad input: an error at construction or at the first batch, which says what was given and what to write instead."""

from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback, TrainModule
from stratagem.precision import BF16Mixed, BF16True
from stratagem.strategies import Single
from tiny import MakeFit, Numbers, Regressor, parameters_of, regression_rows
from torch import Tensor, nn
from torch.utils.data import DataLoader

ROWS = regression_rows(4)


def losing(loss: Any) -> Regressor:
    """A Regressor whose loss is ``loss(outputs, batch)``."""

    class Bad(Regressor):
        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
            return loss(outputs, batch)

    return Bad()


@pytest.mark.parametrize(
    ("loss", "kind", "message"),
    [
        (lambda o, b: (o - b["y"]).square(), ValueError, r"Bad\.loss must return the mean.*shape \(2, 1\).*\.mean\(\)"),
        (lambda o, b: (o - b["y"]).square().mean().item(), TypeError, r"must return a 0-dim tensor\. Received: float"),
        (lambda o, b: None, TypeError, r"must return a 0-dim tensor\. Received: NoneType"),
        (lambda o, b: (o - b["y"]).square().mean().detach(), ValueError, r"carries no gradient.*detached"),
        (lambda o, b: torch.tensor(1.0), ValueError, r"carries no gradient"),
        (lambda o, b: {"total": o.mean()}, ValueError, r"a mapping without 'loss'\. Its keys are 'total'"),
    ],
)
def test_a_loss_that_cant_be_trained_on(make_fit: MakeFit, loss: Any, kind: type[Exception], message: str) -> None:
    module = losing(loss)
    before = parameters_of(module)
    with pytest.raises(kind, match=message):
        make_fit(module, ROWS, per_device_train_batch_size=2).train()
    torch.testing.assert_close(parameters_of(module), before, rtol=0, atol=0)


def test_the_message_names_compute_loss_func(make_fit: MakeFit) -> None:
    fit = make_fit(Regressor(), ROWS, compute_loss_func=lambda outputs, labels: outputs)
    with pytest.raises(ValueError, match=r"^compute_loss_func must return the mean"):
        fit.train()


def test_a_module_without_a_loss(make_fit: MakeFit) -> None:
    class Lossless(TrainModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Any:
            return {"logits": self.net(x)}

    with pytest.raises(ValueError, match=r"Lossless defines no loss.*the keys \['logits'\].*Write loss\(self"):
        make_fit(Lossless(), ROWS).train()


def test_nothing_to_train(make_fit: MakeFit) -> None:
    class Frozen(Regressor):
        configure_optimizer = TrainModule.configure_optimizer

    module = Frozen()
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="Frozen has no parameter that requires a gradient"):
        make_fit(module, ROWS).train()
    assert set(make_fit(module, eval_data=ROWS).evaluate()) == {"eval_loss"}


def test_a_mapping_that_lacks_what_forward_names(make_fit: MakeFit) -> None:
    rows = [{"input": row["x"], "y": row["y"]} for row in ROWS]
    with pytest.raises(
        ValueError, match=r"Regressor\.forward needs x, .*forward names x; the batch's keys are input, y"
    ):
        make_fit(Regressor(), rows).train()


def test_a_tuple_that_is_too_short(make_fit: MakeFit) -> None:
    class Pair(Regressor):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * weight

    with pytest.raises(ValueError, match=r"Pair\.forward needs 2 inputs \(x, weight\), but the batch is a .* of 1"):
        make_fit(Pair(), [(row["x"],) for row in ROWS]).train()


def test_a_batch_that_cant_be_counted(make_fit: MakeFit) -> None:
    loader = DataLoader(Numbers(4), batch_size=2, collate_fn=lambda samples: {"names": [str(s) for s in samples]})
    with pytest.raises(
        ValueError, match=r"how many items are in a batch of type dict.*Write count_items\(self, batch\)"
    ):
        make_fit(Regressor(), loader).train()


def test_a_module_that_isnt_one(make_fit: MakeFit) -> None:
    with pytest.raises(TypeError, match=r"takes a stratagem\.TrainModule.*Linear.*Write TrainModule\.wrap\(model\)"):
        make_fit(nn.Linear(1, 1), ROWS)
    with pytest.raises(TypeError, match="Pass an instance, not a class"):
        make_fit(Regressor, ROWS)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("strategy", "singel", r"Unknown strategy 'singel'\. Did you mean 'single'\? Known: .*single"),
        ("precision", "bf16-mixd", r"Unknown precision 'bf16-mixd'\. Did you mean 'bf16-mixed'\? Known: 16, 16-mixed"),
        ("loggers", ["tensorbord"], r"Unknown logger 'tensorbord'\. Did you mean 'tensorboard'\?"),
    ],
)
def test_unknown_names_suggest_the_nearest(make_fit: MakeFit, argument: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_fit(Regressor(), ROWS, **{argument: value})


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("strategy", 3, r"strategy takes a name or a Strategy instance, e\.g\. strategy='single'\. Received: 3"),
        ("precision", torch.float16, r"precision takes a name or a Precision instance.*Received: torch\.float16"),
        ("strategy", Single, r"strategy takes a name or a Strategy instance.*Received: <class"),
        ("callbacks", [Callback], r"callbacks takes instances"),
    ],
)
def test_values_of_the_wrong_type(make_fit: MakeFit, argument: str, value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make_fit(Regressor(), ROWS, **{argument: value})


def test_options_of_a_strategy() -> None:
    with pytest.raises(TypeError, match=r"BF16True has no option 'master_weight'\. Did you mean 'master_weights'\?"):
        BF16True(master_weight=False)
    with pytest.raises(TypeError, match=r"BF16Mixed has no option 'skip'\. It has none\."):
        BF16Mixed(skip=())
    with pytest.raises(TypeError, match=r"BF16Mixed has no options\. Received: 3"):
        BF16Mixed(3)
    with pytest.raises(TypeError, match=r"Single has no option 'devise'\. Did you mean 'device'\?"):
        Single(devise="cpu")
    with pytest.raises(ValueError, match=r"Single\(device=\.\.\.\) takes 'auto', 'cpu'.*Received: 'gpu'"):
        Single(device="gpu")


def test_evaluation_without_data(make_fit: MakeFit) -> None:
    with pytest.raises(ValueError, match=r"eval_strategy='epoch': needs something to evaluate on.*Pass eval_data="):
        make_fit(Regressor(), ROWS, eval_strategy="epoch")


@pytest.mark.parametrize("argument", ["train_data", "eval_data"])
def test_empty_data_is_refused_at_construction(make_fit: MakeFit, argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} is empty"):
        make_fit(Regressor(), **{"train_data": ROWS, argument: []})


def test_an_empty_iterable_is_refused_at_the_first_batch(make_fit: MakeFit) -> None:
    class Nothing(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(())

    with pytest.raises(ValueError, match="train_data gave no batch in epoch 0"):
        make_fit(Regressor(), Nothing(), max_steps=3).train()


def test_nothing_half_written_remains(make_fit: MakeFit, tmp_path: Path) -> None:
    for arguments in ({"gradient_accumulation_steps": 0}, {"strategy": "singel"}, {"train_data": []}, {"nme": 1}):
        options = {"train_data": ROWS, "loggers": ["jsonl", "tensorboard"], "save_strategy": "steps", **arguments}
        with pytest.raises((TypeError, ValueError)):
            make_fit(Regressor(), **options)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="carries no gradient"):
        make_fit(losing(lambda o, b: torch.tensor(1.0)), ROWS, save_strategy="steps", save_steps=1).train()
    assert list(tmp_path.iterdir()) == []
