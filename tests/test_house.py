"""The rules of the house: which file may import which, who may write where, and how long a file and a function may be.

``python tests/test_house.py`` lists all that breaks a rule, with lines. There are no exceptions.
Imports inside functions and under TYPE_CHECKING count. Names in strings (a registry's "file:Class") don't: they cost no
import, and are how a registry knows a class without its file.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = "precision", "strategies", "framework", "testing"
FILE_LENGTH = 400
FUNCTION_LENGTH = 80

# The rooms of framework/, from the ground up. A room is a file at its top, or a folder ("run/"). A file imports from
# its own room and from those of lower floors, never from a neighbour on the same floor.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "__init__",
        "counters",
        "foreign_events",
        "labelling",
        "logged",
        "overriding",
        "pretrained/",
        "printing",
        "process_memory",
        "random_state",
        "replacing",
        "state",
        "version",
    ),
    ("agreement", "calling", "fields/", "rows", "wrapping"),
    ("in_run",),
    ("optim/",),
    ("arguments",),
    ("turns",),
    ("arguments_table", "callbacks", "data/", "loggers/", "module", "strategies_page"),
    ("combinations", "objective"),
    ("turn_objective",),
    ("measures/",),
    ("averaging", "builtin_callbacks", "checkpoint/"),
    ("display/", "predictions/", "ray", "record/", "switches/", "uploading", "watch/", "weights/"),
    ("configuration/", "run/"),
    ("members", "profiling/", "search/"),
    ("steps",),
    ("exchange", "first_checks", "rounds"),
    ("planning/",),
    ("loop",),
    ("runs",),
    ("rate_finding",),
    ("strategy_choice",),
    ("configured",),
    ("fit",),
    ("parity/",),
    ("commands/",),
    ("command_line",),
)

# What framework takes from the other two: what all strategies and all precisions have in common.
BASES: dict[str, str] = {
    "strategies/base.py": "what every strategy is",
    "strategies/batches.py": "where a batch's tensors are, for those who move it and those who count its items",
    "strategies/duplicates.py": "fingerprints of what several ranks hold alike, and a rank's part of it",
    "strategies/failures.py": "what ended a rank first",
    "strategies/local_parts.py": "this rank's part of a tensor",
    "strategies/materialize.py": "parameters without memory, for models that are made before they are placed",
    "strategies/joined_optimizer.py": "the optimizers of a module that is trained in turns, as one",
    "strategies/launch.py": "ranks that a program starts by itself",
    "strategies/played/__init__.py": "a rank that is played, without the others",
    "strategies/ranks.py": "what ranks tell each other",
    "strategies/registry.py": "a strategy by its name",
    "strategies/statuses.py": "what a process ends with",
    "precision/base.py": "what every precision is",
    "precision/complex_numbers.py": "complex tensors read as real ones",
    "precision/device_flag.py": "a yes or no that is computed on the device",
    "precision/frozen.py": "parts of a module that don't train, in whatever precision the run is",
    "precision/master_weights.py": "the name of one entry in an optimizer's saved state",
    "precision/names.py": "names in tables",
    "precision/quantized.py": "frozen weights in fewer bits, which belong to a model and not to a precision",
    "precision/registry.py": "a precision by its name",
}

# Who may import framework/fit.py.
DOORS = "framework/parity", "framework/commands", "framework/command_line.py", "__init__.py"

# Attributes of objects that aren't ours, and how they are meant to be set; and one object of ours that is meant to be
# written into by everybody. A pattern is matched with the target as it is written.
WRITTEN: dict[str, str] = {
    "control.should_*": "a Control is the slip of paper on which callbacks and the loop ask each other for things",
    "*.grad": "a parameter's gradient is set and dropped by its users",
    "*.grad_dtype": "the same, for its dtype",
    "*.data": "a parameter's storage is exchanged so: it stays the parameter that the optimizer knows",
    "*.requires_grad": "the way to freeze a parameter",
    "*.__class__": "a wrapped model and a sharded parameter stay the object that others hold",
    "layer.__dict__": "a layer that is given back as it was keeps its identity",
    "layer.forward": "a wrapper of one layer's forward, which torch looks up on the layer",
    "layer.train": "a frozen layer stays in evaluation, and torch looks its train up on the layer",
    "model.generation_config": "a transformers model keeps there how it generates, as its own from_pretrained has it",
    "tensor._is_hf_initialized": "transformers passes over tensors with this mark when it draws initial values",
    "layer.p": "torch's dropout has its probability there",
    "layer.dropout": "torch's recurrent layers have their dropout there",
    "setattr(layer, MODELS_FUNCTION)": "transformers' layers look there for their checkpointing function",
    "setattr(new, name)": "a new linear layer takes over all that was set on the old one",
    "setattr(part, name)": "a copy of a torchmetrics metric gets the merged states",
    "part._*": "the same copy forgets what it computed, as torchmetrics does after a sync",
    "part.sync_on_compute": "the same copy is merged already",
    "setattr(changed, name)": "a copy of a batch gets other values in its fields, whatever its class forbids its users",
    "part.state": "the parts of an optimizer in parts share its state",
    "layer.support_avx512bf16_for_cpu": "bitsandbytes asks its layer which product the CPU has",
    "optimizer.found_inf": "torch's fused optimizers look there whether to leave the parameters alone",
    "optimizer.step": "apex.amp finds its own step on the optimizer",
    "optimizer.param_groups": "a parameter that a strategy exchanged is exchanged in the optimizer",
    "torch.backends.*": "torch's settings are module attributes",
    "owner.fp32_precision": "one of torch's settings, on the back end that owns it",
    "torch_worker._worker_info": "a DataLoader's worker, as torch tells a data set of it",
    "loader.collate_fn": "a DataLoader's collating is exchanged where its workers collate",
    "ctx.*": "an autograd Function keeps what its backward needs on its context",
    "error.__traceback__": "an error that is kept lets go of the frames that hold the memory",
    "thing.__defaults__": "a function that holds a process group lets go of it",
    "read.__name__": "argparse names the type of an option by it",
    "PlainState.__*name__": "a subclass goes by the name of the optimizer that it stands for",
    "declared.metadata": "the type of a dataclass's field, beside the field, for who reads the class",
    "self.study.sampler": "Optuna's way to give a loaded study its sampler",
    "F.scaled_dot_product_attention": "context parallelism's attention, for the time of one forward",
    "nn.Module.register_parameter": "layers on the meta device, while they are made",
    "setattr(nn.init, OWN_LOOP)": "torch's truncated normal distribution, while late layers are recorded",
    "nn.functional.linear": "DeepSpeed put its own there; this puts torch's back",
    "setattr(torch.UntypedStorage, 'resize_')": "a plan's recording sees what changes the size of a storage",
    "setattr(_flat_param, name)": "FSDP1 compares addresses, which a played rank's tensors don't have",
    "setattr(zero, name)": "a played engine's hooks ask for numbers that nobody has",
    "setattr(owner, name)": "DeepSpeed's functions that ask other ranks, which a played rank doesn't have",
    "module.initial_values": "a played rank's late parameters have no values",
    "group.post_backward": "FSDP2's group of parameters, whose hook is told which of them had a gradient",
    "_FromTorchTensor.backward": "torch's gradient of a tensor that is spread, for the time of one forward",
    "state._pre_backward": "FSDP2's hook on a unit's outputs, told of the gradients that a forward itself computes",
    "DeepSpeedEngine._broadcast_model": "DeepSpeed's engine would send all parameters, which are alike, once more",
    "comm.cdb": "DeepSpeed's one global back end, which a later run makes anew",
    "setattr(backend, attribute)": "DeepSpeed's back end keeps torch's collectives, under names of the past",
    "zero.*": "DeepSpeed's ZeRO optimizer has no other way to clip by our norm",
    "self.zero.*": "the same optimizer, told that its state was read",
    "stream.epoch": "a fault for tests gets between a run and its data",
    "builtins.open": "a fault for tests gets between a run and its files",
    "io.open": "the same, as pathlib opens files",
    "setattr(groups, name)": "DeepSpeed's process groups are globals of its module",
}


@dataclass(frozen=True)
class Violation:
    """What breaks a rule, and where."""

    rule: str
    path: str
    what: str
    lines: tuple[int, ...] = ()
    why: str = ""

    def __str__(self) -> str:
        return f"{self.rule}: {self.path}: {self.what}"


@dataclass(frozen=True)
class File:
    """One file of the package, read."""

    root: Path
    path: str  # below the root

    @cached_property
    def text(self) -> str:
        return (self.root / self.path).read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @cached_property
    def room(self) -> str:
        """The room that a file of framework/ is in: "fit", "run/"."""
        _, first, *below = Path(self.path).with_suffix("").parts
        return f"{first}/" if below else first

    @cached_property
    def imports(self) -> dict[str, tuple[int, ...]]:
        """Every file of the package that this one imports, with the lines."""
        found: dict[str, list[int]] = defaultdict(list)
        for node in self.nodes:
            for name in self._imported(node):
                found[name].append(node.lineno)  # type: ignore[attr-defined]
        return {name: tuple(lines) for name, lines in sorted(found.items())}

    def _imported(self, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            modules = [(tuple(alias.name.split(".")), ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ("stratagem", *Path(self.path).parts[:-1])
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = (*above, *(node.module.split(".") if node.module else ()))
            modules = [(module, (alias.name,)) for alias in node.names]
        else:
            return
        for module, name in modules:
            if module[0] == "stratagem":
                file = self._file_of((*module[1:], *name)) or self._file_of(module[1:])
                yield file or f"nowhere: {'.'.join(module + name)}"

    def _file_of(self, parts: tuple[str, ...]) -> str | None:
        here = "/".join(parts)
        candidates = (f"{here}.py", f"{here}/__init__.py") if parts else ("__init__.py",)
        return next((path for path in candidates if (self.root / path).is_file()), None)


def files(root: Path) -> dict[str, File]:
    """Every file of the package."""
    found = [root / "__init__.py", *(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))]
    return {path: File(root, path) for path in sorted(str(each.relative_to(root)) for each in found)}


def circles(house: dict[str, File]) -> Iterator[Violation]:
    """Files that import themselves by way of others; a shortest way round is named."""
    # An import of framework/data/mapped.py from outside framework/data runs framework/data/__init__.py, too.
    ways = {path: set(file.imports) & set(house) for path, file in house.items()}
    for path, targets in ways.items():
        for target in list(targets):
            package = str(Path(target).parent / "__init__.py")
            if package in house and not path.startswith(package.removesuffix("__init__.py")):
                targets.add(package)
    for path in house:
        came_from: dict[str, str] = {}
        edge = [path]
        while edge and path not in came_from:
            edge = [
                target for here in edge for target in sorted(ways[here]) if came_from.setdefault(target, here) == here
            ]
            edge = list(dict.fromkeys(edge))
        if path in came_from:
            way = [path]
            while len(way) == 1 or way[-1] != path:
                way.append(came_from[way[-1]])
            yield Violation("circle", path, "imports itself", why=" -> ".join(reversed(way)))


def wrong_ways(house: dict[str, File]) -> Iterator[Violation]:
    """Imports that go up, or sideways, or past a base class."""
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    for path, file in house.items():
        folder = path.partition("/")[0]
        if folder == "framework" and file.room not in floor:
            yield Violation("room", path, "has no place in FLOORS", why="name its room there")
        for target, lines in file.imports.items():
            where = target.partition("/")[0]
            why = ""
            if target.startswith("nowhere"):
                why = "there is no such file"
            elif target == "framework/fit.py" and not path.startswith(DOORS):
                why = f"only {', '.join(DOORS)} may import it: take what you need as an argument"
            elif folder in FOLDERS and target == "__init__.py":
                why = "the root is the users' door"
            elif folder == "framework" == where:
                other = house[target].room
                if file.room != other and file.room in floor and other in floor and floor[other] >= floor[file.room]:
                    why = f"{other} isn't below {file.room} in FLOORS"
            elif folder == "framework" and where in FOLDERS and target not in BASES:
                why = f"framework takes only {', '.join(BASES)}: not one particular strategy or precision"
            elif folder in FOLDERS and where in FOLDERS and FOLDERS.index(where) > FOLDERS.index(folder):
                why = f"{folder} never knows {where}"
            if why:
                yield Violation("import", path, target, lines, why)


def writes(house: dict[str, File]) -> Iterator[Violation]:
    """Attributes that are set, or deleted, on another object than self and cls."""
    for path, file in house.items():
        found: dict[str, list[int]] = defaultdict(list)
        for node in file.nodes:
            target = _written(node)
            if target and not any(fnmatchcase(target, pattern) for pattern in WRITTEN):
                found[target].append(node.lineno)  # type: ignore[attr-defined]
        for target, lines in found.items():
            why = "let the object's own method do it; an attribute of a library's object gets a line in WRITTEN"
            yield Violation("write", path, target, tuple(lines), why)


def _written(node: ast.AST) -> str | None:
    owners = "self", "cls"
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
        return None if ast.unparse(node.value) in owners else ast.unparse(node)
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        if called.rpartition(".")[2].strip("_") in ("setattr", "delattr") and len(node.args) >= 2:
            owner, name = (ast.unparse(argument) for argument in node.args[:2])
            return None if owner in owners else f"setattr({owner}, {name})"
    return None


def long_ones(house: dict[str, File]) -> Iterator[Violation]:
    """Files and functions that a reader can't hold in mind."""
    for path, file in house.items():
        length = len(file.text.splitlines())
        if length > FILE_LENGTH:
            yield Violation("length", path, f"over {FILE_LENGTH} lines", (), f"{length} lines: it wants a second room")
        for node in file.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                # A docstring is the page about the function, not a part of what the reader holds in mind.
                documented = ast.get_docstring(node, clean=False) is not None
                start = (node.body[0].end_lineno or 0) if documented else node.lineno
                length = (node.end_lineno or node.lineno) - start
                if length > FUNCTION_LENGTH:
                    what = f"{node.name} is over {FUNCTION_LENGTH} lines"
                    yield Violation("length", path, what, (node.lineno,), f"{length} lines")


@cache
def violations(root: Path | None = None) -> list[Violation]:
    """All that breaks a rule, exceptions included."""
    house = files(root or ROOT)
    return [found for rule in (circles, wrong_ways, writes, long_ones) for found in rule(house)]


def report(found: Iterable[Violation]) -> str:
    """Say of each violation where it is and what would mend it."""
    return "\n".join(
        f"{each.path}:{','.join(map(str, each.lines)) or 1}: {each.rule}: {each.what} ({each.why})" for each in found
    )


def test_no_rule_is_broken() -> None:
    found = violations()
    assert not found, f"{len(found)} violations of the house's rules:\n{report(found)}"


def test_every_rule_finds_what_it_is_for(tmp_path: Path) -> None:
    """A house that breaks each rule once."""
    house = {
        "__init__.py": "",
        "precision/__init__.py": "",
        "precision/base.py": "def f():\n    from ..strategies import base\n",
        "strategies/__init__.py": "",
        "strategies/base.py": "from ..framework.state import TrainState\n",
        "strategies/ddp.py": "",
        "framework/__init__.py": "",
        "framework/fit.py": "",
        "framework/state.py": "def f(fit):\n    fit.args, fit.args.a = 1, 1\n    setattr(fit, 'x', 1)\n    del fit.y\n",
        "framework/module.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .fit import Fit\n",
        "framework/loop.py": "from stratagem.strategies.ddp import A\nfrom . import state\nfrom .data import stream\n",
        "framework/data/__init__.py": "from .stream import Stream\n",
        "framework/data/stream.py": "from ..loop import run\n",
        "framework/unheard.py": "def f():\n" + "    pass\n" * 90 + "\n" * 320,
        "framework/wrapping.py": "def f(self, p):\n    self.x = 1\n    p.grad = None\n",
    }
    for path, text in house.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    assert sorted(map(str, violations(tmp_path))) == [
        "circle: framework/data/__init__.py: imports itself",
        "circle: framework/data/stream.py: imports itself",
        "circle: framework/loop.py: imports itself",
        "import: framework/data/stream.py: framework/loop.py",
        "import: framework/loop.py: strategies/ddp.py",
        "import: framework/module.py: framework/fit.py",
        "import: precision/base.py: strategies/base.py",
        "import: strategies/base.py: framework/state.py",
        "length: framework/unheard.py: f is over 80 lines",
        "length: framework/unheard.py: over 400 lines",
        "room: framework/unheard.py: has no place in FLOORS",
        "write: framework/state.py: fit.args",
        "write: framework/state.py: fit.args.a",
        "write: framework/state.py: fit.y",
        "write: framework/state.py: setattr(fit, 'x')",
    ]


def test_every_folder_is_in_the_package() -> None:
    listed = set(re.findall(r'^    "(stratagem[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    found = {path.parent.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")}
    assert listed == {"stratagem", *(".".join(("stratagem", *folder.parts)) for folder in found)}


if __name__ == "__main__":
    broken = violations()
    print(report(broken))
    sys.exit(bool(broken))
