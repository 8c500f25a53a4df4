"""The base of streams of batches: one global order, a slice of it for each rank, and a position in samples."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import random_state
from .fingerprint import fingerprint


@dataclass(frozen=True)
class LoaderOptions:
    """Options of how batches are made, from FitArguments or from a ready DataLoader.

    Args:
        batch_size: samples per micro-batch and rank.
        shuffle: draw a new order each epoch.
        drop_last: leave out a short last global micro-batch.
        collate_fn: a function of a list of samples to a batch.
        workers: options that are handed to torch's DataLoader as they are.
        per_device: samples per micro-batch and device, where a rank feeds several; None means ``batch_size``.
        fetch: a function of the dataset and indices to a whole batch; None where batches are collated of samples.
    """

    batch_size: int
    shuffle: bool
    drop_last: bool
    collate_fn: Callable[[list[Any]], Any]
    workers: dict[str, Any]
    per_device: int | None = None
    fetch: Callable[[Any, Any], Any] | None = None


class DataStream:
    """This rank's micro-batches, epoch after epoch.

    Args:
        options: see LoaderOptions.
        seed: what decides the order.
        rank, size: this rank among the data-parallel ranks.

    Attributes:
        num_examples: samples in an epoch, over all ranks; None where it is unknown.
        position: samples of the current epoch that were handed out, over all ranks.
        dataset: the data, where its samples can be read in any order; else None.
        end: the position after which every epoch ends, where it ends before the data does; else None.
        whole: samples of the data, where an epoch may take fewer; else None.
        repeats: whether every epoch is like the first.
    """

    num_examples: int | None = None
    end: int | None = None
    whole: int | None = None
    repeats = False
    is_equal_on_ranks = False
    """Whether it is certain that every rank has equally many micro-batches."""
    has_parts = False
    """Whether each rank reads samples of its own, so that an update's depend on the number of ranks."""
    dataset: Any = None
    fingerprint: str | None = None
    fingerprint_is_known = False

    def __init__(self, options: LoaderOptions, seed: int, rank: int, size: int) -> None:
        self.options = options
        self.seed = seed
        self.rank = rank
        self.size = size
        self.position = 0
        self.start = 0  # the position where the next epoch() begins; a resume sets it

    @property
    def global_micro_batch(self) -> int:
        """The number of samples in one micro-batch over all ranks."""
        return self.options.batch_size * self.size

    @property
    def positions_of_micro_batch(self) -> int:
        """How far a micro-batch over all ranks moves the position."""
        return self.global_micro_batch

    @property
    def positions_of_batch(self) -> int:
        """How far the batch of one device moves the position, whatever ranks share it."""
        return self.options.per_device or self.options.batch_size

    def end_after(self, position: int) -> None:
        """Have every epoch end at a position, where the data reaches so far; called before the first epoch."""
        self.end = position if self.end is None else min(position, self.end)
        self.cut_to(self.end)

    def cut_to(self, samples: int) -> None:
        """Note that an epoch has no more than so many samples."""
        if self.num_examples is not None:
            self.whole = self.data_length()
            self.num_examples = min(self.num_examples, samples)

    def repeat(self) -> None:
        """Have every epoch be like the first.

        Raises:
            ValueError: it can't be.
        """
        self.repeats = True

    def __len__(self) -> int:
        """Return the number of micro-batches of a whole epoch on this rank.

        Raises:
            TypeError: the data has no length.
        """
        if self.num_examples is None:
            raise TypeError("this data has no length")
        if self.options.drop_last:
            return self.num_examples // self.global_micro_batch
        return -(-self.num_examples // self.global_micro_batch)

    def epoch(self, epoch: int) -> Iterator[Any]:
        """Return an iterator over this rank's micro-batches of one epoch, from a restored position or from the
        beginning.

        What has to be read to get there is read before this returns, so that the caller can then restore random states.
        """
        raise NotImplementedError

    def fraction(self) -> float:
        """The part of the epoch that was handed out, from 0 to 1; 0 where its length is unknown."""
        if self.num_examples is None:
            return 0.0
        # The samples that drop_last leaves out don't count, nor do the empty places of a short last micro-batch.
        return min(1.0, self.position / min(self.num_examples, len(self) * self.global_micro_batch))

    def indices(self, epoch: int, begin: int, end: int) -> Sequence[int] | None:
        """The samples at some positions of an epoch's order, as indices into the dataset; None where they aren't known.

        Args:
            epoch: its number.
            begin, end: the first position, and the one after the last.
        """
        return None

    def capacity(self) -> int | None:
        """The last position in an epoch; None where it is unknown."""
        return self.num_examples

    @property
    def samples(self) -> int:
        """The number of samples of the current epoch that were handed out, over all ranks."""
        return self.position

    def state_dict(self) -> dict[str, Any]:
        """Return the position, which is valid for any batch size and number of ranks."""
        return {"position": self.position, "global_micro_batch": self.global_micro_batch}

    def describe(self, reads_samples: bool) -> dict[str, Any]:
        """Return what the order of samples follows from, as JSON types, for a resume to compare.

        Args:
            reads_samples: include the fingerprint of the data, where this process can read samples in any order; else
                the fingerprint is None. It is taken once.
        """
        if reads_samples and not self.fingerprint_is_known and self.dataset is not None:
            by_workers = bool(
                self.options.workers.get("num_workers")
            )  # workers would share files that are opened in this process
            self.fingerprint = None if by_workers else fingerprint(self.dataset)
            self.fingerprint_is_known = True
        return {
            "kind": type(self).__name__,
            "seed": self.seed,
            "shuffle": self.options.shuffle,
            "batch_size": self.options.batch_size,
            "workers": self.options.workers.get("num_workers") or 0,
            "length": self.data_length(),
            "fingerprint": self.fingerprint,
        }

    def data_length(self) -> int | None:
        """The number of samples of the data, however many of them an epoch takes; None where it is unknown."""
        return self.num_examples if self.whole is None else self.whole

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the next ``epoch`` begin at the saved position."""
        self.start = self.position = state["position"]

    def begin_training_epoch(self, epoch: int) -> None:
        """Note that the next ``epoch`` is one of training, and not of an evaluation on the same data."""

    def begin_anew(self) -> None:
        """Have the next ``epoch`` begin at its beginning, as in a new run."""
        self.load_state_dict({"position": 0})

    def own_state(self) -> dict[str, Any] | None:
        """Return what of the position is this rank's alone, as JSON types; None where the position says all."""
        return None

    def load_own_state(self, state: dict[str, Any] | None) -> None:
        """Take back what ``own_state`` gave, after ``load_state_dict``."""

    def generators(self) -> list[torch.Generator]:
        """Return the generators of the data that its order may be drawn from."""
        return []

    def rewind(self) -> None:
        """Stand at the beginning of the next epoch."""
        self.position = 0

    def begin(self) -> int:
        """Return the position where an epoch starts, and have the next one start at 0."""
        self.position, self.start = self.start, 0
        return self.position


def share(samples: Sequence[Any], rank: int, size: int, batch_size: int) -> Sequence[Any]:
    """Return a rank's slice of a global micro-batch: ``batch_size`` samples, or an even part of a short one (maybe
    none).
    """
    part = batch_size if len(samples) == batch_size * size else -(-len(samples) // size)
    return samples[rank * part : (rank + 1) * part]


def batch_seed(seed: int, epoch: int, position: int) -> int:
    """Return the seed for the random numbers of one batch; the same for any number of workers."""
    return random_state.combine_seeds(seed, epoch, position)
