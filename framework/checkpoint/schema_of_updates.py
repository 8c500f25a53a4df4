"""The schema of what ends updates, in state.json: which of them were left out, and the turns of a module."""

from typing import Annotated, Any

from msgspec import Meta, Struct

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]


class Spikes(Struct):
    """The running mean and variance of the gradients' norm."""

    count: Count
    mean: Annotated[float, Meta(ge=0.0)]
    variance: Annotated[float, Meta(ge=0.0)]


class Transaction(Struct):
    """The updates that weren't made last, one after the other, and what tells a spike."""

    in_a_row: Count
    began: str
    spikes: Spikes | None


class SteppingOfTurn(Struct):
    """What ends the updates of a turn: its optimizer's name, its schedule, and how often it was left out."""

    optim: str
    transaction: Transaction
    scheduler: dict[str, Any]
    skipped: Count
    skipped_rounds: Count


class TurnsOfRun(Struct):
    """The turns of the module: the batches of a round, and each turn by its name."""

    batches: Positive
    steppings: dict[str, SteppingOfTurn]
