"""The stream of an iterable dataset that gives each rank, and each of a rank's workers, a part of its samples.

Where every rank reads the whole sequence and keeps its slice, n ranks read everything n times. A dataset that has a
method ``shard(num_shards, index)``, which returns the dataset of one part, as ``datasets.IterableDataset`` does, and
says ``shares_among_ranks = True``, is read once: there are as many parts as ranks times workers, and worker w of rank r
has part r * workers + w. It has to be said, since the samples of an update then depend on the number of ranks.

The parts may have different numbers of samples. For every 8 micro-batches the ranks exchange how many samples each of
them has, so all end together: one whose part has ended goes on with stand-ins, which count nothing, until the last has.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from ...strategies.base import Strategy
from .. import random_state
from .collating import Collate
from .stand_in import StandIn
from .stream import DataStream, LoaderOptions
from .whole_batches import as_it_is, declares

DECLARED = "shares_among_ranks"
"""The attribute by which an iterable dataset says that ``shard`` is to give each rank a part of its own: True."""
AHEAD = 8
"""Micro-batches that a rank reads before it tells the others how many samples are in each."""


class PartBatch(NamedTuple):
    """A batch of a part, on its way through the loader.

    Attributes:
        batch: collated.
        samples: in it.
        worker: the number of the worker whose part it is of.
        state: of the part after it, as JSON; None where the part has none that would bring it back here.
    """

    batch: Any
    samples: int
    worker: int
    state: str | None


def has_parts(dataset: Any) -> bool:
    """Whether a dataset gives each rank a part.

    Raises:
        TypeError: it says so, and has no method ``shard``.
    """
    without = "every rank then reads all and keeps its slice"
    return declares(dataset, DECLARED, "shard(num_shards, index)", "return one part of it", without)


def own_state_problem(state: Any) -> str | None:
    """Return why what a rank's file holds of its part can't be true; None where it can."""
    if state is None:
        return None
    workers = state.get("workers") if isinstance(state, Mapping) else None
    if not isinstance(workers, list) or not workers or not all(isinstance(worker, Mapping) for worker in workers):
        return "data: it holds no list of workers"
    counts = [state.get("turn"), state.get("micro_batches"), *(worker.get("batches") for worker in workers)]
    if any(type(count) is not int or count < 0 for count in counts) or state["turn"] >= len(workers):
        return "data: turn, micro_batches and batches are counts"
    if any(not isinstance(worker.get("state"), str | None) for worker in workers):
        return "data: the state of a part is a text"
    return None


class Parts(IterableDataset):
    """What a loader's workers read: the batches of one part each. A process without workers reads one part.

    Random numbers that are drawn while a batch is read and collated follow from the place of the batch in its part, so
    a resume draws the same ones. While ``shard`` is called they are the same for all parts.

    Args:
        dataset: the user's.
        options: the batch size, collation and drop_last.
        seed, epoch: they decide what is drawn at random.
        rank, size: this rank among the data-parallel ranks.
        turn: the number of the worker whose batch comes first.
        reached: for each worker, how many batches of its part were used, and the state of the part after them.
    """

    def __init__(
        self, dataset: Any, options: LoaderOptions, seed: int, epoch: int, rank: int, size: int, turn: int,
        reached: list[dict[str, Any]],
    ) -> None:  # fmt: skip
        self.dataset = dataset
        self.batch_size, self.drop_last = options.batch_size, options.drop_last
        self.collate_fn: Collate = options.collate_fn
        self.seed, self.epoch = seed, epoch
        self.rank, self.size = rank, size
        self.turn, self.reached = turn, reached

    def __iter__(self) -> Iterator[PartBatch]:
        info = get_worker_info()
        workers, number = (1, 0) if info is None else (info.num_workers, info.id)
        worker = (self.turn + number) % workers
        # To the dataset this process is alone with its part: one that asks for its worker would share it once more.
        torch_worker._worker_info = None
        index = self.rank * workers + worker
        with random_state.OwnRandomState(random_state.combine_seeds(self.seed, self.epoch, 0)).entered():
            set_epoch(self.dataset, self.epoch)
            part = self.dataset.shard(num_shards=self.size * workers, index=index)
            set_epoch(part, self.epoch)
            state = self.reached[worker]["state"]
            if state is not None:
                part.load_state_dict(json.loads(state))
            samples = iter(part)
        return self.batches(part, samples, worker, index)

    def batches(self, part: Any, samples: Iterator[Any], worker: int, index: int) -> Iterator[PartBatch]:
        """Yield the batches of a part from where it was reached; without a state what was used is read over."""
        used, keeps = self.reached[worker]["batches"], keeps_place(part)
        for number in itertools.count(used if self.reached[worker]["state"] is not None else 0):
            own = random_state.OwnRandomState(random_state.combine_seeds(self.seed, self.epoch, 1 + index, number))
            with own.entered():
                chunk = list(itertools.islice(samples, self.batch_size))
                if not chunk or (len(chunk) < self.batch_size and self.drop_last):
                    return
                if number < used:
                    continue
                state = state_of(part, checks=number == used) if keeps else None
                batch = self.collate_fn(chunk)
            yield PartBatch(batch, len(chunk), worker, state)


class PartsStream(DataStream):
    """Batches of this rank's part of an iterable dataset. Collective where there are several ranks, once in ``AHEAD``
    micro-batches.

    How many samples come isn't known before they came, so a run has ``max_steps``. A limit of batches counts those of
    each rank, rounded up to whole ones.

    Args:
        dataset: see ``has_parts``.
        options, seed: see DataStream.
        strategy: it says which rank this is, and adds up numbers over all of them.

    Raises:
        ValueError: the dataset has fewer shards than there are ranks and workers.
    """

    has_parts = True

    def __init__(self, dataset: Any, options: LoaderOptions, seed: int, strategy: Strategy) -> None:
        super().__init__(options, seed, strategy.data_rank, strategy.data_size)
        self.dataset, self.strategy = dataset, strategy
        self.workers = options.workers.get("num_workers") or 1
        shards, wanted = getattr(dataset, "num_shards", None), self.size * self.workers
        if isinstance(shards, int) and shards < wanted:
            raise ValueError(
                f"{type(dataset).__name__} has {shards} shards, and {self.size} ranks with {self.workers} workers each "
                f"need {wanted}. Split it into more files, or set dataloader_num_workers lower; or leave {DECLARED} "
                "out, and every rank reads all of it."
            )
        self.own: dict[str, Any] = {}
        self.rewind()

    def rewind(self) -> None:
        """Stand at the beginning of the next epoch."""
        super().rewind()
        reached = [{"batches": 0, "state": None} for _ in range(self.workers)]
        self.own = {"turn": 0, "micro_batches": 0, "workers": reached}

    def own_state(self) -> dict[str, Any] | None:
        """Return how far each worker of this rank has come, as JSON types; None at the beginning of an epoch."""
        return json.loads(json.dumps(self.own)) if self.position else None

    def load_own_state(self, state: dict[str, Any] | None) -> None:
        """Have the next ``epoch`` begin where this rank stood, after ``load_state_dict``.

        Raises:
            ValueError: the run that was saved had another number of workers, and is to go on within an epoch.
        """
        if not self.position:
            return
        if state is None or len(state["workers"]) != self.workers:
            raise ValueError("The checkpoint was saved with another number of ranks or workers, and other parts.")
        self.own = state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the next ``epoch`` begin at the saved position; ``load_own_state`` follows."""
        self.rewind()
        super().load_state_dict(state)

    def describe(self, reads_samples: bool) -> dict[str, Any]:
        """Return what the order of samples follows from, as JSON types."""
        return {**super().describe(reads_samples), "ranks": self.size}

    def epoch(self, epoch: int) -> Iterator[Any]:
        """Return an iterator over this rank's micro-batches; every rank has equally many."""
        if self.begin() == 0:
            self.rewind()
        number = 0 if self.repeats else epoch
        batches = self.read(number, self.own)
        return self.hand_out(batches) if self.size == 1 else self.hand_out_together(batches, number)

    def read(self, epoch: int, own: Mapping[str, Any]) -> Iterator[PartBatch]:
        """Return an iterator over the batches of this rank's workers, in turn, from where they have come to."""
        parts = Parts(
            self.dataset, self.options, self.seed, epoch, self.rank, self.size, own["turn"], own["workers"]
        )  # fmt: skip
        loader: DataLoader[Any] = DataLoader(
            parts,
            batch_size=None,
            collate_fn=as_it_is,
            generator=torch.Generator(),  # drawing seeds for workers would change the random state of the run
            **self.options.workers,
        )
        return iter(loader)

    def left(self) -> int:
        """Micro-batches before the limit of an epoch; ``AHEAD`` where there are more."""
        limit = None if self.end is None else -(-self.end // self.global_micro_batch)
        return AHEAD if limit is None else min(AHEAD, limit - self.own["micro_batches"])

    def note(self, batch: PartBatch) -> None:
        """Note that a batch of this rank was handed out."""
        self.own["workers"][batch.worker] = {
            "batches": self.own["workers"][batch.worker]["batches"] + 1, "state": batch.state
        }  # fmt: skip
        self.own["turn"] = (batch.worker + 1) % self.workers

    def hand_out(self, batches: Iterator[PartBatch]) -> Iterator[Any]:
        """Yield the batches of the one rank there is."""
        while self.left():
            batch = next(batches, None)
            if batch is None:
                return
            self.note(batch)
            self.own["micro_batches"] += 1
            self.position += batch.samples
            yield batch.batch

    def hand_out_together(self, batches: Iterator[PartBatch], epoch: int) -> Iterator[Any]:
        """Yield this rank's batches, and stand-ins after them until the last rank has ended.

        Where reading fails on a rank, the others end at the same micro-batch: the message of the update, or of the
        evaluation, tells them why.
        """
        last: Any = None
        while count := self.left():
            ahead: list[PartBatch] = []
            failure: Exception | None = None
            try:
                for batch in itertools.islice(batches, count):
                    ahead.append(batch)
                if last is None and not ahead:  # at a resume: the part had ended before
                    last = self.first_batch(epoch)
            except Exception as error:
                failure = error
            samples = [batch.samples for batch in ahead] + [0] * (AHEAD - len(ahead))
            failed = [int(failure is not None and place == len(ahead)) for place in range(AHEAD)]
            sums = self.strategy.sum_on_host([*samples, *failed])
            # Ranks that share samples have each counted the same.
            totals = [total * self.size // self.strategy.world_size for total in sums[:AHEAD]]
            for place in range(count):
                if sums[AHEAD + place]:
                    if failure is not None and place == len(ahead):
                        raise failure
                    return
                if not totals[place]:
                    return
                if place < len(ahead):
                    last = ahead[place].batch
                    self.note(ahead[place])
                self.own["micro_batches"] += 1
                self.position += totals[place]
                yield last if place < len(ahead) else StandIn(last)

    def first_batch(self, epoch: int) -> Any:
        """Read the first batch of this rank once more, to stand in for those that it has no more of.

        Raises:
            ValueError: there is none.
        """
        reached = [{"batches": 0, "state": None} for _ in range(self.workers)]
        first = next(self.read(epoch, {"turn": 0, "workers": reached}), None)
        if first is None:
            raise ValueError(
                f"{type(self.dataset).__name__} gave rank {self.rank} of {self.size} a part without a batch, and each "
                f"rank needs one. Split the data into more pieces; or leave {DECLARED} out, and every rank reads all."
            )
        return first.batch


def set_epoch(dataset: Any, epoch: int) -> None:
    """Tell a dataset the epoch, where it wants to know."""
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)


def keeps_place(part: Any) -> bool:
    """Whether the state of a part brings it back to the same next sample. A shuffle buffer of ``datasets`` isn't in its
    state: such a part is read over instead.
    """
    if not callable(getattr(part, "state_dict", None)) or not callable(getattr(part, "load_state_dict", None)):
        return False
    within = [getattr(part, "_ex_iterable", None)]
    while within:
        examples = within.pop()
        if type(examples).__name__ == "BufferShuffledExamplesIterable":
            return False
        within += [getattr(examples, "ex_iterable", None)] if hasattr(examples, "ex_iterable") else []
        within += getattr(examples, "ex_iterables", [])
    return True


def state_of(part: Any, checks: bool) -> str:
    """Return the state of a part as JSON.

    Args:
        part: it has ``state_dict``.
        checks: whether to look if JSON gives back the same.

    Raises:
        TypeError: it wouldn't.
    """
    state = part.state_dict()
    why = ""
    try:
        text = json.dumps(state)
        why = "JSON would give back something else" if checks and json.loads(text) != state else ""
    except (TypeError, ValueError) as error:
        why = str(error)
    if why:
        raise TypeError(
            f"The state_dict() of {type(part).__name__} can't be saved: {why}. It may hold numbers, strings, lists and "
            "mappings with string keys; nothing in a checkpoint is pickled."
        )
    return text
