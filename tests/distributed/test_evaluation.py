"""Evaluation and prediction over ranks: every sample once, whatever the sizes; metrics as one device computes them."""

import os
import pickle
from typing import Any

import pytest
import torch
from ranks import Ranks
from stratagem.framework.module import IGNORED_LABEL
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score
from training import VOCABULARY, Tagger, make_fit, token_rows, train

pytestmark = pytest.mark.slow

PLACEMENTS: list[tuple[int, str, dict[str, Any]]] = [
    (2, "ddp", {}),
    (2, "fsdp1", {}),
    (2, "tp", {}),
    (4, "ddp", {}),
    (4, "fsdp2", {"replicas": 2}),
    (4, "fsdp2", {"tensor_parallel": 2}),
]
everywhere = pytest.mark.parametrize(("world", "strategy", "options"), PLACEMENTS, ids=str)


class Measured(Tagger):
    """Metrics that add up (accuracy, F1, together in a collection) and one that keeps all predictions (AUROC)."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        counts = batch["labels"] != IGNORED_LABEL
        return {"loss": super().loss(outputs, batch), "confidence": outputs.softmax(-1).amax(-1)[counts].mean()}

    def metrics(self) -> dict[str, Any]:
        options: dict[str, Any] = {"num_classes": VOCABULARY, "ignore_index": IGNORED_LABEL}
        scores = [MulticlassF1Score(**options), MulticlassAUROC(**options, validate_args=False)]
        return {"accuracy": MulticlassAccuracy(**options, average="micro"), "scores": MetricCollection(scores)}

    def metric_inputs(self, outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return outputs.flatten(0, 1), batch["labels"].flatten()


def evaluate(sizes: list[int], module: type[Tagger] = Measured, **arguments: Any) -> list[dict[str, Any]]:
    """Metrics, and predictions as lists, over the first so many rows."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    fit = make_fit(module(), token_rows(8), per_device_eval_batch_size=3, **arguments)
    results = []
    for size in sizes:
        rows = token_rows(size)
        predicted = fit.predict(rows)
        results.append({**fit.evaluate(rows), **predicted.metrics, "predictions": predicted.predictions.tolist()})
    return results


def by_hand(size: int) -> tuple[float, float, Tensor]:
    """Loss, accuracy and outputs over all rows in one batch, from the weights that one device begins with."""
    torch.manual_seed(0)
    module, rows = Measured().eval(), token_rows(size)
    labels = torch.stack([row["labels"] for row in rows]).flatten()
    with torch.no_grad():
        outputs = module(torch.stack([row["tokens"] for row in rows]))
    logits, counts = outputs.flatten(0, 1), labels != IGNORED_LABEL
    loss = nn.functional.cross_entropy(logits[counts], labels[counts])
    return float(loss), float((logits.argmax(-1) == labels)[counts].double().mean()), outputs


SIZES = [1, 2, 5, 12, 53]  # fewer samples than ranks; whole global batches of 4 x 3; ends of every kind


@everywhere
def test_metrics_are_one_devices(ranks: dict[int, Ranks], world: int, strategy: str, options: dict[str, Any]) -> None:
    expected = evaluate(SIZES)
    found = ranks[world].run(evaluate, sizes=SIZES, strategy=strategy, options=options)
    assert found == [found[0]] * world  # all ranks know all of it
    for size, mine, theirs in zip(SIZES, found[0], expected, strict=True):
        loss, accuracy, outputs = by_hand(size)
        assert mine["eval_loss"] == pytest.approx(loss, rel=1e-6)
        assert mine["test_loss"] == pytest.approx(loss, rel=1e-6)
        assert mine["eval_accuracy"] == pytest.approx(accuracy, rel=1e-7)
        torch.testing.assert_close(torch.tensor(mine["predictions"]), outputs)
        assert mine.keys() == theirs.keys() >= {"eval_scores_MulticlassF1Score", "eval_scores_MulticlassAUROC"}
        for name in theirs.keys() - {"predictions"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6), name


class Vocabulary(Measured):
    """An output layer cut by class."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(self.head.in_features, VOCABULARY + 1)

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {**super().tensor_parallel_plan(), "head": "colwise_gather"}

    def metrics(self) -> dict[str, Any]:
        accuracy = MulticlassAccuracy(num_classes=VOCABULARY + 1, ignore_index=IGNORED_LABEL, average="micro")
        return {"accuracy": accuracy}


@pytest.mark.parametrize(("world", "strategy", "options"), [PLACEMENTS[2], PLACEMENTS[5]], ids=str)
def test_outputs_cut_by_class_are_joined(
    ranks: dict[int, Ranks], world: int, strategy: str, options: dict[str, Any]
) -> None:
    expected = evaluate([53], module=Vocabulary)[0]
    options = {**options, "loss_parallel": True}
    found = ranks[world].run(evaluate, sizes=[53], module=Vocabulary, strategy=strategy, options=options)[0][0]
    torch.testing.assert_close(torch.tensor(found.pop("predictions")), torch.tensor(expected.pop("predictions")))
    assert found == pytest.approx(expected, rel=1e-6)


def train_and_evaluate(**arguments: Any) -> tuple[list[float], list[float]]:
    """Losses in training, and of the evaluations between."""
    torch.manual_seed(0)
    fit = make_fit(Measured(), token_rows(), token_rows(7), eval_strategy="steps", eval_steps=5, **arguments)
    fit.train()
    history = fit.state.log_history
    return [log["loss"] for log in history if "loss" in log], [
        log["eval_loss"] for log in history if "eval_loss" in log
    ]


@pytest.mark.parametrize(("world", "strategy", "options"), [PLACEMENTS[0], PLACEMENTS[1], PLACEMENTS[4]], ids=str)
def test_evaluation_leaves_training_alone(
    ranks: dict[int, Ranks], world: int, strategy: str, options: dict[str, Any]
) -> None:
    arguments = {"per_device_train_batch_size": 16 // world, "strategy": strategy, "options": options}
    plain = ranks[world].run(train, module=Measured, **arguments)[0]["loss"]
    losses, evaluations = ranks[world].run(train_and_evaluate, **arguments)[0]
    assert losses == plain
    _, expected = train_and_evaluate(per_device_train_batch_size=16)
    assert len(expected) == 4
    assert evaluations == pytest.approx(expected, rel=1e-5)


class Nested(Tagger):
    """Scores beside texts, rows in a tuple, and some whose length differs between batches."""

    def forward(self, tokens: Tensor) -> Any:
        scores = super().forward(tokens)
        ragged = tokens[:, : 1 + int(tokens.sum()) % 3].clone()
        return {
            "scores": scores,
            "pair": (tokens, tokens[:, 0] > 2),
            "text": [str(len(tokens))] * len(tokens),
            "r": ragged,
        }

    def loss(self, outputs: Any, batch: Any) -> Any:
        return super().loss(outputs["scores"], batch)


def outputs_of(size: int, fails: bool = False, **arguments: Any) -> dict[str, Any]:
    """What predict gives on this rank; what compute_metrics was given, in evaluate; and the bytes that were pickled."""
    torch.manual_seed(0)
    called: list[Any] = []
    pickled: list[int] = []

    def compute_metrics(predictions: Any, labels: Tensor) -> dict[str, float]:
        called.append((predictions["scores"].double().sum().item(), labels.sum().item()))
        if fails:
            raise KeyError("mine")
        return {"count": torch.tensor(float(len(labels)))}  # type: ignore[dict-item]

    gather, dist = torch.distributed.all_gather_object, torch.distributed
    fit = make_fit(Nested(), token_rows(8), compute_metrics=compute_metrics, per_device_eval_batch_size=3, **arguments)
    try:
        dist.all_gather_object = lambda into, value, group=None: (
            pickled.append(len(pickle.dumps(value))) or gather(into, value, group)
        )
        try:
            metrics = fit.evaluate(token_rows(size))
        except Exception as error:
            return {"called": len(called), "error": f"{type(error).__name__}: {error}"}
        evaluated, called[:] = list(called), []
        predicted = fit.predict(token_rows(size)).predictions
    finally:
        dist.all_gather_object = gather
    lists = {
        "scores": predicted["scores"].tolist(),
        "tokens": predicted["pair"][0].tolist(),
        "r": predicted["r"].tolist(),
    }
    lists |= {"large": predicted["pair"][1].tolist(), "text": predicted["text"]}
    return {"count": metrics["eval_count"], "evaluated": evaluated, "pickled": max(pickled, default=0), **lists}


@pytest.mark.parametrize(
    ("world", "strategy", "options"), [(2, "ddp", {}), (4, "fsdp2", {"tensor_parallel": 2})], ids=str
)
def test_outputs_come_whole_to_who_needs_them_and_are_not_pickled(
    ranks: dict[int, Ranks], world: int, strategy: str, options: dict[str, Any]
) -> None:
    found = ranks[world].run(outputs_of, size=200, strategy=strategy, options=options)
    assert [rank["count"] for rank in found] == [200.0] * world
    assert [len(rank["evaluated"]) for rank in found] == [1] + [0] * (world - 1)
    rows = token_rows(200)
    assert found[0]["tokens"] == [row["tokens"].tolist() for row in rows]
    assert found[0]["large"] == [int(row["tokens"][0]) > 2 for row in rows]
    scores = torch.tensor(found[0]["scores"])
    assert found[0]["evaluated"][0][0] == pytest.approx(scores.double().sum().item(), rel=1e-9)
    assert found[0]["evaluated"][0][1] == sum(int(row["labels"].sum()) for row in rows)
    for name in ("scores", "tokens", "large", "text", "r"):
        assert all(rank[name] == found[0][name] for rank in found)
    # Texts, and where the tensors belong; the scores of a rank alone are larger.
    assert all(rank["pickled"] < scores.numel() * 4 / 2 for rank in found)


def test_what_fails_on_the_main_process_alone_fails_on_all(ranks: dict[int, Ranks]) -> None:
    found = ranks[2].run(outputs_of, size=5, fails=True, strategy="ddp")
    assert [rank["called"] for rank in found] == [1, 0]
    assert found[0]["error"] == "KeyError: 'mine'"
    assert found[1]["error"] == "RuntimeError: Rank 0 failed at compute_metrics: KeyError: 'mine'"
