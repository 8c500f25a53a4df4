"""What a run counts: the items that its losses are means over, by their name."""

from ..module import TrainModule


def name_of_items(module: TrainModule, items: int, samples: int) -> str:
    """Name what was counted, for a rate.

    Args:
        module: its ``item_name`` counts, where it isn't the default.
        items: that were counted by ``count_items``.
        samples: that were handed out for them.

    Returns:
        "samples" where items are samples, "labels" where a sample has several or none, or the module's own word.
    """
    if module.item_name != TrainModule.item_name:
        return module.item_name
    return module.item_name if items == samples else "labels"
