"""Counts of parameters: by hand, with shared and frozen ones, on the meta device, and after a placement."""

import json
from dataclasses import asdict

import torch
from stratagem import Fit, TrainModule
from stratagem.framework.measures.parameters import count_parameters, layers_of
from torch import nn


class Tied(TrainModule):
    """An embedding of 7 x 4 whose weight is the head's too, and a frozen layer of 4 x 4 + 4; a number of its own."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        with torch.device(device):
            self.scale = nn.Parameter(torch.ones(1))
            self.embedding = nn.Embedding(7, 4)
            self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).requires_grad_(False)
            self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embedding(x))) * self.scale

    def loss(self, outputs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, -2), batch["labels"].flatten())


def test_a_shared_parameter_counts_once_in_the_whole_and_in_each_child_that_has_it() -> None:
    counts = count_parameters(Tied())
    assert (counts.trainable, counts.frozen, counts.total) == (28 + 1, 20, 49)
    assert {name: (each.trainable, each.frozen) for name, each in counts.children.items()} == {
        "embedding": (28, 0),
        "body": (0, 20),
        "head": (28, 0),
    }
    assert json.loads(json.dumps(asdict(counts)))["children"]["body"] == {"trainable": 0, "frozen": 20, "children": {}}


def test_layers_come_with_names_classes_and_depths() -> None:
    layers = layers_of(Tied())
    assert [(layer.name, layer.kind, layer.depth) for layer in layers] == [
        ("", "Tied", 0),
        ("embedding", "Embedding", 1),
        ("body", "Sequential", 1),
        ("body.0", "Linear", 2),
        ("body.1", "ReLU", 2),
        ("head", "Linear", 1),
    ]


def test_parameters_without_memory_count_like_others() -> None:
    assert count_parameters(Tied("meta")) == count_parameters(Tied())


def test_a_placed_module_has_the_counts_of_before() -> None:
    fit = Fit(Tied(), eval_data=[{"x": torch.tensor([1, 2]), "labels": torch.tensor([2, 3])}], progress=False)
    fit.evaluate()
    assert fit.placement.parameters == count_parameters(Tied())
