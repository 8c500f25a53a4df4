"""Streams of iterables and ready loaders, which have an order of their own: a resume reads over what was used."""

import copy
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from .. import random_state
from .collating import Collate, collate, columns
from .shares import DECLARED, BeginWorker, CollateShare, Share, Shares
from .stand_in import StandIn
from .stream import DataStream, LoaderOptions, batch_seed


class RereadStream(DataStream):
    """A stream of data with an order of its own, which may be drawn at random: every rank reads all of it under one
    random state, which follows from seed and epoch, and a resume reads over what was used.
    """

    generators_at_start: list[str] | None = None  # the states of ``generators`` when the current epoch began
    generators_to_restore: list[str] | None = None

    def read(self, epoch: int, skip: int) -> Iterator[Any]:
        """Yield the batches from a position on."""
        raise NotImplementedError

    def epoch(self, epoch: int) -> Iterator[Any]:
        """Return an iterator over this rank's micro-batches of one epoch."""
        if self.generators_to_restore is not None:
            for generator, state in zip(self.generators(), self.generators_to_restore, strict=False):
                generator.set_state(random_state.decode(state))
            self.generators_to_restore = None
        self.generators_at_start = self.generator_states()
        epoch = 0 if self.repeats else epoch
        own = random_state.OwnRandomState(batch_seed(self.seed, epoch, 0))
        with own.entered():
            batches = self.read(epoch, self.begin())
        return drawn_within(own, batches)

    def generator_states(self) -> list[str]:
        """Return the states of the data's generators, as JSON types."""
        return [random_state.encode(generator.get_state()) for generator in self.generators()]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the states of the data's generators when the epoch began, or will begin."""
        start = self.generators_at_start if self.position else self.generator_states()
        if self.generators_to_restore is not None:  # the generators aren't in these states yet
            start = self.generators_to_restore
        return {**super().state_dict(), "generators": start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the next ``epoch`` be the saved one, from its position.

        Raises:
            ValueError: a saved state isn't that of a generator.
        """
        for text in state.get("generators") or []:
            if (problem := random_state.generator_problem(text)) is not None:
                raise ValueError(problem)
        super().load_state_dict(state)
        self.generators_to_restore = state.get("generators")


def drawn_within(own: random_state.OwnRandomState, batches: Iterator[Any]) -> Iterator[Any]:
    """Yield the batches, and read each of them under a random state of the data's own."""
    while True:
        with own.entered():
            batch = next(batches, END)
        if batch is END:
            return
        yield batch


END = object()


class IterableStream(RereadStream):
    """Batches of an iterable dataset. Every rank reads the whole sequence and keeps its slice, and so does each worker
    of a rank, unless the dataset shares its samples among workers itself (see ``shares.py``).
    """

    workers_at_start = 0  # workers of the saved epoch, where the dataset shared its samples among them
    sharing_workers = 0

    def __init__(self, dataset: IterableDataset, options: LoaderOptions, seed: int, rank: int, size: int) -> None:
        super().__init__(options, seed, rank, size)
        self.dataset = dataset
        if hasattr(dataset, "__len__"):
            self.num_examples = len(dataset)
        if options.workers.get("persistent_workers") and rank == 0:
            warnings.warn(
                "persistent workers have no effect on an iterable dataset, which is read from another place in each "
                "epoch: its workers start anew. Leave out dataloader_persistent_workers=True.",
                stacklevel=2,
            )

    def epoch(self, epoch: int) -> Iterator[Any]:
        """Return an iterator over this rank's micro-batches. The shares draw random numbers in states of their own."""
        return self.hand_out(self.read(0 if self.repeats else epoch, self.begin()))

    def read(self, epoch: int, skip: int) -> Iterator[Share]:
        """Return an iterator over this rank's shares from a position on."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        workers = dict(self.options.workers)
        if workers.get("num_workers"):
            workers["worker_init_fn"] = BeginWorker(workers.get("worker_init_fn"))
        collate_share: Callable[[Any], Any] = CollateShare(self.options.collate_fn)
        loader: DataLoader[Any] = DataLoader(
            Shares(self.dataset, self.options, self.seed, epoch, self.rank, self.size, skip, self.end),
            batch_size=None,
            collate_fn=collate_share,
            generator=torch.Generator().manual_seed(self.seed + epoch),
            **workers,
        )
        shares: Iterator[Any] = iter(loader)
        self.sharing_workers = 0
        if not workers.get("num_workers"):
            return shares
        first = next(shares, None)
        if first is None:
            return iter(())
        shares = itertools.chain([first], shares)
        if first.sharing == "ours":
            return shares
        if first.sharing == "unclear":
            self.warn_unclear()
        self.sharing_workers = workers["num_workers"]
        return self.read_over(shares, skip)

    def read_over(self, shares: Iterator[Share], skip: int) -> Iterator[Share]:
        """Leave out the shares that were used, where only the workers can tell which they are, and return the rest."""
        if skip and self.workers_at_start not in (0, self.sharing_workers):
            raise ValueError(
                f"{type(self.dataset).__name__} shares its samples among {self.sharing_workers} workers by itself, and "
                f"the run that is resumed had {self.workers_at_start}: which samples were used can't be told. Set "
                f"dataloader_num_workers={self.workers_at_start}, or have the dataset yield all samples in every "
                "worker, which are then shared for it."
            )
        used = 0
        while used < skip and (chunk := next(shares, None)):
            used += chunk.size
        if used > skip:  # the batch size or the number of ranks is another than before
            warnings.warn(
                f"resuming an iterable dataset with workers after {skip} samples, which is no whole number of its "
                f"batches here: {used - skip} samples are left out",
                stacklevel=2,
            )
        self.position = max(skip, used)
        return shares

    def warn_unclear(self) -> None:
        """Warn that it can't be told whether the dataset shares its samples among workers."""
        kind = type(self.dataset)
        warnings.warn_explicit(
            f"{kind.__name__} asks get_worker_info() for its worker's id, but not for the number of workers. It is "
            "taken to share its samples among the workers by the id; if it doesn't, each comes from every worker. "
            f"Set {DECLARED} = True on it if it does, and {DECLARED} = False if each worker yields all samples.",
            UserWarning,
            filename=getattr(inspect.getmodule(kind), "__file__", None) or kind.__module__,
            lineno=1,
            module=kind.__module__,
        )

    def hand_out(self, shares: Iterator[Share]) -> Iterator[Any]:
        """Yield the batches of shares, and count their samples."""
        while self.end is None or self.position < self.end:  # asked before one more is read
            share = next(shares, None)
            if share is None:
                return
            self.position += share.size
            yield share.batch if share.is_mine else StandIn(share.batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and how many workers the dataset shared its samples among; 0 where this stream does."""
        return {**super().state_dict(), "sharing_workers": self.sharing_workers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the next ``epoch`` be the saved one, from its position."""
        super().load_state_dict(state)
        self.workers_at_start = state.get("sharing_workers", 0)


class LoaderStream(RereadStream):
    """Batches of a ready DataLoader with a sampler of its own: rank r of n uses batches r, r + n, r + 2n, ...

    A position counts batches here.

    Args:
        loader: the user's.
        seed, rank, size: see DataStream.
        collation: see ``collation_of``.

    Attributes:
        batch_size_is_known: whether loader or batch sampler say how many samples a batch has; else one is assumed.
    """

    def __init__(self, loader: DataLoader[Any], seed: int, rank: int, size: int, collation: Collate) -> None:
        batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        self.batch_size_is_known = batch_size is not None
        super().__init__(LoaderOptions(batch_size or 1, False, loader.drop_last, default_collate, {}), seed, rank, size)
        if collation not in (loader.collate_fn, collate):
            loader = copy.copy(loader)  # the user's loader keeps its own collation
            loader.collate_fn = collation
        self.loader, self.dataset = loader, loader.dataset
        if hasattr(loader.dataset, "__len__"):
            self.num_examples = len(loader.dataset)

    @property
    def positions_of_micro_batch(self) -> int:
        """How far a micro-batch over all ranks moves the position."""
        return self.size

    @property
    def positions_of_batch(self) -> int:
        """How far a batch of the loader moves the position."""
        return 1

    def cut_to(self, samples: int) -> None:
        """Note that an epoch has no more than so many batches."""
        super().cut_to(samples * self.options.batch_size)

    def repeat(self) -> None:
        """Have every epoch be like the first.

        Raises:
            ValueError: its order is drawn from a generator of its own.
        """
        if self.generators():
            raise ValueError(
                "overfit_batches trains on the same batches each epoch, and train_data is a DataLoader whose order is "
                "drawn from a generator of its own. Give it no generator, or give Fit the dataset itself."
            )
        super().repeat()

    def batches(self) -> int:
        """The number of batches of an epoch, over all ranks.

        Raises:
            TypeError: the loader has no length.
        """
        return len(self.loader) if self.end is None else min(len(self.loader), self.end)

    def __len__(self) -> int:
        return -(-self.batches() // self.size)

    def generators(self) -> list[torch.Generator]:
        """Return the generators of the loader and its samplers."""
        parts = (self.loader, self.loader.sampler, self.loader.batch_sampler)
        inner = getattr(self.loader.batch_sampler, "sampler", None)
        found = [getattr(part, "generator", None) for part in (*parts, inner)]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def read(self, epoch: int, skip: int) -> Iterator[Any]:
        """Yield this rank's batches from a position on."""
        parts: list[Any] = [self.loader.sampler, self.loader.batch_sampler, self.loader.dataset]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        batches: Iterator[Any] = iter(self.loader)
        for _ in range(skip):
            next(batches, None)
        if self.end is not None:
            batches = itertools.islice(batches, max(0, self.end - skip))
        if self.loader.collate_fn is default_collate:
            batches = map(columns, batches)
        return self._hand_out(batches)

    def _hand_out(self, batches: Iterator[Any]) -> Iterator[Any]:
        if self.size == 1:
            for batch in batches:
                self.position += 1
                yield batch
            return
        while group := list(itertools.islice(batches, self.size)):
            self.position += len(group)
            yield group[self.rank] if self.rank < len(group) else StandIn(group[0])

    def fraction(self) -> float:
        """The part of the epoch that was handed out, from 0 to 1; 0 where its length is unknown."""
        return self.position / self.batches() if self.num_examples is not None else 0.0

    def capacity(self) -> int | None:
        """The number of batches in an epoch; None where it is unknown."""
        return self.batches() if self.num_examples is not None else None

    @property
    def samples(self) -> int:
        """The samples that were handed out, as if every batch were whole; the last one may be short."""
        whole = self.position * self.options.batch_size
        return whole if self.num_examples is None else min(whole, self.num_examples)
