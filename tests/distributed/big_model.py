"""A program that test_pretrained.py starts as each of two ranks: places a model of a billion parameters from its files.

    RANK=0 WORLD_SIZE=2 ... python big_model.py DIRECTORY

Prints JSON: the bytes of this rank's shards, the most memory beyond that at the start that the process had while it
placed them, the bytes that it read of the files, and how many of the looked-up values are those in the files.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from pretrained_models import ROW, marked_values
from stratagem import Fit, TrainModule
from stratagem.benchmarks.scale_rows.measuring import PEAK, measuring
from torch.distributed.tensor import DTensor


def main() -> None:
    """Place the model, and tell what it took."""
    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    module = TrainModule.wrap(directory)
    fit = Fit(module, strategy="fsdp2", progress=False, loggers=(), report=False, output_dir=str(directory / "output"))
    read, count = os.preadv, 0

    def counted(file: int, into: Any, offset: int) -> int:
        nonlocal count
        count += len(into[0])
        return read(file, into, offset)

    os.preadv = counted
    with measuring() as figures:
        fit.place()
    shards = right = looked_at = 0
    for name, parameter in fit.strategy.named_parameters().items():
        assert isinstance(parameter, DTensor)
        local = parameter.to_local()
        shards += local.nbytes
        if fit.strategy.rank == 0:  # the first rows, which alone aren't zero in the files
            expected = marked_values(name, parameter.shape)
            right += int(torch.equal(local.flatten()[:ROW], expected.float()))
            looked_at += 1
    print(json.dumps({"shards": shards, "peak": figures[PEAK] * 2**20, "read": count, "wrong": looked_at - right}))
    fit.close()


if __name__ == "__main__":
    main()
