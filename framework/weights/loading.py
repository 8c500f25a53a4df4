"""Weights of any format for a placed module: each rank reads the parts that it holds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...strategies.base import Strategy
from ..agreement import on_all_ranks
from ..checkpoint.contents import masters_of, untied_state
from ..checkpoint.frozen import check_frozen, leave_out, left_out
from ..checkpoint.matching import are_of_one_kind
from ..checkpoint.schema import read_state
from ..checkpoint.shards import Parts
from ..pretrained.allowances import Allowances
from ..pretrained.conversion import converted
from ..pretrained.directory import read_config
from ..pretrained.sources import Source as AnySource
from ..pretrained.weights import transformers_model
from .names import renamed
from .opening import open_weights
from .sources import StoredWeights, some


class LoadedWeights(NamedTuple):
    """What didn't match where weights were loaded, under the names that torch's ``load_state_dict`` gives them.

    Attributes:
        missing_keys: parameters and buffers of the module that weren't there, and stay as they were.
        unexpected_keys: tensors that were there, and the module has no place for.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclass(frozen=True)
class Match:
    """Which stored tensor is which of the module's.

    Attributes:
        sources: by the module's names; several where a tied parameter is stored under more than one name.
        missing, unexpected: names that are on one side alone.
        problems: differences in shape or kind of number, in words.
    """

    sources: Mapping[str, Sequence[AnySource]]
    missing: list[str]
    unexpected: list[str]
    problems: list[str]


def load_weights(
    strategy: Strategy, path: Path, strict: bool = True, rename: Sequence[str] = (), key: str | None = None
) -> LoadedWeights:
    """Load the parameters and buffers of a placed module. Nothing is changed before names and shapes fit. Collective.

    Args:
        strategy: it holds the placed module.
        path: of a file or a directory, in any of the formats of ``open_weights``.
        strict: refuse weights that lack a name of the module's, or have others.
        rename: see ``convert``.
        key: see ``convert``.

    Raises:
        ValueError: on every rank; names what is missing, unexpected, of another shape, or can't be read.
    """
    found: list[tuple[StoredWeights, Match]] = []
    aliases, quantized = strategy.tied_names(), left_out(strategy, only_trainable=False)
    whole = untied_state(strategy)
    model = leave_out(whole, quantized)

    def open_and_match() -> None:
        stored = renamed(open_weights(path, key, strategy.rank, strategy.world_size), rename)
        matched = match(strategy, stored, model, aliases)
        matched.unexpected.extend(name for name in stored.frozen if name not in whole)
        check(path, matched, strict)
        found.append((stored, matched))

    on_all_ranks(strategy, open_and_match, ValueError)
    stored, matched = found[0]
    if stored.format == "checkpoint" and strict and stored.frozen:
        check_frozen(path, strategy, whole, read_state(path)["frozen"])
    loaded = {name: model[name] for name in matched.sources}
    with masters_of(strategy, loaded) as masters:
        on_all_ranks(strategy, lambda: read(path, matched.sources, loaded, masters), ValueError)
        strategy.load_model_state(loaded)
    return LoadedWeights(matched.missing, matched.unexpected)


def match(strategy: Strategy, stored: StoredWeights, model: Mapping[str, Tensor], aliases: Mapping[str, str]) -> Match:
    """Find out which stored tensor is which of the module's.

    Args:
        strategy: it holds the placed module.
        stored: what a file holds.
        model: the module's tensors, tied ones once.
        aliases: further names of tied parameters to the first.
    """
    names = {**dict.fromkeys(model), **dict.fromkeys(aliases)}
    everything: dict[str, AnySource] = dict(stored.tensors)
    everything |= {name: stored.tensors[first] for name, first in stored.tied.items()}
    transformer, computed = transformers_model(strategy.module), set[str]()
    if transformer is strategy.module and transformer is not None:  # its layers may have had other names once
        shapes = {name: model[aliases.get(name, name)] for name in names}
        result, others = converted(everything, shapes, transformer)  # type: ignore[arg-type]
        config = read_config(stored.path) if stored.format == "transformers" else {}
        allowed = Allowances(transformer, config, everything, ())
        unexpected = [name for name, now in others.items() if not allowed.is_obsolete(now)]
        computed = {name for name in model if allowed.may_miss(name, whole=False)}
    else:
        result = {name: source for name, source in everything.items() if name in names}
        unexpected = [name for name in everything if name not in names]
    sources: dict[str, list[AnySource]] = {}
    for name, source in result.items():
        held = sources.setdefault(aliases.get(name, name), [])
        if not any(source is other for other in held):
            held.append(source)
    given = {*sources, *stored.frozen, *computed}
    problems = [said for name, held in sources.items() for source in held for said in differences(name, model, source)]
    return Match(sources, [name for name in model if name not in given], unexpected, problems)


def differences(name: str, model: Mapping[str, Tensor], source: AnySource) -> Iterator[str]:
    """Say in what a stored tensor can't be the module's."""
    own, shape = model[name], tuple(source.shape)
    if shape != tuple(own.shape):
        yield f"{name} has the shape {tuple(own.shape)} in the module and {shape} in the file"
    dtype = getattr(source, "dtype", own.dtype)
    if not are_of_one_kind(dtype, own.dtype):
        yield f"{name} is of {own.dtype} in the module and of {dtype} in the file"


def check(path: Path, found: Match, strict: bool) -> None:
    """Refuse weights that don't fit.

    Raises:
        ValueError: lists what doesn't, and says what to do.
    """
    said = []
    if strict and found.missing:
        said.append(f"the file lacks {some(found.missing, 20)}")
    if strict and found.unexpected:
        said.append(f"the module has no {some(found.unexpected, 20)}")
    said += found.problems[:20]
    if not said and found.sources:
        return
    if not said:
        said.append("not one name is the module's")
    advice = hint(found)
    if not advice and strict and not found.problems:
        advice = " Write strict=False to load what fits; what is missing then stays as it is."
    raise ValueError(f"{path} doesn't fit the module: {'; '.join(said)}.{advice}")


def hint(found: Match) -> str:
    """Say which prefix makes the names fit; "" where none does."""
    missing = set(found.missing)
    for name in found.unexpected[:1]:
        for other in sorted(missing):
            if name.endswith(f".{other}"):
                prefix = name.removesuffix(other)
                if {each.removeprefix(prefix) for each in found.unexpected} >= missing:
                    return f' The names differ by a prefix: write rename=["{prefix}*=*"].'
            if other.endswith(f".{name}"):
                prefix = other.removesuffix(name)
                if {prefix + each for each in found.unexpected} >= missing:
                    return f' The names differ by a prefix: write rename=["*={prefix}*"].'
    return ""


@torch.no_grad()
def read(
    path: Path,
    sources: Mapping[str, Sequence[AnySource]],
    model: Mapping[str, Tensor],
    masters: Mapping[str, Tensor],
) -> None:
    """Read this rank's parts into the module's tensors, in place. Not collective.

    Raises:
        ValueError: a tied parameter is stored twice, with different numbers.
    """
    parts = Parts()
    for name, held in sources.items():
        for tensor, begin in places(parts, name, model, masters):
            part = tuple(slice(b, b + n) for b, n in zip(begin, tensor.shape, strict=True))
            values = held[0].read(part)
            for other in held[1:]:
                if not torch.equal(values, other.read(part)):
                    raise ValueError(
                        f"{path} holds {held[0].name} and {other.name} with different numbers, which the module ties."
                    )
            tensor.copy_(values)
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)


def places(
    parts: Parts, name: str, model: Mapping[str, Tensor], masters: Mapping[str, Tensor]
) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Yield what this rank holds of a parameter and of its master weight, and where each begins in the whole."""
    for tensors in (model, masters):
        if name in tensors:
            part = parts.of(name, tensors[name])
            if part.tensor.numel():
                yield part.tensor, part.begin
