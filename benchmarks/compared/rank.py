"""One process of a trial: ``python rank.py CONTESTANT TASK``, where TASK is a task's fields as JSON."""

import importlib
import json
import sys
from pathlib import Path

import torch
from task import Task

if __name__ == "__main__":
    contestant, fields = sys.argv[1:]
    task = Task(**json.loads(fields))
    torch.set_num_threads(1)
    last = importlib.import_module(contestant).train(task)
    Path(task.directory, f"last-{task.life}-{task.rank}").write_text(str(last))
