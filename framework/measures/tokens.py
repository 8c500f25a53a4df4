"""Counting of input tokens, on the host, before a batch moves to the device."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..arguments import FitArguments
from ..data.stand_in import StandIn


class TokenCounter:
    """Counts the tokens of a batch's main input.

    Args:
        module: it names its main input as ``main_input_name`` (default "input_ids"), and may have a ``pad_token_id``
            (or a ``config`` with one).
        args: ``include_num_input_tokens_seen`` says which tokens count; with "no", ``include_tokens_per_second`` counts
            all.
        warns: warn where padding can't be told; one process does.
    """

    def __init__(self, module: nn.Module, args: FitArguments, warns: bool = True) -> None:
        self.warns = warns
        self.which = args.include_num_input_tokens_seen
        if self.which == "no" and args.include_tokens_per_second:
            self.which = "all"
        self.main_input = getattr(module, "main_input_name", "input_ids")
        config = getattr(module, "config", None)
        self.pad_token_id = getattr(module, "pad_token_id", getattr(config, "pad_token_id", None))

    def __call__(self, batch: Any) -> int:
        """Count the tokens of a batch: 0 where tokens aren't counted, and for a stand-in.

        Raises:
            ValueError: the batch has no main input.
        """
        if self.which == "no" or isinstance(batch, StandIn):
            return 0
        tokens = batch.get(self.main_input) if isinstance(batch, Mapping) else None
        if not isinstance(tokens, Tensor):
            keys = f"the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else "no keys"
            raise ValueError(
                f"Tokens are counted in the batch's {self.main_input!r}, and the batch has {keys}. "
                "Set main_input_name on your TrainModule, or include_num_input_tokens_seen='no'."
            )
        if self.which == "all":
            return tokens.numel()
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor):
            return int((mask.cpu().numpy() != 0).sum())
        if self.pad_token_id is not None:
            return int((tokens.cpu().numpy() != self.pad_token_id).sum())
        if self.warns:
            warnings.warn(
                "include_num_input_tokens_seen='non_padding' counts all tokens: the batch has no 'attention_mask' and "
                "the module no pad_token_id to tell padding by",
                stacklevel=2,
            )
        self.which = "all"
        return tokens.numel()
