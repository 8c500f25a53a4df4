"""What a Fit shows of itself: a table of its module, and a few lines."""

from typing import TYPE_CHECKING, Any

from .describing import describe_fit

if TYPE_CHECKING:
    from .summary import Summary


class Shown:
    """A Fit, as far as it can be looked at."""

    def summary(self, depth: int = 2, batch: Any = None) -> "Summary":
        """Describe the module's layers in a table: type, parameters and how many of them are trained, shapes of what
        goes in and out, and the floating-point operations of a forward.

        Shapes and operations are found with a copy of the module, without memory where its forward allows; weights,
        buffers, modes, random states and the position in the data stay as they are, and no other rank is asked. Where
        they can't be found (a module that is sharded over ranks, a forward that fails), the table says why.

        Args:
            depth: layers inside of one another that are shown.
            batch: what forward is called with, as the data gives it, on the host. None takes one sample of
                ``train_data``, else of ``eval_data``.

        Example:
            >>> print(fit.summary(depth=1))
            layer      type       input   output  parameters  trainable  FLOPs
            ------------------------------------------------------------------
            Regressor  Regressor  [1, 3]  [1, 1]          21      100 %     32
            ...
        """
        from .summary import summarize

        return summarize(self, depth, batch)

    def __repr__(self) -> str:
        return describe_fit(self)
