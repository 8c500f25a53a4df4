"""Ranks from a notebook: a real Jupyter kernel runs the cells."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nbclient.exceptions import CellExecutionError
from stratagem import launch

pytestmark = pytest.mark.slow

MODULE = """
import torch, stratagem
from stratagem import Callback, Fit, TrainModule
from torch import nn
from torch.utils.data import TensorDataset

class Net(TrainModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x)

    def loss(self, outputs, batch):
        return nn.functional.mse_loss(outputs, batch[1])

torch.manual_seed(0)
x = torch.rand(64, 2) @ torch.rand(2, 2)
data = TensorDataset(x, x.sum(dim=1, keepdim=True))
module = Net()
options = {"progress": False, "loggers": (), "save_strategy": "no", "max_steps": 4, "output_dir": "run"}
"""
ALONE = """
alone = Fit(Net(), data, per_device_train_batch_size=16, **options)
alone.module.load_state_dict(module.state_dict())
alone.train()
"""
TRAIN = """
def train(module, batch_size):
    fit = Fit(module, data, strategy="ddp", per_device_train_batch_size=batch_size, **options)
    fit.train()
    print("trained on rank", fit.strategy.rank, "of", fit.strategy.world_size, flush=True)
    return fit.module

trained = stratagem.launch(train, module, 8, devices=2)
same = all(torch.allclose(a, b, atol=1e-7) for a, b in zip(trained.parameters(), alone.module.parameters()))
print(type(trained) is Net, same, torch.equal(trained.layer.weight, module.layer.weight))
"""
SLOW = """
import time
class Slow(Callback):
    def on_step_end(self, args, state, control, **context):
        open(f"step-{state.global_step}", "w").close()
        time.sleep(0.3)

def train():
    slow = {**options, "max_steps": 1000, "save_strategy": "steps"}
    Fit(module, data, strategy="ddp", callbacks=[Slow()], **slow).train()

stratagem.launch(train, devices=2)
"""


class Notebook:
    """A notebook whose cells a kernel runs, in a directory."""

    def __init__(self, directory: Path) -> None:
        import nbformat
        from nbclient import NotebookClient

        self.book = nbformat.v4.new_notebook()
        self.client = NotebookClient(
            self.book, timeout=180, kernel_name="python3", resources={"metadata": {"path": str(directory)}}
        )
        self.cell = nbformat.v4.new_code_cell

    def run(self, source: str) -> str:
        """Run a cell, and return what it printed."""
        self.book.cells.append(self.cell(source))
        cell = self.client.execute_cell(self.book.cells[-1], len(self.book.cells) - 1)
        return "".join(output.get("text", "") for output in cell["outputs"])


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Notebook]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("RANK", "WORLD_SIZE", "PYTEST_CURRENT_TEST"):  # by the last, ipykernel knows not to show other prints
        monkeypatch.delenv(name, raising=False)
    made = Notebook(tmp_path)
    with made.client.setup_kernel():
        yield made


def test_a_function_trains_on_two_ranks_and_its_result_comes_back(notebook: Notebook) -> None:
    notebook.run(MODULE)
    with pytest.raises(CellExecutionError, match=r"stratagem\.launch\(function, devices=2\)"):
        notebook.run("Fit(module, data, strategy='ddp', devices=2, **options)")
    notebook.run(ALONE)
    printed = notebook.run(TRAIN)
    assert "trained on rank 0 of 2" in printed and "trained on rank 1 of 2" in printed
    assert "True True False" in printed
    with pytest.raises(CellExecutionError, match="The ranks ended with status 1"):
        notebook.run("stratagem.launch(lambda: 1 / 0, devices=2)")
    failed = "".join(output.get("text", "") for output in notebook.book.cells[-1]["outputs"])
    assert "ZeroDivisionError: division by zero" in failed and "failed first" in failed
    assert "[2, 3]" in notebook.run("print(stratagem.launch(sorted, [3, 2], devices=2))")


def test_an_interrupt_of_the_kernel_saves_and_ends_the_ranks(notebook: Notebook, tmp_path: Path) -> None:
    import threading

    notebook.run(MODULE)

    def interrupt() -> None:
        deadline = time.monotonic() + 120
        while not (tmp_path / "step-2").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        manager: Any = notebook.client.km
        os.kill(manager.provisioner.pid, 2)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
        notebook.run(SLOW)
    thread.join()
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
    assert "still here" in notebook.run("print('still here')")


def test_what_cant_be_sent_is_refused() -> None:
    import threading

    lock = threading.Lock()
    with pytest.raises(TypeError, match=r"<lambda> can't be sent to the ranks: .*Make what it needs inside of it"):
        launch(lambda: lock, devices=2)
    with pytest.raises(ValueError, match="devices takes a number of ranks"):
        launch(print, devices=0)
