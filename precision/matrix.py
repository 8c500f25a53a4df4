"""Which precision works under which strategy: one table, from which refusals, docs/precision.md and tests are made.

A row is a precision's name, a column is a ``Strategy.placement``. **A cell that a row doesn't name works**, and
``tests/distributed/test_precision_matrix.py`` shows it: it trains there to a falling loss, equal on all ranks.
A cell that a row names is refused when Fit is constructed; its text says why, and then what to write instead::

    "fp8-te": {"tp": "Transformer Engine's layers can't be cut by a plan; use precision='fp8', or strategy='fsdp2'"},

* A new precision: a line in ``registry.py`` and a row here, with the cells that can't work.
* A new strategy: an entry in ``PLACEMENTS``, and a cell in each row that can't work there.
* A precision or a strategy of a user's own is in no row or column, and is let through.
* What depends on more than the two (a device, an option) is refused where it is known, in ``Precision.set_up``.

``python -m stratagem.precision.page > docs/precision.md`` writes the page.
"""

from collections.abc import Mapping

# Column to what it is called with.
PLACEMENTS: Mapping[str, str] = {
    "single": 'strategy="single"',
    "dp": 'strategy="dp"',
    "ddp": 'strategy="ddp"',
    "fsdp1": 'strategy="fsdp1"',
    "fsdp2": 'strategy="fsdp2"',
    "tp": 'strategy="tp"',
    "fsdp2 x tp": "strategy=FSDP2(tensor_parallel=2)",
}

CUT_TE = (
    "Transformer Engine's layers can't be cut by a tensor_parallel_plan; use precision='fp8', whose layers can, or "
    "strategy='fsdp2' without tensor_parallel"
)
COPIED_TE = "Transformer Engine keeps one set of scales for a process; use strategy='ddp'"
SHARDED_APEX = (
    "apex.amp keeps whole float32 weights beside one whole model, and sees no overflow on other ranks' shards; use "
    "strategy='ddp', or precision='16-mixed', which does the same under every sharding"
)

MATRIX: Mapping[str, Mapping[str, str]] = {
    "32-true": {},
    "64-true": {},
    "bf16-mixed": {},
    "bf16-true": {},
    "16-mixed": {},
    "16-true": {},
    "fp8": {},
    "mxfp8": {},
    "fp8-te": {"dp": COPIED_TE, **dict.fromkeys(("tp", "fsdp2 x tp"), CUT_TE)},
    "apex-O1": dict.fromkeys(("dp", "fsdp1", "fsdp2", "tp", "fsdp2 x tp"), SHARDED_APEX),
    "apex-O2": dict.fromkeys(("dp", "fsdp1", "fsdp2", "tp", "fsdp2 x tp"), SHARDED_APEX),
}


def check_cell(precision: str, placement: str) -> None:
    """Refuse a precision under a strategy where the table has a reason.

    Raises:
        ValueError: names both, the reason and what works instead.
    """
    why = MATRIX.get(precision, {}).get(placement)
    if why is not None:
        called = PLACEMENTS.get(placement, f"strategy={placement!r}")
        raise ValueError(f"precision={precision!r} doesn't work with {called}: {why}.")
