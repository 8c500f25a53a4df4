"""Streams whose order is their own affair, iterables and ready loaders: a resume reads over what was used."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from .. import random_state
from ..objective import Weightless
from .stream import DataStream, LoaderOptions, batch_seed, share


class RereadStream(DataStream):
    """A stream whose order is its own affair, perhaps drawn at random: every rank reads all of it under one random
    state, which follows from seed and epoch, and resuming reads over what was used.
    """

    generators_at_start: list[str] | None = None  # their states when the current epoch began
    generators_to_restore: list[str] | None = None

    def generators(self) -> list[torch.Generator]:
        """Generators of its own that the order may be drawn from; their states are saved."""
        return []

    def read(self, epoch: int, skip: int) -> Iterator[Any]:
        """The batches from a position on."""
        raise NotImplementedError

    def epoch(self, epoch: int) -> Iterator[Any]:
        """This rank's micro-batches of one epoch."""
        if self.generators_to_restore is not None:
            for generator, state in zip(self.generators(), self.generators_to_restore, strict=False):
                generator.set_state(random_state.decode(state))
            self.generators_to_restore = None
        self.generators_at_start = self.generator_states()
        own = random_state.OwnRandomState(batch_seed(self.seed, epoch, 0))
        with own.entered():
            batches = self.read(epoch, self.begin())
        return drawn_within(own, batches)

    def generator_states(self) -> list[str]:
        """The states of the stream's own generators, as JSON types."""
        return [random_state.encode(generator.get_state()) for generator in self.generators()]

    def state_dict(self) -> dict[str, Any]:
        """The position, and the states in which the stream's own generators began the epoch (between two: begin)."""
        start = self.generators_at_start if self.position else self.generator_states()
        return {**super().state_dict(), "generators": start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next ``epoch`` is the saved one, from its position.

        Raises:
            ValueError: a state of a generator is none.
        """
        for text in state.get("generators") or []:
            if (problem := random_state.generator_problem(text)) is not None:
                raise ValueError(problem)
        super().load_state_dict(state)
        self.generators_to_restore = state.get("generators")


def drawn_within(own: random_state.OwnRandomState, batches: Iterator[Any]) -> Iterator[Any]:
    """The batches, each read under a random state of their own."""
    while True:
        with own.entered():
            batch = next(batches, END)
        if batch is END:
            return
        yield batch


END = object()


class IterableStream(RereadStream):
    """Batches of an iterable dataset. Every rank reads the whole sequence and keeps its slice. With workers, the
    dataset itself must share its samples among them (torch.utils.data.get_worker_info).
    """

    def __init__(self, dataset: IterableDataset, options: LoaderOptions, seed: int, rank: int, size: int) -> None:
        super().__init__(options, seed, rank, size)
        self.dataset = dataset
        if hasattr(dataset, "__len__"):
            self.num_examples = len(dataset)

    def read(self, epoch: int, skip: int) -> Iterator[Any]:
        """This rank's micro-batches from a position on."""
        in_process = not self.options.workers.get("num_workers")
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        shares = Shares(self.dataset, self.options, self.rank, self.size, skip if in_process else 0)
        collate: Callable[[Any], Any] = CollateShare(self.options.collate_fn)
        loader: DataLoader[Any] = DataLoader(
            shares,
            batch_size=None,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(self.seed + epoch),
            **self.options.workers,
        )
        batches = iter(loader)
        if not in_process:
            used = 0
            while used < skip and (chunk := next(batches, None)):
                used += chunk[1]
            if used > skip:  # another batch size or number of ranks than before
                warnings.warn(
                    f"resuming an iterable dataset with workers after {skip} samples, which is no whole number of its "
                    f"batches here: {used - skip} samples are left out",
                    stacklevel=2,
                )
            skip = max(skip, used)
        self.position = skip
        return self._hand_out(batches)

    def _hand_out(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch, samples, is_mine in batches:
            self.position += samples
            yield batch if is_mine else Weightless(batch)


class Shares(IterableDataset):
    """Global micro-batches of an iterable dataset, cut to one rank's slice: (samples, global size, is mine)."""

    def __init__(self, dataset: IterableDataset, options: LoaderOptions, rank: int, size: int, skip: int) -> None:
        self.dataset = dataset
        self.batch_size = options.batch_size
        self.drop_last = options.drop_last
        self.rank = rank
        self.size = size
        self.skip = skip

    def __iter__(self) -> Iterator[tuple[list[Any], int, bool]]:
        samples = iter(self.dataset)
        for _ in itertools.islice(samples, self.skip):
            pass
        return self._cut(samples)

    def _cut(self, samples: Iterator[Any]) -> Iterator[tuple[list[Any], int, bool]]:
        step = self.batch_size * self.size
        while chunk := list(itertools.islice(samples, step)):
            if len(chunk) < step and self.drop_last:
                return
            mine = share(chunk, self.rank, self.size, self.batch_size)
            yield list(mine or chunk[:1]), len(chunk), bool(mine)


class CollateShare:
    """Collates the samples of a share and passes the rest on."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, item: tuple[list[Any], int, bool]) -> tuple[Any, int, bool]:
        """(samples, global size, is mine) to (batch, global size, is mine)."""
        samples, size, is_mine = item
        return self.collate_fn(samples), size, is_mine


class LoaderStream(RereadStream):
    """A ready DataLoader with a sampler of its own, taken as it is: rank r of n uses batches r, r + n, r + 2n, ...

    A position counts batches here.
    """

    def __init__(self, loader: DataLoader[Any], seed: int, rank: int, size: int) -> None:
        batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
        super().__init__(LoaderOptions(batch_size, False, loader.drop_last, default_collate, {}), seed, rank, size)
        self.loader, self.dataset = loader, loader.dataset
        if hasattr(loader.dataset, "__len__"):
            self.num_examples = len(loader.dataset)

    def __len__(self) -> int:
        return -(-len(self.loader) // self.size)

    def generators(self) -> list[torch.Generator]:
        """Those of the loader and its samplers."""
        parts = (self.loader, self.loader.sampler, self.loader.batch_sampler)
        inner = getattr(self.loader.batch_sampler, "sampler", None)
        found = [getattr(part, "generator", None) for part in (*parts, inner)]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def read(self, epoch: int, skip: int) -> Iterator[Any]:
        """This rank's batches from a position on."""
        parts: list[Any] = [self.loader.sampler, self.loader.batch_sampler, self.loader.dataset]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        batches = iter(self.loader)
        for _ in range(skip):
            next(batches, None)
        return self._hand_out(batches)

    def _hand_out(self, batches: Iterator[Any]) -> Iterator[Any]:
        if self.size == 1:
            for batch in batches:
                self.position += 1
                yield batch
            return
        while group := list(itertools.islice(batches, self.size)):
            self.position += len(group)
            yield group[self.rank] if self.rank < len(group) else Weightless(group[0])

    def fraction(self) -> float:
        """How much of the epoch was handed out, from 0 to 1; 0 where its length is unknown."""
        return self.position / len(self.loader) if self.num_examples is not None else 0.0

    def capacity(self) -> int | None:
        """The number of batches; None where unknown."""
        return len(self.loader) if self.num_examples is not None else None

    @property
    def samples(self) -> int:
        """As many as whole batches hold; the last one may be short."""
        whole = self.position * self.options.batch_size
        return whole if self.num_examples is None else min(whole, self.num_examples)
