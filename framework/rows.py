"""The rows of all ranks within a loss: what ``TrainModule.gather`` does, and where it may be called."""

from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ..strategies.base import Strategy


class Rows:
    """Gathers rows of all data-parallel ranks while a loss is computed.

    Args:
        strategy: set up.

    Attributes:
        gathered: in the last loss, of a batch without items. Their backward sums what the other ranks' losses say of
            this rank's rows, so each rank must go through it.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.gathered: list[Tensor] = []
        self._contributes, self._has_items = True, True
        self._is_open = False

    def begin_batch(self, is_mine: bool, has_items: bool) -> None:
        """Note of the batch whose loss comes next whether it is this rank's own, and no stand-in for one, and whether
        it has items.
        """
        self._contributes, self._has_items, self.gathered = is_mine, has_items, []

    def open(self) -> None:
        """A loss begins."""
        self._is_open = True

    def close(self) -> None:
        """The loss is over."""
        self._is_open = False

    def gather(self, rows: Tensor, pad_to: int | None) -> Tensor | tuple[Tensor, Tensor]:
        """Gather rows; see ``TrainModule.gather``.

        Raises:
            ValueError, TypeError: it isn't called in a loss, or can't be done.
        """
        if not (self._is_open or torch.compiler.is_compiling()):
            raise outside_a_loss()
        if not isinstance(rows, Tensor) or not rows.ndim or hasattr(rows, "placements"):
            kind = f"of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else ""
            raise TypeError(
                f"gather() takes a plain tensor of shape (rows, ...). Received: {type(rows).__name__} {kind}"
            )
        if pad_to is not None and len(rows) > pad_to:
            raise ValueError(f"gather(pad_to={pad_to}) was given {len(rows)} rows. Pass the most that a rank can have.")
        found = self.strategy.gather_rows(rows, self._contributes, pad_to)
        if not self._has_items:
            self.gathered.append(found if isinstance(found, Tensor) else found[0])
        return found


ROWS: WeakKeyDictionary[nn.Module, ReferenceType[Rows]] = WeakKeyDictionary()
"""What gathers for each module of a Fit, as long as the Fit has it. The module doesn't hold it: modules are copied. A
strong reference in here would keep the module, its strategy and their process groups for ever."""


def make_rows(module: nn.Module, strategy: Strategy) -> Rows:
    """Make what gathers for a module; it does so as long as the caller keeps it."""
    rows = Rows(strategy)
    ROWS[module] = ref(rows)
    return rows


def rows_of(module: nn.Module) -> Rows:
    """Return what gathers for a module.

    Raises:
        ValueError: no Fit has it.
    """
    rows = ROWS[module]() if module in ROWS else None
    if rows is None:
        raise outside_a_loss()
    return rows


def outside_a_loss() -> ValueError:
    """Make the error for a call elsewhere."""
    return ValueError(
        "gather() is called in loss (or in a compute_loss_func), where all ranks are at the same place. In forward, or "
        "without a Fit, there are no others' rows: gather what forward returned."
    )
