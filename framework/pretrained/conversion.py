"""The names that transformers gives to tensors of a file, where a model's layers had others when it was written.

transformers' tables say which tensors were renamed, and which are put together or cut. What it does to whole tensors is
done here to parts of them; an operation that isn't plain is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .sources import Joined, Piece, Source, Stacked
from .stored import StoredTensor


def converted(
    stored: Mapping[str, StoredTensor], expected: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Source], dict[str, str]]:
    """Find where the tensors of a transformers model come from.

    Args:
        stored: the tensors of the files, by name.
        expected: the model's parameters and buffers by the names that transformers knows.
        model: a PreTrainedModel.

    Returns:
        The sources by the model's names; and what no name of the model's fits: name in the file to the name that
        transformers gives it now.

    Raises:
        ValueError: an operation can't be done to parts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    of_model: Any = model
    mapping = get_model_conversion_mapping(of_model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    shapes, prefix = dict(expected), of_model.base_model_prefix
    found: dict[str, Source] = {}
    parts: dict[str, dict[str, list[Source]]] = {}  # name in the model to (pattern to tensors in their order)
    unexpected: dict[str, str] = {}
    for name in sorted(stored, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, shapes)
        if renamed not in expected and name in expected:  # a tensor of today that an old pattern fits
            renamed, pattern = rename_source_key(name, [], [], prefix, shapes)
        if renamed not in expected:
            unexpected[name] = renamed
        elif pattern is None:
            found[renamed] = stored[name]
        else:
            parts.setdefault(renamed, {}).setdefault(pattern, []).append(stored[name])
    for name, held in parts.items():
        found |= put_together(name, held, by_pattern[next(iter(held))])
    return found, unexpected


def put_together(name: str, held: Mapping[str, Sequence[Source]], converter: Any) -> dict[str, Source]:
    """Do what a converter of transformers does, to parts.

    Args:
        name: what the (first) result is called in the model.
        held: the tensors of the file, by the converter's patterns.

    Raises:
        ValueError: names the operation that can't be done to parts.
    """
    from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist

    sources: dict[str, list[Source]] = {pattern: list(tensors) for pattern, tensors in held.items()}
    targets = converter.target_patterns
    for operation in converter.operations:
        if type(operation) is MergeModulelist and operation.dim == 0:
            only = targets[0] if len(sources) == 1 else ""
            sources = {only or pattern: [Stacked(tuple(members))] for pattern, members in sources.items()}
        elif type(operation) is Concatenate and len(targets) == 1:
            members = [each for pattern in converter.source_patterns for each in sources.get(pattern, ())]
            sources = {targets[0]: [Joined(tuple(members), operation.dim)]}
        elif type(operation) is Chunk and operation.num_shards_attribute is None and len(sources) == 1:
            (fused,) = next(iter(sources.values()))
            count, dim = len(targets), operation.dim
            sources = {target: [Piece(fused, dim, number, count)] for number, target in enumerate(targets)}
        else:
            raise ValueError(
                f"{name} is made of {next(iter(held.values()))[0].name} by {operation!r}, which can't be done to a "
                "part. Load the model whole, by from_pretrained, and give it to TrainModule.wrap."
            )
    before, _, after = name.partition(next((target for target in sources if target in name), name))
    if len(sources) == 1:
        return {name: next(iter(sources.values()))[0]}
    return {before + target + after: source for target, (source,) in sources.items()}
