"""The stream of a map-style dataset, which draws the order itself, so that a resume jumps to its position."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader, Dataset

from .. import random_state
from .lengths import LengthGroups
from .orders import COMPUTED, COMPUTED_FROM, DRAWN, ComputedOrder, Order, drawn_order, look_up
from .stand_in import StandIn
from .stream import DataStream, LoaderOptions, batch_seed, share
from .whole_batches import WholeBatches
from .worker_starts import WorkerStarts


class MapStream(DataStream):
    """Batches of a map-style dataset. A resume jumps to its position, and reads nothing to get there.

    Args:
        dataset: it has ``__getitem__`` and ``__len__``.
        options, seed, rank, size: see DataStream.
        groups: what orders samples by length; None draws samples one by one.

    Attributes:
        computes_order: whether the order is computed position by position, and not drawn; see ``orders.py``.
        computes_by_itself: whether it is so in a run that begins anew.
    """

    is_equal_on_ranks = True  # the lengths of the ranks' datasets were compared when the Fit was made

    def __init__(
        self,
        dataset: Dataset,
        options: LoaderOptions,
        seed: int,
        rank: int,
        size: int,
        groups: LengthGroups | None = None,
    ) -> None:
        super().__init__(options, seed, rank, size)
        self.groups = groups
        self.group_size = 0  # samples in a group of an epoch that is resumed; 0 takes the size of ``groups``
        self.dataset = dataset
        self.num_examples = len(dataset)  # type: ignore[arg-type]
        self.epoch_number = 0
        self.computes_order = self.computes_by_itself = self.num_examples >= COMPUTED_FROM
        # The random states of workers can't be saved, so each batch seeds its randomness there by its place in the
        # run. The training process goes on with the random state of the run, which is saved.
        self.seeds_batches = bool(options.workers.get("num_workers"))
        loaded = dataset if options.fetch is None else WholeBatches(dataset, options.fetch)
        self.epochs = ToldEpochs(dataset)
        restarts = self.seeds_batches and not options.workers.get("persistent_workers") and rank == 0
        self.starts = WorkerStarts(options.workers["num_workers"]) if restarts else None
        self.loader = DataLoader(
            SeededBatches(loaded, self.epochs) if self.seeds_batches else loaded,
            batch_sampler=_Requests(self),
            collate_fn=options.collate_fn,
            generator=torch.Generator(),  # drawing seeds for workers would change the random state of the run
            **options.workers,
        )

    def order(self, epoch: int) -> Order:
        """Return the order of an epoch."""
        samples = self.data_length()  # of which an epoch may take the first ones alone
        assert samples is not None
        if not self.options.shuffle:
            return lambda positions: positions
        order: Order
        if self.computes_order:
            order = ComputedOrder(samples, self.seed, epoch)
        else:
            order = drawn_order(samples, self.seed + epoch)
        if self.groups is None:
            return order
        return self.groups.order(order, self.group_size or self.groups.group_size, is_drawn=not self.computes_order)

    def indices(self, epoch: int, begin: int, end: int) -> Sequence[int]:
        """The samples at some positions of an epoch's order."""
        return self.order(epoch)(numpy.arange(begin, end)).tolist()

    def requests(self) -> Iterator[Any]:
        """Yield what the loader fetches: this rank's indices of each global micro-batch, with a seed where workers
        fetch.
        """
        total, step, epoch = self.num_examples, self.global_micro_batch, self.epoch_number
        assert total is not None
        starts = range(self.position, total - (step - 1 if self.options.drop_last else 0), step)
        mine = (self.own_part(range(start, min(start + step, total))) for start in starts)
        for start, indices in zip(starts, look_up(self.order(epoch), mine, self.options.batch_size), strict=True):
            found: Any = indices if self.options.fetch is not None else indices.tolist()
            yield (batch_seed(self.seed, epoch, start), self.epochs.last, found) if self.seeds_batches else found

    def own_part(self, positions: range) -> range:
        """This rank's part of the positions of a global micro-batch; the first position where it has none."""
        return share(positions, self.rank, self.size, self.options.batch_size) or positions[:1]  # type: ignore[return-value]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and which order it is in: drawn or computed, and with groups of what size."""
        state = {**super().state_dict(), "order": COMPUTED if self.computes_order else DRAWN}
        if self.groups is not None:
            state["group_size"] = self.group_size or self.groups.group_size
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the next ``epoch`` begin at the saved position, in the saved order, whatever an update holds now. One
        without a name is that of earlier versions, which drew all.
        """
        super().load_state_dict(state)
        self.computes_order = state.get("order", DRAWN) == COMPUTED
        self.group_size = state.get("group_size", 0)

    def begin_anew(self) -> None:
        """Have the next ``epoch`` begin at its beginning, in the order of a new run."""
        super().begin_anew()
        self.computes_order = self.computes_by_itself

    def begin_training_epoch(self, epoch: int) -> None:
        """Tell the dataset which epoch comes next, where it has a method ``set_epoch``; so do workers that stay."""
        self.epochs.tell(0 if self.repeats else epoch)

    def epoch(self, epoch: int) -> Iterator[Any]:
        """Yield this rank's micro-batches of one epoch."""
        if self.begin() == 0:
            self.group_size = 0
        self.epoch_number = epoch
        fetch, workers = self.options.fetch, self.options.workers
        if fetch is not None and not (workers.get("num_workers") or workers.get("pin_memory")):
            # A DataLoader would do no more than this, and takes longer for it than a small batch takes.
            return self._hand_out(fetch(self.dataset, indices) for indices in self.requests())
        return self._hand_out(iter(self.loader) if self.starts is None else self.starts.epoch(self.loader))

    def _hand_out(self, batches: Iterator[Any]) -> Iterator[Any]:
        total, step, rank = self.num_examples, self.global_micro_batch, self.rank
        assert total is not None
        for batch in batches:
            left = total - self.position
            self.position += min(step, left)
            # Samples are counted, not computed from indices: only in a short last micro-batch may a rank have none.
            yield batch if left >= step or rank * -(-left // self.size) < left else StandIn(batch)


class _Requests:
    """A batch sampler that asks the stream, so that one DataLoader, with its workers, serves all epochs."""

    def __init__(self, stream: MapStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        return self.stream.requests()

    def __len__(self) -> int:
        return len(self.stream)


class ToldEpochs:
    """Tells a dataset of epochs of training, each once in each process.

    Args:
        dataset: the user's.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.last: int | None = None

    def tell(self, epoch: int | None) -> None:
        """Call ``set_epoch`` where there is one, unless this epoch was told last. None is no epoch of training."""
        if epoch is not None and epoch != self.last and hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        self.last = epoch


class SeededBatches(Dataset):
    """A dataset, in a worker, that is asked for (seed, epoch, indices): random numbers drawn in ``__getitem__`` follow
    from the seed, and a worker that was there before the epoch began hears of it.
    """

    def __init__(self, dataset: Dataset, epochs: ToldEpochs) -> None:
        self.dataset, self.epochs = dataset, epochs

    def __getitems__(self, request: tuple[int, int | None, Any]) -> list[Any]:
        """Return the samples of one batch."""
        seed, epoch, indices = request
        self.epochs.tell(epoch)
        random_state.seed_worker(seed)
        fetch_all = getattr(self.dataset, "__getitems__", None)
        return fetch_all(indices) if fetch_all else [self.dataset[index] for index in indices]
