"""Targets: the functions of a user's file that make the module and its data, named as ``train.py:build``."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch.utils.data import Dataset

from ..fields.argument_types import descriptions
from ..module import TrainModule

DATA = "data"  # the function beside the target that returns the data
PARITY_DATA = "parity_data"  # the same, for stratagem parity: few samples, the same at every call
DEFAULTS = "ARGUMENTS"  # the mapping beside the target that holds the program's own defaults
REQUIRED = inspect.Parameter.empty
GIVEN = (
    "module", "train_data", "eval_data", "data_collator", "callbacks", "compute_loss_func", "compute_metrics",
    "preprocess_logits_for_metrics", "module_init",
)  # fmt: skip
"""Arguments of Fit that a program alone can give: no file holds them."""


@dataclass(frozen=True)
class Target:
    """What makes the module and the data of a run.

    Attributes:
        name: "train.py:build" or "package.module:build"; empty where the functions can't be found by a name.
        build: returns a TrainModule, or a mapping of Fit's arguments.
        data: returns the training data, or (training data, evaluation data); None where ``build`` brings them.
        defaults: Fit's arguments where neither a file nor the command line has others.
    """

    name: str
    build: Callable[..., Any]
    data: Callable[..., Any] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def make(
        self, build_options: Mapping[str, Any], data_options: Mapping[str, Any], takes_data: bool = False
    ) -> dict[str, Any]:
        """Call the functions.

        Args:
            build_options: of ``build``.
            data_options: of ``data`` alone; a parameter that ``build`` has, too, gets the value that ``build`` got.
            takes_data: have the data be those of ``data`` also where ``build`` brings others.

        Returns:
            Arguments of Fit, those in GIVEN.

        Raises:
            TypeError: a function returned something else.
            ValueError: both functions, or none, give the training data.
        """
        made = self.build(**build_options)
        name = self.name or self.build.__qualname__
        if isinstance(made, TrainModule):
            found: dict[str, Any] = {"module": made}
        elif isinstance(made, Mapping):
            found = dict(made)
        else:
            raise TypeError(
                f"{name} returned a {type(made).__name__}. Return a TrainModule, or a mapping of Fit's arguments "
                f"({', '.join(GIVEN)})."
            )
        others = [given for given in found if given not in GIVEN]
        if others:
            raise TypeError(
                f"{name} returned {', '.join(map(repr, others))}, which a file or the command line gives. Write such "
                f"defaults beside the function: {DEFAULTS} = {{{others[0]!r}: ...}}. A function returns "
                f"{', '.join(GIVEN)}."
            )
        if self.data is not None and (takes_data or "train_data" not in found):
            shared = {key: value for key, value in build_options.items() if key in parameters_of(self.data)}
            data = self.data(**shared, **data_options)
            found["train_data"], held_out = parts_of(data)
            if held_out is not None:
                found.setdefault("eval_data", held_out)
        if found.get("train_data") is None:
            raise ValueError(
                f"{name} gives no training data. Write a function {DATA}() beside it, which returns them (or two: for "
                "training and evaluation), or have it return {'module': ..., 'train_data': ...}."
            )
        return found


def parts_of(data: Any) -> tuple[Any, Any]:
    """Tell training data from those to evaluate on, in what ``data`` returned; None where there are none of these.

    Raises:
        TypeError: there are more parts, or the parts are in a list, as random_split gives them.
    """
    if isinstance(data, list) and data and all(isinstance(each, Dataset) for each in data):
        raise TypeError(
            f"{DATA}() returned a list of {len(data)} datasets, and a list holds samples. Return a tuple: training "
            "data, and what to evaluate on."
        )
    if not isinstance(data, tuple):
        return data, None
    if len(data) != 2:
        raise TypeError(
            f"{DATA}() returned a tuple of {len(data)}. Return the training data, or two: those, and what to evaluate "
            "on, which may be a mapping of several by name."
        )
    return data


def load_target(name: str) -> Target:
    """Load what "path/to/file.py:function" or "package.module:function" names, and what stands beside it.

    Raises:
        ValueError: the name has another form, or there is nothing of that name.
        TypeError: what stands beside it is of another kind.
    """
    module, function = load_module(name)
    build = function_in(module, function, name)
    return target_of(name, build, getattr(module, DATA, None), getattr(module, DEFAULTS, {}))


def target_of(
    name: str, build: Callable[..., Any], data: Callable[..., Any] | None, defaults: Mapping[str, Any]
) -> Target:
    """Make a target of its parts.

    Raises:
        TypeError: a part is of another kind.
    """
    if data is not None and not callable(data):
        raise TypeError(f"{DATA} is called for the data of a run, and is a {type(data).__name__}. Make it a function.")
    if not isinstance(defaults, Mapping):
        raise TypeError(f"{DEFAULTS} holds Fit's arguments by name, not a {type(defaults).__name__}. Make it a dict.")
    return Target(name, build, data, defaults)


def name_of(function: Callable[..., Any]) -> str:
    """Return the name by which a function can be loaded, as ``load_target`` takes it; empty where it has none."""
    kept, path = function.__qualname__, inspect.getsourcefile(function)
    module = sys.modules.get(function.__module__)
    if getattr(module, kept, None) is not function:
        return ""
    if function.__module__ != "__main__":
        return f"{function.__module__}:{kept}"
    return f"{path}:{kept}" if path is not None and path.endswith(".py") else ""


def load_module_and_data(target: str, data: str = "") -> tuple[TrainModule, Any]:
    """Return the module and the training data that a target makes by its defaults, for ``stratagem parity``.

    Args:
        target: see ``load_module``.
        data: the function beside it that returns the data. Empty takes parity_data(), where there is one, else what
            ``stratagem fit`` takes.

    Raises:
        ValueError, TypeError: see ``Target.make``.
    """
    module, name = load_module(target)
    build = function_in(module, name, target)
    if not data and hasattr(module, PARITY_DATA):
        data = PARITY_DATA
    beside = function_in(module, data, target) if data else getattr(module, DATA, None)
    made = Target(target, build, beside).make({}, {}, takes_data=bool(data))
    return made["module"], made["train_data"]


def function_in(module: ModuleType, name: str, target: str) -> Callable[..., Any]:
    """Return a function of a module that was loaded for a target.

    Raises:
        ValueError: there is none of that name.
    """
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"{target.rpartition(':')[0]} has no function {name}().")
    return found


def load_module(target: str) -> tuple[ModuleType, str]:
    """Load the file or module of ``file.py:function`` or ``package.module:function``.

    Args:
        target: a file is run once, with its own folder first on the path, as if it were started.

    Returns:
        The module, and the name of the function.

    Raises:
        ValueError: the target has another form, or there is no such file.
    """
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise ValueError(f"Write path/to/file.py:function or package.module:function. Received: {target!r}")
    if place.endswith(".py"):
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            raise ValueError(f"There is no file {path}.")
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        loaded = sys.modules.get(path.stem)
        is_taken = loaded is not None and getattr(loaded, "__file__", None) != str(path)
        spec = importlib.util.spec_from_file_location(f"stratagem_target_{path.stem}" if is_taken else path.stem, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not place.startswith(error.name):
                raise
            raise ValueError(f"There is no module {error.name} ({target}); a file is named with its .py.") from error
    return module, name


def parameters_of(function: Callable[..., Any]) -> dict[str, tuple[Any, Any, str]]:
    """Return the parameters of a function or class that can be options: name to (type, default, description).

    The default is REQUIRED where there is none. Parameters without an annotation and without a default are left out.
    """
    # Of a class that has a __new__, too, as a Precision has, Python 3.10 would give the parameters of that.
    is_made = inspect.isclass(function) and function.__init__ is not object.__init__
    called = function.__init__ if is_made else function
    try:
        parameters = [*inspect.signature(called, eval_str=True).parameters.items()]
    except NameError:  # an annotation that stands under TYPE_CHECKING
        parameters = [*inspect.signature(called).parameters.items()]
    said = descriptions(function) if "Args:\n" in (inspect.getdoc(function) or "") else {}
    found = {}
    for name, parameter in parameters[1:] if is_made else parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            continue
        kind, default = parameter.annotation, parameter.default
        if kind is parameter.empty or isinstance(kind, str):
            kind = Any if default in (parameter.empty, None) else type(default)
        found[name] = (kind, default, said.get(name, ""))
    return found
