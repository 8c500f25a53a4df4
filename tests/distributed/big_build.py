"""A program that test_late_layers.py starts as each of two ranks: places a model of a billion parameters from build().

    RANK=0 WORLD_SIZE=2 ... python big_build.py DIRECTORY

Prints JSON: the bytes of this rank's shards, and the most memory beyond that at the start that the process had.
"""

import json
import sys
from typing import Any

import torch
from stratagem import Fit, TrainModule
from stratagem.benchmarks.scale_rows.measuring import PEAK, measuring
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from training import Block

VOCABULARY, WIDTH, LAYERS = 32_000, 2_048, 28


class Big(TrainModule):
    """An embedding, a head, and blocks of 33 million parameters."""

    def build(self) -> None:
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.blocks = nn.ModuleList(Block(WIDTH, 4 * WIDTH) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def init_weights(self, layer: nn.Module) -> None:
        if layer is self.head:
            nn.init.trunc_normal_(self.head.weight, std=0.02)
        else:
            super().init_weights(layer)

    def forward(self, tokens: Tensor) -> Any:
        raise NotImplementedError


def main() -> None:
    """Place the model, and tell what it took."""
    torch.set_num_threads(1)
    fit = Fit(Big(), strategy="fsdp2", progress=False, loggers=(), report=False, output_dir=sys.argv[1])
    with measuring() as figures:
        fit.place()
    local = [p.to_local() for p in fit.strategy.named_parameters().values() if isinstance(p, DTensor)]
    padded = fit.strategy.rank == 0 and bool(local[0][0].any())
    print(json.dumps({"shards": sum(p.nbytes for p in local), "peak": figures[PEAK] * 2**20, "padded": padded}))
    fit.close()


if __name__ == "__main__":
    main()
