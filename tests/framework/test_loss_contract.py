"""The loss contract: an update's gradient is that of one mean over all items, however the batch is cut."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stratagem import Fit, TrainModule
from stratagem.framework.data.stand_in import StandIn
from stratagem.framework.module import IGNORED_LABEL
from tiny import Float64, MakeFit, Regressor, Tagger, collate, logs_of, parameters_of, regression_rows, token_rows
from torch import Tensor, nn

# Micro-batch size and accumulation of one global batch of 8.
SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]
ROWS = 21  # two whole groups of 8, and a short one of 5: at (4, 2) two micro-batches of 4 and 1, at (2, 4) three


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )


class CountedTagger(Tagger):
    """Divides by the global count itself."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor], num_items_in_batch: int | None = None) -> Tensor:
        return cross_entropy_sum(outputs, batch["labels"]) / num_items_in_batch


class MaskedTagger(Tagger):
    """A masked mean by hand, which is 0/0 where all is padding, and so is its gradient."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        labels, mask = batch["labels"].flatten(), batch["labels"].flatten() != IGNORED_LABEL
        losses = nn.functional.cross_entropy(outputs.flatten(0, 1), labels.clamp(min=0), reduction="none")
        return (losses * mask).sum() / mask.sum()


class ForgetfulTagger(Tagger):
    """Takes anything by keyword and ignores it, as wrappers do; it must be weighed like any other mean."""

    received: list[str]

    def loss(self, outputs: Tensor, batch: dict[str, Tensor], **options: Any) -> Tensor:
        self.received = [*getattr(self, "received", []), *options]
        return super().loss(outputs, batch)


def full_batch_sgd(
    module: nn.Module, rows: list[Any], global_batch: int, rate: float, epochs: int, loss: Callable[[Any], Tensor]
) -> dict[str, Tensor]:
    """The hand-written loop: each global batch in one forward, one backward, one plain gradient step."""
    for _ in range(epochs):
        for start in range(0, len(rows), global_batch):
            module.zero_grad()
            loss(collate(rows[start : start + global_batch])).backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= rate * parameter.grad
    return parameters_of(module)


def tagger_by_hand(initial: dict[str, Tensor], rows: list[Any], epochs: int = 2) -> dict[str, Tensor]:
    module = Tagger().double()
    module.load_state_dict(initial)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        items = int((batch["labels"] != IGNORED_LABEL).sum())
        return cross_entropy_sum(module(batch["tokens"]), batch["labels"]) / max(items, 1)

    return full_batch_sgd(module, rows, 8, 0.5, epochs, loss)


def train_tagger(make_fit: MakeFit, module: TrainModule, rows: list[Any], split: tuple[int, int], **more: Any) -> Fit:
    size, accumulation = split
    fit = make_fit(
        module,
        rows,
        precision=Float64(),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.5,
        num_train_epochs=2,
        **more,
    )
    fit.train()
    return fit


def initial_tagger() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return parameters_of(Tagger().double())


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("split", SPLITS)
def test_regression_equals_the_full_batch_loop(make_fit: MakeFit, split: tuple[int, int]) -> None:
    rows = regression_rows(ROWS, dtype=torch.float64)
    reference, module = Regressor().double(), Regressor()
    module.load_state_dict(reference.state_dict())
    initial = parameters_of(module.double())
    reference.load_state_dict(initial)
    expected = full_batch_sgd(
        reference, rows, 8, 0.1, 2, lambda b: (reference(b["x"]) - b["y"]).square().sum() / len(b["y"])
    )
    fit = make_fit(
        module,
        rows,
        precision=Float64(),
        per_device_train_batch_size=split[0],
        gradient_accumulation_steps=split[1],
        num_train_epochs=2,
    )
    assert fit.train().global_step == 6
    assert_close(parameters_of(module), expected)
    assert not torch.equal(expected["head.weight"], initial["head.weight"])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", [Tagger, CountedTagger, MaskedTagger, ForgetfulTagger])
def test_padded_labels_of_unequal_counts(make_fit: MakeFit, kind: type[Tagger], split: tuple[int, int]) -> None:
    # Row i counts i % 7 labels, so at micro-batch 1 rows 0, 7 and 14 are micro-batches of nothing but padding.
    rows, initial = token_rows(ROWS), initial_tagger()
    module = kind().double()
    module.load_state_dict(initial)
    train_tagger(make_fit, module, rows, split)
    assert_close(parameters_of(module), tagger_by_hand(initial, rows))


def test_keyword_arguments_do_not_count_as_naming_the_count(make_fit: MakeFit) -> None:
    module = ForgetfulTagger()
    fit = train_tagger(make_fit, module, token_rows(9), (2, 2))
    assert module.received == []
    assert not fit.objective.takes_num_items


@pytest.mark.parametrize("split", SPLITS)
def test_compute_loss_func_without_a_count_is_weighed(make_fit: MakeFit, split: tuple[int, int]) -> None:
    rows, initial = token_rows(ROWS), initial_tagger()
    module = Tagger().double()
    module.load_state_dict(initial)
    received: list[str] = []

    def mean(outputs: Tensor, labels: Tensor, **options: Any) -> Tensor:
        received.extend(options)
        return nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten())

    train_tagger(make_fit, module, rows, split, compute_loss_func=mean)
    assert_close(parameters_of(module), tagger_by_hand(initial, rows))
    assert received == []


@pytest.mark.parametrize("split", SPLITS)
def test_compute_loss_func_with_a_count_divides_itself(make_fit: MakeFit, split: tuple[int, int]) -> None:
    rows, initial = token_rows(ROWS), initial_tagger()
    module = Tagger().double()
    module.load_state_dict(initial)
    counts: list[int] = []

    def share(outputs: Tensor, labels: Tensor, num_items_in_batch: int | None = None) -> Tensor:
        assert num_items_in_batch is not None
        counts.append(int(num_items_in_batch))
        return cross_entropy_sum(outputs, labels) / num_items_in_batch

    train_tagger(make_fit, module, rows, split, compute_loss_func=share)
    assert_close(parameters_of(module), tagger_by_hand(initial, rows))
    # Rows count 0 1 2 3 4 5 6 0 | 1 2 3 4 5 6 0 1 | 2 3 4 5 6 labels.
    micro_batches = [-(-rows_in_group // split[0]) for rows_in_group in (8, 8, 5)]
    assert counts == 2 * ([21] * micro_batches[0] + [22] * micro_batches[1] + [20] * micro_batches[2])


@pytest.mark.parametrize("kind", [Tagger, CountedTagger, MaskedTagger])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_micro_batch_of_padding_contributes_nothing(make_fit: MakeFit, kind: type[Tagger], position: int) -> None:
    rows = [row for row in token_rows(20) if (row["labels"] != IGNORED_LABEL).any()][:4]
    padding = [{"tokens": row["tokens"], "labels": torch.full_like(row["labels"], IGNORED_LABEL)} for row in rows[:2]]
    initial = initial_tagger()
    module, without = kind().double(), kind().double()
    module.load_state_dict(initial)
    without.load_state_dict(initial)
    mixed = [*rows[: 2 * position], *padding, *rows[2 * position :]]
    with_padding = train_tagger(make_fit, module, mixed, (2, 3), logging_steps=1)
    train_tagger(make_fit, without, rows, (2, 2))
    assert_close(parameters_of(module), parameters_of(without))
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in logs_of(with_padding))


@pytest.mark.parametrize("kind", [Tagger, CountedTagger, MaskedTagger])
@pytest.mark.parametrize("split", [(4, 1), (2, 2)])
def test_an_update_of_nothing_but_padding_changes_nothing(
    make_fit: MakeFit, kind: type[Tagger], split: tuple[int, int]
) -> None:
    rows = [{"tokens": row["tokens"], "labels": torch.full_like(row["labels"], IGNORED_LABEL)} for row in token_rows(4)]
    initial = initial_tagger()
    module = kind().double()
    module.load_state_dict(initial)
    fit = train_tagger(make_fit, module, rows, split, logging_steps=1, max_grad_norm=1.0)
    assert_close(parameters_of(module), initial)
    assert ["loss" in line for line in logs_of(fit)] == [False, False]  # a mean over nothing is none
    assert [line["grad_norm"] for line in logs_of(fit)] == [0.0, 0.0]


def test_tuple_batches_and_a_loss_func_of_their_last_entry(make_fit: MakeFit) -> None:
    class Linear(TrainModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def configure_optimizer(self, args: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=args.learning_rate)

    rows = [(row["x"], row["y"]) for row in regression_rows(6, dtype=torch.float64)]
    x, y = (torch.stack([row[i] for row in rows]) for i in (0, 1))
    module = Linear().double()
    weight = module.net.weight.detach().clone()
    # d/dw mean((x w - y)^2) = 2 / n * (x w - y)^T x
    expected = weight - 0.1 * 2 / 6 * ((x @ weight.T - y).T @ x)
    make_fit(
        module,
        rows,
        precision=Float64(),
        compute_loss_func=lambda outputs, labels: (outputs - labels).square().mean(),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=1,
    ).train()
    torch.testing.assert_close(module.net.weight.detach(), expected, rtol=1e-12, atol=1e-13)


def test_training_step_alone_treats_its_batch_as_the_whole_update(make_fit: MakeFit) -> None:
    rows = regression_rows(4, dtype=torch.float64)
    module = Regressor()
    fit = make_fit(module, rows, precision=Float64(), per_device_train_batch_size=4, max_steps=1)
    fit.place()
    batch = collate(rows)
    loss = fit.training_step(fit.strategy.model, batch)
    expected = (module(batch["x"]) - batch["y"]).square().mean()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    gradient = torch.autograd.grad(expected, module.head.weight)[0]
    torch.testing.assert_close(module.head.weight.grad, gradient, rtol=1e-12, atol=1e-14)


def test_get_batch_samples_counts_the_labels_of_an_update(make_fit: MakeFit) -> None:
    rows = token_rows(7)
    fit = make_fit(Tagger(), rows, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    batches = fit.stream.epoch(0)
    first, first_items = fit.get_batch_samples(batches, 3, torch.device("cpu"))
    assert [len(batch["labels"]) for batch in first] == [2, 2, 2]
    assert first_items == 0 + 1 + 2 + 3 + 4 + 5
    last, _ = fit.get_batch_samples(batches, 3, torch.device("cpu"))
    assert [len(batch["labels"]) for batch in last] == [1]
    assert fit.get_batch_samples(batches, 3, torch.device("cpu")) == ([], None)


@pytest.mark.parametrize("kind", [Tagger, CountedTagger, MaskedTagger])
def test_a_stand_in_batch_adds_no_gradient(make_fit: MakeFit, kind: type[Tagger]) -> None:
    rows = [row for row in token_rows(9) if (row["labels"] != IGNORED_LABEL).any()]
    module = kind()
    fit = make_fit(module, rows, precision=Float64(), max_steps=1)
    fit.place()
    share = fit.training_step(fit.strategy.model, StandIn(collate(rows)), 12)
    assert share.item() == 0.0
    # It takes part all the same: under several ranks, gradients that aren't there can't be reduced.
    assert {name: float(p.grad.abs().sum()) for name, p in module.named_parameters()} == {
        "embed.weight": 0.0,
        "head.weight": 0.0,
        "head.bias": 0.0,
    }


class WatchedTagger(Tagger):
    """Logs the share of right tokens beside the loss."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = batch["labels"]
        right = (outputs.argmax(-1) == labels).double().sum() / (labels != IGNORED_LABEL).sum()
        return {"loss": super().loss(outputs, batch), "accuracy": right}


@pytest.mark.parametrize("split", SPLITS)
def test_extras_of_a_mapping_loss_are_means_over_the_same_items(make_fit: MakeFit, split: tuple[int, int]) -> None:
    rows, initial = token_rows(16), initial_tagger()
    module = WatchedTagger().double()
    module.load_state_dict(initial)
    fit = make_fit(
        module,
        rows,
        precision=Float64(),
        per_device_train_batch_size=split[0],
        gradient_accumulation_steps=split[1],
        learning_rate=0.0,
        num_train_epochs=1,
        logging_steps=2,
    )
    fit.train()
    per_update = []
    for group in (collate(rows[:8]), collate(rows[8:])):
        right = (module(group["tokens"]).argmax(-1) == group["labels"]).sum()
        per_update.append(float(right) / float((group["labels"] != IGNORED_LABEL).sum()))
    [line] = logs_of(fit)
    assert line["accuracy"] == pytest.approx(sum(per_update) / 2, rel=1e-12)
