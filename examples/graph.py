"""Which of three kinds a graph is of: graph convolutions of torch_geometric over batches of graphs, on made data.

    python examples/graph.py    # needs torch-geometric and pillow; takes seconds; --help lists every option
    python examples/graph.py --strategy ddp --devices 2 --per_device_train_batch_size 16    # the same losses

The kinds are rings with chords, trees, and pairs of clusters; nodes know nothing but that they are there. It ends with
the held-out accuracy, and with a picture of graphs of each kind, framed in red where they were taken for another.
"""

from math import cos, pi, sin
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from stratagem import Fit, TrainModule, configure
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GINConv, global_add_pool

KINDS = 3  # rings with chords, trees, pairs of clusters


class GraphReader(TrainModule):
    """Graph isomorphism convolutions (Xu et al., 2019), and a linear layer over the sum of a graph's nodes."""

    item_name = "graphs"

    def __init__(self, width: int = 32, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            GINConv(nn.Sequential(nn.Linear(takes, width), nn.ReLU(), nn.Linear(width, width), nn.LayerNorm(width)))
            for takes in [1, *[width] * (layers - 1)]
        )
        self.head = nn.Linear(width, KINDS)

    def forward(self, graphs: Batch) -> Tensor:
        x = graphs.x
        for layer in self.layers:
            x = layer(x, graphs.edge_index).relu()
        return self.head(global_add_pool(x, graphs.batch, graphs.num_graphs) / 10)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.y)

    def count_items(self, batch: Batch) -> int:
        return int(batch.num_graphs)


def make_graph(kind: int, draw: torch.Generator) -> Data:
    """Make a graph of 10 to 19 nodes."""
    nodes = int(torch.randint(10, 20, (), generator=draw))
    node, half, chance = torch.arange(nodes), nodes // 2, torch.rand(nodes, nodes, generator=draw)
    if kind == 0:
        joined = ((node[:, None] + 1) % nodes == node) | (chance < 0.03)
    elif kind == 1:
        joined = F.one_hot((chance[0] * node).long(), nodes).bool() & (node > 0)[:, None]  # each node's parent
    else:
        joined = (chance < 0.25) & ((node < half)[:, None] == (node < half)) | (node[:, None] + 1 == node)
    joined = (joined | joined.T).fill_diagonal_(False)
    return Data(x=torch.ones(nodes, 1), edge_index=joined.nonzero().T.contiguous(), y=torch.tensor([kind]))


def build(width: int = 32, layers: int = 3) -> dict[str, Any]:
    """What Fit is given beside its options.

    Args:
        width, layers: of the convolutions.
    """
    return {"module": GraphReader(width, layers), "data_collator": Batch.from_data_list}


def data(graphs: int = 600, held_out: int = 150) -> tuple[list[Data], list[Data]]:
    """Graphs of all kinds in turn, for training and held out.

    Args:
        graphs, held_out: how many.
    """
    chance = torch.Generator().manual_seed(0)
    made = [make_graph(number % KINDS, chance) for number in range(graphs + held_out)]
    return made[:graphs], made[graphs:]


def draw(path: Path, graphs: list[Data], taken_for: Tensor, columns: int = 6, size: int = 120) -> None:
    """Write a picture: a row for each kind, each graph's nodes in a circle."""
    picture = Image.new("RGB", (columns * size, KINDS * size), "white")
    pen = ImageDraw.Draw(picture)
    for number, graph in enumerate(graphs[: columns * KINDS]):
        column, row = divmod(number, KINDS)  # kinds come in turn
        angles = [2 * pi * node / graph.num_nodes for node in range(graph.num_nodes)]
        places = [(size * (column + 0.5 + 0.4 * sin(a)), size * (row + 0.5 - 0.4 * cos(a))) for a in angles]
        for first, second in graph.edge_index.T.tolist():
            pen.line([places[first], places[second]], fill="steelblue")
        if taken_for[number] != graph.y:
            pen.rectangle([column * size, row * size, (column + 1) * size - 1, (row + 1) * size - 1], outline="red")
    picture.save(path)


ARGUMENTS = {
    "output_dir": "output/graph", "num_train_epochs": 15, "per_device_train_batch_size": 32, "learning_rate": 3e-3,
    "per_device_eval_batch_size": 150, "logging_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 2,
}  # fmt: skip


def main() -> None:
    """Train, tell the held-out graphs apart, and draw some."""
    run = configure(build, data, ARGUMENTS)
    fit = Fit.from_config(run)
    fit.train(resume_from_checkpoint=run.resume)
    taken_for = torch.as_tensor(fit.predict(fit.eval_data).predictions).argmax(dim=1)
    if fit.strategy.is_main:
        right = taken_for == torch.cat([graph.y for graph in fit.eval_data])
        draw(Path(fit.args.output_dir) / "graphs.png", fit.eval_data, taken_for)
        print(f"held-out accuracy: {right.float().mean():.4f}; see {fit.args.output_dir}/graphs.png")


if __name__ == "__main__":
    main()
