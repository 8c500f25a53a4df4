"""Which precision works under which strategy: one table, from which refusals, docs/precision.md and tests are made.

A row is a precision's name, a column is a ``Strategy.placement``. **A cell that a row doesn't name works**, and
``tests/distributed/test_precision_matrix.py`` shows it: it trains there to a falling loss, equal on all ranks.
A cell that a row names is refused when Fit is constructed; its text says why, and then what to write instead::

    "mine": {"tp": "its layers can't be cut by a plan. Use precision='32-true', or strategy='fsdp2'."},

* A new precision: a line in ``precision/registry.py`` and a row here, with the cells that can't work.
* A new strategy: an entry in ``PLACEMENTS``, and a cell in each row that can't work there.
* A precision or a strategy of a user's own is in no row or column, and is let through.
* What depends on more than the two is refused where that is known: a device in ``Precision.set_up``, an option of the
  format by ``Precision.refused_parameters`` and ``Precision.refused_arguments``.

``python -m stratagem.strategies.matrix_page > docs/precision.md`` writes the page.
"""

from collections.abc import Mapping

# Column to what it is called with.
PLACEMENTS: Mapping[str, str] = {
    "single": "strategy='single'",
    "dp": "strategy='dp'",
    "ddp": "strategy='ddp'",
    "fsdp1": "strategy='fsdp1'",
    "fsdp2": "strategy='fsdp2'",
    "tp": "strategy='tp'",
    "fsdp2 x tp": "strategy=FSDP2(tensor_parallel=2)",
    "deepspeed": "strategy='deepspeed'",
    "xla": "strategy='xla'",
}


def cells(why: str, *placements: str) -> Mapping[str, str]:
    """Give several cells one reason."""
    return dict.fromkeys(placements, why)


ZERO_MASTERS = "ZeRO steps float32 master weights of its own. Use precision='bf16-mixed', or '32-true'."
ZERO_SCALES = (
    "float16 by autocast never trains under ZeRO, which takes every scaled gradient for an overflow. Use "
    "precision='bf16-mixed', or '32-true'."
)
ZERO_UNSEEN = "layers of that kind haven't been seen to train under ZeRO. Use strategy='fsdp2'."
TE_CUT = (
    "Transformer Engine's layers aren't cut by a tensor_parallel_plan. Use precision='fp8', whose layers are, or "
    "strategy='fsdp2' without tensor_parallel."
)
TE_COPIES = "Transformer Engine keeps one set of scales for a process. Use strategy='ddp'."
APEX_WHOLE = (
    "apex.amp keeps whole float32 weights beside a whole model, and sees no overflow on other ranks' shards. Use "
    "strategy='ddp', or precision='16-mixed', which does the same under every sharding."
)
XLA_GRADIENTS = (
    "float32 gradients beside 16-bit parameters need torch 2.10, and torch_xla ends with torch 2.9. Use "
    "precision='bf16-mixed'."
)
XLA_SCALES = (
    "whether a step is skipped would be read from the device before each update. Use precision='bf16-mixed', which "
    "needs no loss scaling."
)
XLA_LAYERS = "its layers call kernels that torch_xla doesn't have. Use precision='bf16-mixed'."
APEX = cells(APEX_WHOLE, "dp", "fsdp1", "fsdp2", "tp", "fsdp2 x tp", "deepspeed", "xla")

MATRIX: Mapping[str, Mapping[str, str]] = {
    "32-true": {},
    "64-true": cells(ZERO_MASTERS, "deepspeed"),
    "bf16-mixed": {},
    "bf16-true": {**cells(ZERO_MASTERS, "deepspeed"), **cells(XLA_GRADIENTS, "xla")},
    "16-mixed": {**cells(ZERO_SCALES, "deepspeed"), **cells(XLA_SCALES, "xla")},
    "16-true": {**cells(ZERO_SCALES, "deepspeed"), **cells(XLA_SCALES, "xla")},
    "fp8": {**cells(ZERO_UNSEEN, "deepspeed"), **cells(XLA_LAYERS, "xla")},
    "mxfp8": {**cells(ZERO_UNSEEN, "deepspeed"), **cells(XLA_LAYERS, "xla")},
    "fp8-te": {
        **cells(TE_CUT, "tp", "fsdp2 x tp"),
        **cells(TE_COPIES, "dp"),
        **cells(ZERO_UNSEEN, "deepspeed"),
        **cells(XLA_LAYERS, "xla"),
    },
    "apex-O1": APEX,
    "apex-O2": APEX,
}


def check_cell(precision: str, placement: str) -> None:
    """Refuse a precision under a strategy where the table has a reason.

    Raises:
        ValueError: names both, the reason and what works instead.
    """
    why = MATRIX.get(precision, {}).get(placement)
    if why is not None:
        called = PLACEMENTS.get(placement, f"strategy={placement!r}")
        raise ValueError(f"precision={precision!r} under {called}: {why}")
