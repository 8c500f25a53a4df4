"""Which tensors may be missing from a model's files, and which may be left over: as transformers allows it, by name."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn


class Allowances:
    """What a model and a directory need not have in common.

    Tensors that the model's class says are computed, or were stored once, are allowed. Where config.json names another
    class than the model's, the two have other heads: layers outside of the base model may be missing or left over.

    Args:
        model: a transformers model, or None.
        config: of the directory; empty where it has none.
        stored: names in the files.
        new_layers: names of layers that aren't taken from the files.
    """

    def __init__(
        self, model: Any, config: Mapping[str, Any], stored: Collection[str], new_layers: Sequence[str]
    ) -> None:
        self._new = tuple(new_layers)
        self._missing = compiled(getattr(model, "_keys_to_ignore_on_load_missing", None))
        self._obsolete = compiled({*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *moved(model)})
        saved_as = config.get("architectures") or ()
        self._other_head = model is not None and bool(saved_as) and type(model).__name__ not in saved_as
        prefix = f"{model.base_model_prefix}." if model is not None and model.base_model_prefix else ""
        # A base model's files have no prefix, and a base model has none to put before its names.
        self._is_base = not prefix or not hasattr(model, model.base_model_prefix)
        self._stored_prefix = prefix if any(name.startswith(prefix) for name in stored) else ""
        self._prefix = "" if self._is_base else prefix

    def is_new(self, name: str) -> bool:
        """Whether the user wants the layer to begin anew."""
        return any(name == layer or name.startswith(f"{layer}.") for layer in self._new)

    def may_miss(self, name: str, whole: bool) -> bool:
        """Whether the files need not hold a parameter or buffer.

        Args:
            name: of the model's.
            whole: whether they hold nothing of its layer.
        """
        is_head = self._other_head and bool(self._prefix) and not name.startswith(self._prefix)
        return self.is_new(name) or bool(self._missing and self._missing.search(name)) or (is_head and whole)

    def may_be_left(self, name: str) -> bool:
        """Whether the model need not have a place for a tensor, by the name that transformers gives it now."""
        is_head = self._other_head and bool(self._stored_prefix) and not name.startswith(self._stored_prefix)
        return self.is_new(name) or self.is_obsolete(name) or is_head

    def is_obsolete(self, name: str) -> bool:
        """Whether a tensor was stored once and is computed now."""
        return bool(self._obsolete and self._obsolete.search(name))


def moved(model: nn.Module | None) -> set[str]:
    """Patterns of buffers that nearly all models stored once."""
    buffers = [] if model is None else [name for name, _ in model.named_buffers()]
    rotary = any(name.endswith("rotary_emb.inv_freq") for name in buffers)
    positions = any(name.endswith("position_ids") for name in buffers)
    return {*([r"rotary_emb\.inv_freq"] * rotary), *([r"(^|\.)position_ids$"] * positions)}


def compiled(patterns: Collection[str] | None) -> re.Pattern[str] | None:
    """One pattern for all; None for none."""
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None
