"""What pages leave to their reader: modules, data and files, by page; and what is done with what a page defines.

Each function here belongs to the page of its name. It puts what the page's blocks use into their names, yields while
they are run, and then uses what they have defined. On ranks that a block has started the files are there already.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from language_models import llama, text_rows
from stratagem import Fit, TrainModule
from tiny import parameters_of
from torch import Tensor, nn
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parents[2]
DOCUMENTS = ROOT / "docs"
Names = dict[str, Any]
PAGES: dict[str, Callable[[Names], Generator[None, None, None]]] = {}

# Python blocks that aren't run, by a part of each, and why.
NOT_RUN: dict[str, dict[str, str]] = {
    "README.md": {
        'FP8(recipe="rowwise")': "float8 units are a GPU's",
        '"s3://bucket': "a bucket is somebody's account",
    },
    "big_models.md": {"pretrain_large.py": "tests/examples runs that program"},
    "plan.md": {"stratagem plan": "Fit.plan_run in the same page does the same"},
    "record.md": {"watch output": "it watches until Ctrl-C; --once is run"},
    "clusters.md": {
        "": "tests/examples/test_clusters.py runs them all, under stand-ins for srun, mpirun and a real Ray"
    },
}


# Pages whose blocks run on two ranks, beginning with the first: they are run on the same two. Others that have a block
# for two ranks begin with what one process does.
ON_TWO_RANKS = ("big_models.md", "deepspeed.md", "models.md", "strategies.md")


class Line(TrainModule):
    """One linear layer, of batches with "x" and "y"."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 4)
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(outputs, batch["y"])


def lines(count: int = 16) -> dict[str, Tensor]:
    return {"x": torch.rand(count, 2), "y": torch.rand(count, 1), "weight": torch.ones(count, 1)}


def pairs(count: int, features: int = 2) -> TensorDataset:
    return TensorDataset(torch.rand(count, features), torch.rand(count, 1))


def language_model() -> Names:
    return {"module": TrainModule.wrap(llama()), "data": text_rows(16), "held_out": text_rows(8), "rows": text_rows(16)}


def of_page(function: Callable[[Names], Generator[None, None, None]]) -> Any:
    PAGES[f"{function.__name__}.md"] = function
    return function


@contextmanager
def stand_in(page: str, names: Names) -> Iterator[None]:
    """Gives a page's blocks their names, and afterwards uses what they have defined."""
    names.update(module=Line(), data=lines(), held_out=lines(8), train_data=lines())
    steps = PAGES[page](names) if page in PAGES else iter(())
    next(steps, None)
    yield
    next(steps, None)


def prepare(page: str) -> None:
    """Makes the files of a page."""
    if page in PAGES:
        next(PAGES[page]({"data": lines()}), None)


def blocks(page: str, language: str) -> list[str]:
    text = (DOCUMENTS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def is_first() -> bool:
    """Whether this process runs the page, and not a rank that the page has started."""
    return "RANK" not in os.environ


def trained(module: TrainModule, data: Any, **arguments: Any) -> Fit:
    fit = Fit(module, data, **{"max_steps": 2, "logging_steps": 1, "output_dir": "output/used", **arguments})
    fit.train()
    return fit


@of_page
def averages(names: Names) -> Generator[None, None, None]:
    names |= language_model()
    yield


@of_page
def big_models(names: Names) -> Generator[None, None, None]:
    sys.path.append(str(ROOT / "examples"))
    if is_first():
        llama().save_pretrained("path/of/a/model")
        Path("weights").mkdir()
    names |= language_model()
    yield


@of_page
def configuration(names: Names) -> Generator[None, None, None]:
    programs, files = blocks("configuration.md", "python"), blocks("configuration.md", "yaml")
    if is_first():
        Path("train.py").write_text(programs[0], encoding="utf-8")
        Path("run.yaml").write_text(files[0], encoding="utf-8")

    def sample(module: TrainModule, /, length: int = 3) -> str:
        return "x" * length

    names |= {"dataset": lines(32), "sample": sample}
    yield


@of_page
def data(names: Names) -> Generator[None, None, None]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1, "b": 2}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", model_max_length=8)
    fast.save_pretrained("path/of/a/model")
    tokenized = [{"input_ids": [1] * n, "labels": [1] * 4} for n in (4, 4, 4)]
    names |= {"model": llama(), "tokenized": tokenized}
    yield
    names["fit"].train()
    rows = names["Rows"]()
    rows.table = torch.rand(4, 2)
    assert rows[2]["x"].shape == (1, 2)


@of_page
def deepspeed(names: Names) -> Generator[None, None, None]:
    if is_first():
        shutil.copy(ROOT / "examples" / "ds_config.json", "ds_config.json")
    yield


@of_page
def converting(names: Names) -> Generator[None, None, None]:
    import torch.distributed.checkpoint as dcp

    module = Line()
    if is_first():
        weights = parameters_of(module)
        torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in weights.items()}}, "epoch=3.ckpt")
        trained(module, lines(), save_steps=2, output_dir="saved", report=False)
        Path("output").mkdir()
        Path("saved/checkpoint-2").rename("output/checkpoint-500")
        llama().save_pretrained("path/of/the/base")
        dcp.save(
            {f"model.{name}": tensor for name, tensor in llama().state_dict().items()},
            checkpoint_id="torchtitan/step-1000",
        )
    names |= {"rows": lines()}
    yield


@of_page
def faults(names: Names) -> Generator[None, None, None]:
    names |= {"data": lines(640)}
    names["fit"] = Fit(names["module"], names["data"], strategy="ddp", max_steps=2, output_dir="output/whole")
    yield


@of_page
def frozen(names: Names) -> Generator[None, None, None]:
    yield
    teacher = nn.Linear(2, 1)
    trained(names["Distilled"](nn.Linear(2, 1), teacher), lines())
    assert not teacher.weight.requires_grad


@of_page
def loggers(names: Names) -> Generator[None, None, None]:
    yield

    class Drawing(Line):
        last_logits = torch.rand(8)

        def draw(self) -> Tensor:
            return torch.rand(4, 4)

    heard = {"callbacks": [names["Samples"]()], "loggers": [names["Lines"]()]}
    with Fit(Drawing(), lines(), lines(8), eval_strategy="epoch", max_steps=2, logging_steps=1, **heard) as fit:
        fit.train()
    assert "'loss'" in Path("output/numbers.txt").read_text()


@of_page
def loop(names: Names) -> Generator[None, None, None]:
    yield

    class Tagged(names["Tagger"]):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(200, 200)

        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            return {"logits": self.embedding(input_ids), "penalty": self.embedding.weight.square().mean()}

    tokens = torch.arange(64).view(8, 8) + 80
    fit = trained(Tagged(), {"input_ids": tokens, "labels": tokens})
    assert "accuracy_of_rare" in fit.state.log_history[0]


@of_page
def losses_over_ranks(names: Names) -> Generator[None, None, None]:
    class Halves(TrainModule):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(2, 4), nn.Linear(2, 4)

        def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(left), self.right(right)

        def loss(self, outputs: Any, batch: Any) -> Tensor:
            return names["Towers"].loss(self, outputs, batch)

    names |= {"towers": Halves(), "pairs": {"left": torch.rand(32, 2), "right": torch.rand(32, 2)}}
    yield
    critic = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    names["penalty"](critic, torch.rand(3, 2)).backward()
    assert critic[0].weight.grad is not None


@of_page
def models(names: Names) -> Generator[None, None, None]:
    names |= {"rows": text_rows(16), "base": llama()}
    yield


@of_page
def overriding(names: Names) -> Generator[None, None, None]:
    yield
    curves = []
    for kind in ("Weighted", "Own", "Fit"):
        torch.manual_seed(0)
        fit = names[kind](Line(), lines(), max_steps=2, logging_steps=1, output_dir=f"output/{kind}", report=False)
        fit.train()
        curves.append(fit.state.log_history[0]["loss"])
    assert max(curves) - min(curves) < 1e-6


@of_page
def plan(names: Names) -> Generator[None, None, None]:
    if is_first():
        Path("examples").symlink_to(ROOT / "examples")
    shutil.copy(ROOT / "examples" / "gpt.py", "train.py")
    yield


@of_page
def README(names: Names) -> Generator[None, None, None]:
    names |= {"train": pairs(16), "held_out": pairs(8), "data": pairs(16)}
    yield


@of_page
def strategies(names: Names) -> Generator[None, None, None]:
    if is_first():
        Path("train.py").write_text(blocks("configuration.md", "python")[0], encoding="utf-8")
    yield


@of_page
def record(names: Names) -> Generator[None, None, None]:
    for name in ("first", "second"):
        trained(Line(), lines(), output_dir=f"output/{name}")
    yield


@of_page
def trying(names: Names) -> Generator[None, None, None]:
    names["fit"] = Fit(names["module"], lines(256), report=False)
    yield


@of_page
def turns(names: Names) -> Generator[None, None, None]:
    yield

    class Both(names["Own"], names["WGAN"]):
        pass

    trained(Both(), {"x": torch.randn(64, 64)}, max_steps=1)
