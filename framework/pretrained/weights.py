"""The weights of one model: which tensor of a directory is which parameter, what is missing, and the parts of each."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import file_names
from .allowances import Allowances
from .conversion import converted
from .directory import read_config, stored_tensors
from .sources import Source
from .stored import Part

MOST_NAMED = 8  # tensors in an error


@dataclass(frozen=True)
class Weights:
    """Where a model's parameters come from.

    Attributes:
        directory: the one that holds the files.
        sources: the model's parameters, by name; one that the model ties under several names may have several sources,
            which must hold the same numbers.
        dtypes: what each parameter was made in, to which its values are rounded first, as transformers would have it.
        made: names of parameters that the files don't hold.
        left_out: names of tensors in the files that the model has no place for.
    """

    directory: Path
    sources: Mapping[str, tuple[Source, ...]]
    dtypes: Mapping[str, torch.dtype]
    made: tuple[str, ...] = ()
    left_out: tuple[str, ...] = field(default=())

    def values(self, name: str, part: Part) -> Tensor | None:
        """Read a part of a parameter; None where the files don't hold it.

        Raises:
            ValueError: the parameter is tied, and the files hold it twice with other numbers.
        """
        held = self.sources.get(name)
        if held is None:
            return None
        values = held[0].read(part)
        for other in held[1:]:
            if not torch.equal(values, other.read(part)):
                raise ValueError(
                    f"{self.directory} holds {held[0].name} and {other.name} with different numbers, and the model's "
                    "configuration ties them. Write tie_word_embeddings=False in it, or save the model again."
                )
        return values.to(self.dtypes[name])

    def __str__(self) -> str:
        """What isn't as it is in the files, in one line; "" where all is."""
        said = []
        if self.made:
            said.append(f"{some(layers_of(self.made))} not in the files and initialised")
        if self.left_out:
            said.append(f"{some(layers_of(self.left_out))} in the files and left out")
        return f"{self.directory}: {'; '.join(said)}." if said else ""


def find_weights(root: nn.Module, directory: Path, new_layers: Sequence[str]) -> Weights:
    """Match a model with the tensors of a directory, and read the buffers among them. Only headers are read of the
    rest.

    Args:
        root: with parameters on the meta device, and buffers that aren't.
        directory: with safetensors files.
        new_layers: names of layers that aren't taken from the files.

    Raises:
        ValueError: names tensors that are missing, unexpected, or of another shape.
    """
    model = transformers_model(root)
    late = {name: p for name, p in root.named_parameters(remove_duplicate=False) if p.is_meta}
    buffers = dict(persistent_buffers(root))
    names: dict[str, list[str]] = {}  # name in the files to those in the model: peft keeps a copy of some layers
    for name in (*late, *buffers):
        names.setdefault(file_names(root, name), []).append(name)
    of_model: dict[str, Tensor] = {**late, **buffers}
    expected = {stored: of_model[own[0]] for stored, own in names.items()}
    stored = stored_tensors(directory)
    found: Mapping[str, Source]
    if model is None:
        found = {name: tensor for name, tensor in stored.items() if name in expected}
        unexpected = {name: name for name in stored.keys() - expected.keys()}
    else:
        found, unexpected = converted(stored, expected, model)
    allowed = Allowances(model, read_config(directory), stored, new_layers)
    found = {name: source for name, source in found.items() if not allowed.is_new(name)}
    tied: dict[int, list[str]] = {}
    for name in expected:
        tied.setdefault(id(expected[name]), []).append(name)
    held = {name: tuple(found[n] for n in tied[id(expected[name])] if n in found) for name in expected}
    missing = [name for name in expected if not held[name]]
    layers_held = {name.rpartition(".")[0] for name in expected if held[name]}
    check(
        directory,
        missing=[n for n in missing if not allowed.may_miss(n, whole=n.rpartition(".")[0] not in layers_held)],
        unexpected=[n for n, renamed in unexpected.items() if not allowed.may_be_left(renamed)],
        shapes={name: (source, expected[name].shape) for name, source in found.items()},
    )
    for name, buffer in buffers.items():
        for source in held[file_names(root, name)][:1]:
            buffer.copy_(source.read(everything(source)))
    return Weights(
        directory,
        {name: held[file_names(root, name)] for name in late if held[file_names(root, name)]},
        {name: parameter.dtype for name, parameter in late.items()},
        tuple(name for name in missing if any(own in late for own in names[name])),
        tuple(sorted(name for name, renamed in unexpected.items() if not allowed.is_obsolete(renamed))),
    )


def everything(source: Source) -> Part:
    """The part that is all of a source."""
    return tuple(slice(0, size) for size in source.shape)


def transformers_model(root: Any) -> nn.Module | None:
    """The transformers model that the weights are of: the module itself, or the one that a peft model is around; None
    for a module of another kind.
    """
    model = root.get_base_model() if getattr(root, "peft_config", None) else root
    return model if hasattr(model, "base_model_prefix") else None


def persistent_buffers(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that are saved, by name."""
    for prefix, layer in root.named_modules():
        for key, buffer in layer.named_buffers(prefix, recurse=False):
            if key.rpartition(".")[2] not in layer._non_persistent_buffers_set:
                yield key, buffer


def check(
    directory: Path,
    missing: Sequence[str],
    unexpected: Sequence[str],
    shapes: Mapping[str, tuple[Source, tuple[int, ...]]],
) -> None:
    """Refuse files that don't fit the model.

    Raises:
        ValueError: names the tensors, with both shapes where these differ.
    """
    differ = [
        f"{name} has the shape {tuple(shape)} in the model and {source.shape} in the files ({source.name})"
        for name, (source, shape) in shapes.items()
        if tuple(shape) != source.shape
    ]
    problems = []
    if missing:
        problems.append(f"{some(missing)} of the model, which the files don't hold")
    if unexpected:
        problems.append(f"{some(unexpected)} of the files, which the model has no place for")
    problems += differ[:MOST_NAMED]
    if problems:
        raise ValueError(
            f"The weights in {directory} aren't this model's: {'; '.join(problems)}. Give the configuration that they "
            "were saved with; layers that are to begin anew are named in TrainModule.wrap(..., new_layers=[...])."
        )


def some(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def layers_of(names: Sequence[str]) -> list[str]:
    """The layers that own tensors, once each."""
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
