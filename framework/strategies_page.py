"""The page of docs/ with all strategies: ``python -m stratagem.framework.strategies_page`` prints it."""

import dataclasses
import inspect
import re
from typing import Any

from ..precision.names import class_at
from ..strategies.registry import STRATEGIES
from .fields.argument_types import descriptions

PAGE = """\
# Strategies

`Fit(strategy=...)` takes a word, or an instance with options. This page has every option of each; its tables are made
from the options' docstrings by `python -m stratagem.framework.strategies_page > docs/strategies.md`.

```python
from stratagem import Fit, TrainModule
from stratagem.strategies import DDP, DP, FSDP1, FSDP2, XLASPMD, Auto, DeepSpeed, Single, TensorParallel

fit = Fit(module, data, strategy="fsdp2", devices=2)
fit = Fit(module, data, strategy=FSDP2(replicas=2, reshard_after_forward=False), devices=2)
```

## Which one

| what you have | write |
| --- | --- |
| one device | `"single"` |
| several, and a model that fits on each with gradients and moments (16 bytes a parameter with AdamW) | `"ddp"` |
| a model that doesn't fit so | `"fsdp2"` |
| several machines with slow links between them | `FSDP2(replicas=number of machines)` |
| layers, or activations of one sample, too large for one device | `FSDP2(tensor_parallel=...)`, or `"tp"` |
| sequences too long for one device | `FSDP2(context_parallel=...)` |
| a ds_config.json, or optimizer states in host memory | `"deepspeed"` |
| TPUs | `"xla"` |
| any of these but the last two, and no wish to choose | `"auto"` |

`stratagem plan` says what fits where before there is a machine for it, and `strategy="auto"` chooses by that
([plan](plan.md)).

## What changing it changes

Where the ranks are, what they hold and what they send. Not your code, the samples of an update, the loss (one mean over
the update's items), nor the checkpoint, which every other strategy goes on from. Sums are made in another order, so
numbers differ by rounding. To see it for a module of yours:

```bash
stratagem parity train.py:build --strategies single,ddp,fsdp1,fsdp2 --ranks 2 --updates 2
```

trains it a few updates under each from one set of weights, and prints the largest difference in loss and gradient.
Where a module does depend on it (BatchNorm, losses over the batch), [limits](limits.md) says how.

`"ddp"`, `"fsdp1"`, `"fsdp2"`, `"tp"` and `"deepspeed"` need a process for each device: started by torchrun, srun or
mpirun, or by `Fit(devices=2)` itself ([clusters](clusters.md)). `"single"`, `"dp"` and `"xla"` have one process, and
refuse more.

## `"single"`: Single

{single}

## `"auto"`: Auto

{auto}

More in [plan](plan.md).

## `"ddp"`: DDP

{ddp}

## `"fsdp2"`, `"fsdp"`: FSDP2

{fsdp2}

The product of `replicas`, `tensor_parallel` and `context_parallel` divides the number of ranks; the rest shards. Sizes
that can't be are refused when ranks meet, with those that work.

## `"fsdp1"`: FSDP1

{fsdp1}

## `"tp"`: TensorParallel

{tp}

A module says by `tensor_parallel_plan()` how its layers are cut; there are plans for the decoders of transformers
([models](models.md)):

```python
class Block(TrainModule):
    def tensor_parallel_plan(self):
        return {{"up": "colwise", "down": "rowwise"}}
```

## `"dp"`: DP

{dp}

## `"deepspeed"`, `"deepspeed_stage_0"` to `"deepspeed_stage_3"`: DeepSpeed

{deepspeed}

More in [deepspeed](deepspeed.md).

## `"xla"`: XLASPMD

{xla}

More in [xla](xla.md).

## State of each

Tested on CPUs, with real ranks over gloo where there are several: `"single"`, `"ddp"`, `"fsdp1"`, `"fsdp2"`, `"tp"`,
`"deepspeed"`, and `"xla"` on a CPU as four devices. `"dp"` has run on one device alone: it needs two GPUs.
`"auto"` takes one of the others.
Which precisions each takes is in [precision](precision.md).
"""
NAMES = ("single", "auto", "ddp", "fsdp2", "fsdp1", "tp", "dp", "deepspeed", "xla")


def strategies_page() -> str:
    """Return a Markdown page with every strategy and a table of its options."""
    return PAGE.format(**{name: of_strategy(class_of(name)) for name in NAMES})


def class_of(name: str) -> type[Any]:
    """The class of a strategy, which may need a package that isn't installed before there can be an instance."""
    found: type[Any] = class_at(STRATEGIES[name][0], "stratagem.strategies")
    return found


def of_strategy(strategy: type[Any]) -> str:
    """What the docstring of a strategy says of it, and a table of its options."""
    said, _, example = inspect.cleandoc(strategy.__doc__ or "").partition("\n\nExample:\n")
    text = "\n\n".join(paragraph.replace("\n", " ") for paragraph in said.split("\n\n")).replace("``", "`")
    text = re.sub(rf" See {strategy.Options.__name__}\b[^.]*(\.md[^.]*)?\.", "", text.partition(": ")[2])
    example = example.strip().strip("`")
    return f"{text[0].upper()}{text[1:]}\n\n`{example}`\n\n{options_table(strategy.Options)}"


def options_table(options: type[Any]) -> str:
    """Return a Markdown table of the fields of a strategy's options: its own, then those that it shares with others."""
    fields = dataclasses.fields(options)
    if not fields:
        return "It has no options."
    said: dict[str, str] = {}
    for kind in reversed([kind for kind in options.__mro__ if "Args:" in (kind.__doc__ or "")]):
        said |= descriptions(kind)
    own = [field for field in fields if field.name in options.__annotations__]
    rows = []
    for field in [*own, *(field for field in fields if field not in own)]:
        what = said[field.name].replace("|", "\\|").replace("``", "`")
        rows.append(f"| `{field.name}` | `{field.default!r}` | {what} |")
    return "\n".join(["| option | default | what it does |", "| --- | --- | --- |", *rows])


if __name__ == "__main__":
    print(strategies_page(), end="")
