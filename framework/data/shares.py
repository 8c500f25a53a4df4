"""The samples of an iterable dataset, shared among ranks and worker processes: each sample comes once, in one order.

Every rank reads the whole sequence and keeps its slice of each global micro-batch. With n worker processes, each worker
of a rank does so too, and worker w makes the batches of global micro-batches w, w + n, w + 2n, ... torch's DataLoader
takes a batch from each worker in turn, so that the order is the same as without workers.

A dataset may instead share its samples among the workers itself, with ``torch.utils.data.get_worker_info()``, as torch
documents it, which saves reading everything in every worker. Samples that are shared so must not be shared again. A
dataset that shares has to ask how many workers there are, before its first sample. get_worker_info returns a global
variable of the worker process, which is replaced here by one that notes what it is asked.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from .. import random_state
from .collating import Collate
from .stream import LoaderOptions, batch_seed, share

DECLARED = "shares_among_workers"
"""The attribute by which a dataset may say whether it shares its samples among workers: True or False."""


class Share(NamedTuple):
    """A rank's slice of a global micro-batch, on its way through the loader.

    Attributes:
        batch: samples, or the batch that they were collated into. Where the rank has no samples, one sample that
            doesn't count.
        seed: the seed of what collation draws at random.
        size: samples in the global micro-batch.
        is_mine: whether the slice isn't empty.
        sharing: how the workers share, see Shares.
    """

    batch: Any
    seed: int
    size: int
    is_mine: bool
    sharing: str


class Shares(IterableDataset):
    """Global micro-batches of an iterable dataset, cut to one rank's slice.

    ``sharing`` is "ours", "dataset" (the dataset shares its samples among the workers itself) or "unclear" (the dataset
    asked for the id of the worker but not for the number of workers: it may share by the id, or only seed by it, and
    is taken as "dataset").

    Args:
        dataset: the user's dataset.
        options: the batch size, and drop_last.
        seed, epoch: they decide what is drawn at random, the same in all workers and ranks, which need one order.
        rank, size: this rank among the data-parallel ranks.
        skip: samples over all ranks to leave out. Where the dataset shares its samples, none are left out here, since
            which samples of a worker were used depends on the other workers.
        end: samples over all ranks after which to end; None reads to the end. Where the dataset shares its samples, the
            reader ends by itself, for the same reason.
    """

    def __init__(
        self, dataset: IterableDataset, options: LoaderOptions, seed: int, epoch: int, rank: int, size: int, skip: int,
        end: int | None = None,
    ) -> None:  # fmt: skip
        self.dataset = dataset
        self.batch_size = options.batch_size
        self.drop_last = options.drop_last
        self.seed = seed
        self.epoch = epoch
        self.rank = rank
        self.size = size
        self.skip = skip
        self.end = end

    def __iter__(self) -> Iterator[Share]:
        own = random_state.OwnRandomState(batch_seed(self.seed, self.epoch, 0))
        asking = get_worker_info()
        with own.entered():
            samples = iter(self.dataset)
            if asking is None:
                sharing, index, workers = "ours", 0, 1
            else:
                assert isinstance(asking, AskedInfo)
                first = list(itertools.islice(samples, 1))
                samples = itertools.chain(first, samples)
                sharing, index, workers = asking.sharing(), asking.info.id, asking.info.num_workers
            if sharing == "ours":
                samples = itertools.islice(samples, self.end)
                for _ in itertools.islice(samples, self.skip):
                    pass
                return self.cut(samples, own, self.skip, index, workers)
        # The order is settled. Random numbers drawn from here on, to vary samples, are each worker's own.
        own = random_state.OwnRandomState(batch_seed(self.seed, self.epoch, 1 + index))
        return (part._replace(sharing=sharing) for part in self.cut(samples, own, 0, 0, 1, of_worker=1 + index))

    def cut(
        self,
        samples: Iterator[Any],
        own: random_state.OwnRandomState,
        position: int,
        index: int,
        workers: int,
        of_worker: int = 0,
    ) -> Iterator[Share]:
        """Yield this rank's slice of every global micro-batch from ``index`` on, in steps of ``workers``.

        Args:
            samples: the samples from ``position`` on.
            own: the random state to read the samples in.
            position: the number of samples before these.
            index, workers: this worker, and the number of workers.
            of_worker: a number that differs between workers whose batches have the same position.
        """
        step = self.batch_size * self.size
        for number in itertools.count():
            with own.entered():
                chunk = list(itertools.islice(samples, step))
            if not chunk or (len(chunk) < step and self.drop_last):
                return
            if number % workers == index:
                mine = share(chunk, self.rank, self.size, self.batch_size)
                seed = batch_seed(self.seed, self.epoch, position + (of_worker << 40))
                yield Share(list(mine or chunk[:1]), seed, len(chunk), bool(mine), "ours")
            position += len(chunk)
            self.check_asked_early()

    def check_asked_early(self) -> None:
        """Refuse a dataset that begins to share its samples after this object has shared some.

        Raises:
            RuntimeError: the dataset asked for the number of workers after its first sample.
        """
        asking = get_worker_info()
        if isinstance(asking, AskedInfo) and asking.answered == "ours" and asking.sharing() != "ours":
            raise RuntimeError(
                f"{type(self.dataset).__name__} asked get_worker_info() about its worker only after its first sample, "
                "when its samples were being shared among the workers already. Set "
                f"{DECLARED} = True on the dataset if it shares its samples among workers by itself, else False."
            )


class AskedInfo:
    """What ``get_worker_info()`` returns inside a worker: torch's WorkerInfo, and a note of what was asked.

    Args:
        info: torch's WorkerInfo.
    """

    def __init__(self, info: Any) -> None:
        self.info = info
        self.dataset = info.dataset.dataset  # the user's dataset, which a worker_init_fn may cut
        self.seed = info.seed
        self.asked: set[str] = set()
        self.answered = ""

    @property
    def id(self) -> int:
        """The number of the worker."""
        self.asked.add("id")
        return self.info.id

    @property
    def num_workers(self) -> int:
        """The number of workers."""
        self.asked.add("num_workers")
        return self.info.num_workers

    def sharing(self) -> str:
        """How the workers share, as far as what was asked tells it; see Shares."""
        declared = getattr(self.dataset, DECLARED, None)
        if declared is not None:
            answer = "dataset" if declared else "ours"
        elif "num_workers" in self.asked:
            answer = "dataset"
        else:
            answer = "unclear" if "id" in self.asked else "ours"
        self.answered = self.answered or answer
        return answer


class BeginWorker:
    """Prepares a worker process so that what the dataset asks about workers is noted.

    Args:
        worker_init_fn: the user's function, which is called next.
    """

    def __init__(self, worker_init_fn: Any = None) -> None:
        self.worker_init_fn = worker_init_fn

    def __call__(self, worker_id: int) -> None:
        """Prepare the worker; torch calls this there before anything is read."""
        torch_worker._worker_info = AskedInfo(get_worker_info())  # type: ignore[assignment]
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker_id)


class CollateShare:
    """Collates the samples of a share. Random numbers drawn for it follow from the place of the batch in the epoch:
    they are the same after a resume, and don't change the order in which the dataset is read.
    """

    def __init__(self, collate_fn: Collate) -> None:
        self.collate_fn = collate_fn

    def __call__(self, item: Share) -> Share:
        """Return the share with its samples collated into a batch."""
        with random_state.OwnRandomState(item.seed).entered():
            return item._replace(batch=self.collate_fn(item.batch))
