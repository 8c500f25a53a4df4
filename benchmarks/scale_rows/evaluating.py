"""Row: evaluating, a batch at a time, beside the same loop written down."""

import torch

from ...framework.module import IGNORED_LABEL
from .measuring import measuring
from .predicting import BATCHES, Classifier, loader, ours

TITLE = "A batch of fit.evaluate: 1,000 batches of 64 with labels"
ROUNDS = 5
LIMIT = "by hand"


def stratagem() -> dict[str, float]:
    """``fit.evaluate``."""
    return ours(True, lambda fit, data: fit.evaluate(data))


def by_hand() -> dict[str, float]:
    """The mean loss over all samples, added up on the device."""
    module, data = Classifier().eval(), loader(True)
    with measuring(BATCHES) as figures, torch.no_grad():
        total, count = torch.zeros((), dtype=torch.float64), 0
        for batch in data:
            items = int((batch["labels"] != IGNORED_LABEL).sum())  # the loss is a mean over these
            total += module.loss(module(batch["x"]), batch).double() * items
            count += items
        float(total / count)
    return figures


CONTESTANTS = {"stratagem": stratagem, "by hand": by_hand}
