"""One sample of a Fit's data as a batch, read so that the run reads the same afterwards."""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from ..data.collating import Collate, collate, collation_of, convert
from ..data.whole_batches import WholeBatches, as_it_is, fetch_of


class NoSample(Exception):
    """No sample can be read without touching the run; the message is a sentence for a person."""


def one_sample(data: Any, workers: int, collator: Collate | None = None) -> Any:
    """Read the first sample of a dataset, and collate it alone. The caller keeps random states.

    Args:
        data: what Fit was given: a Dataset, a DataLoader over one, or several in a mapping.
        workers: of the run. Where there are any, a worker process reads the sample: the dataset may open files that
            processes must not share.
        collator: makes a batch of a list of samples; None takes torch's default, or the loader's own.

    Raises:
        NoSample: there is no data, or it can be read in one order alone.
    """
    if isinstance(data, Mapping):
        data = next(iter(data.values()), None)
    collation: Collate = collator or collate
    if isinstance(data, DataLoader):
        is_whole = data.batch_size is None and data.batch_sampler is None
        collation = convert if is_whole else collation_of(data, collator)
        workers, data = data.num_workers, data.dataset
    if data is None or isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        raise NoSample("shapes and FLOPs need a batch: fit.summary(batch=...)")
    if collation is collate and (fetch := fetch_of(data)) is not None:
        data, collation = WholeBatches(data, fetch), as_it_is
    loader: DataLoader[Any] = DataLoader(
        data, batch_sampler=[[0]], collate_fn=collation, num_workers=min(1, workers), pin_memory=False
    )
    try:
        return next(iter(loader))
    except Exception as error:
        raise NoSample(f"no sample could be read ({type(error).__name__}: {error}); fit.summary(batch=...)") from error
