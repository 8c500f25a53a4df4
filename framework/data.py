"""Batches in one global order that the seed alone decides, shared among data-parallel ranks, resumable by samples.

Within an epoch the data is one sequence of samples. A *global micro-batch* is the next batch_size x ranks of them; each
rank takes its slice, and the next gradient_accumulation_steps global micro-batches make an update. So the same global
batch holds the same samples however it is split over ranks and micro-batches, and a position is a number of samples.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from . import random_state
from .arguments import FitArguments
from .objective import Weightless


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made: from FitArguments, or from a ready DataLoader, which brings its own.

    Args:
        batch_size: samples per micro-batch and rank.
        shuffle: a new order each epoch.
        drop_last: leave out a short last global micro-batch.
        collate_fn: list of samples to batch.
        workers: options that torch's DataLoader is given as they are.
    """

    batch_size: int
    shuffle: bool
    drop_last: bool
    collate_fn: Callable[[list[Any]], Any]
    workers: dict[str, Any]


class DataStream:
    """One epoch after another of this rank's micro-batches.

    Args:
        options: see LoaderOptions.
        seed: decides the order.
        rank, size: this rank among the data-parallel ranks.

    Attributes:
        num_examples: samples in an epoch, over all ranks; None where unknown.
        position: samples of the current epoch that were handed out, over all ranks.
    """

    num_examples: int | None = None

    def __init__(self, options: LoaderOptions, seed: int, rank: int, size: int) -> None:
        self.options = options
        self.seed = seed
        self.rank = rank
        self.size = size
        self.position = 0
        self.start = 0  # where the next epoch() begins; set by a resume

    @property
    def global_micro_batch(self) -> int:
        """Samples in one micro-batch over all ranks."""
        return self.options.batch_size * self.size

    def __len__(self) -> int:
        """Micro-batches of a whole epoch on this rank.

        Raises:
            TypeError: the data has no length.
        """
        if self.num_examples is None:
            raise TypeError("this data has no length")
        if self.options.drop_last:
            return self.num_examples // self.global_micro_batch
        return -(-self.num_examples // self.global_micro_batch)

    def epoch(self, epoch: int) -> Iterator[Any]:
        """This rank's micro-batches of one epoch, from where a loaded state stood, else from the beginning.

        Whatever is read to get there is read before this returns, so that the caller can then restore random states.
        """
        raise NotImplementedError

    def fraction(self) -> float:
        """How much of the epoch was handed out, from 0 to 1; 0 where its length is unknown."""
        if self.num_examples is None:
            return 0.0
        # Without the samples that drop_last leaves out, and without a short last micro-batch's empty places.
        return min(1.0, self.position / min(self.num_examples, len(self) * self.global_micro_batch))

    @property
    def samples(self) -> int:
        """Samples of the current epoch that were handed out, over all ranks."""
        return self.position

    def state_dict(self) -> dict[str, Any]:
        """The position, good for any batch size and number of ranks."""
        return {"position": self.position, "global_micro_batch": self.global_micro_batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next ``epoch`` begins at the saved position."""
        self.start = self.position = state["position"]

    def begin(self) -> int:
        """Take the starting position of an epoch, once."""
        self.position, self.start = self.start, 0
        return self.position


def share(samples: Sequence[Any], rank: int, size: int, batch_size: int) -> Sequence[Any]:
    """A rank's slice of a global micro-batch: ``batch_size`` samples, or an even part of a short one (maybe none)."""
    part = batch_size if len(samples) == batch_size * size else -(-len(samples) // size)
    return samples[rank * part : (rank + 1) * part]


class MapStream(DataStream):
    """Batches of a map-style dataset. Resuming jumps to the position; nothing is read to get there."""

    def __init__(self, dataset: Dataset, options: LoaderOptions, seed: int, rank: int, size: int) -> None:
        super().__init__(options, seed, rank, size)
        self.num_examples = len(dataset)  # type: ignore[arg-type]
        self.epoch_number = 0
        # Workers have random states of their own that can't be saved: there, each batch seeds its randomness by its
        # place in the run. In the training process the run's own random state, which is saved, goes on.
        self.seeds_batches = bool(options.workers.get("num_workers"))
        self.loader = DataLoader(
            SeededBatches(dataset) if self.seeds_batches else dataset,
            batch_sampler=_Requests(self),
            collate_fn=options.collate_fn,
            generator=torch.Generator(),  # its draws for worker seeds would disturb the run's random state
            **options.workers,
        )

    def order(self) -> Sequence[int]:
        """The epoch's sample indices."""
        assert self.num_examples is not None
        if not self.options.shuffle:
            return range(self.num_examples)
        generator = torch.Generator().manual_seed(self.seed + self.epoch_number)
        # A numpy array takes 8 bytes a sample; a list of ints would take 36.
        return torch.randperm(self.num_examples, generator=generator).numpy()  # type: ignore[return-value]

    def requests(self) -> Iterator[Any]:
        """What the loader fetches: this rank's indices of each global micro-batch, with a seed where workers fetch."""
        assert self.num_examples is not None
        order, step, shuffled = self.order(), self.global_micro_batch, self.options.shuffle
        for start in range(self.position, self.num_examples - (step - 1 if self.options.drop_last else 0), step):
            samples = order[start : start + step]
            mine = share(samples, self.rank, self.size, self.options.batch_size)
            if not len(mine):
                mine = samples[:1]
            indices = mine.tolist() if shuffled else list(mine)  # type: ignore[attr-defined]
            yield (batch_seed(self.seed, self.epoch_number, start), indices) if self.seeds_batches else indices

    def epoch(self, epoch: int) -> Iterator[Any]:
        """This rank's micro-batches of one epoch."""
        self.begin()
        self.epoch_number = epoch
        return self._hand_out(iter(self.loader))

    def _hand_out(self, batches: Iterator[Any]) -> Iterator[Any]:
        total, step, rank = self.num_examples, self.global_micro_batch, self.rank
        assert total is not None
        for batch in batches:
            left = total - self.position
            self.position += min(step, left)
            # Counted, not computed from indices: a rank is without samples only in a short last micro-batch.
            yield batch if left >= step or rank * -(-left // self.size) < left else Weightless(batch)


class _Requests:
    """A batch sampler that asks the stream, so that one DataLoader (and its workers) serves all epochs."""

    def __init__(self, stream: MapStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        return self.stream.requests()

    def __len__(self) -> int:
        return len(self.stream)


class SeededBatches(Dataset):
    """A dataset asked for (seed, indices): randomness inside ``__getitem__`` follows from the seed."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitems__(self, request: tuple[int, list[int]]) -> list[Any]:
        """The samples of one batch."""
        seed, indices = request
        random_state.seed_everything(seed)
        fetch_all = getattr(self.dataset, "__getitems__", None)
        return fetch_all(indices) if fetch_all else [self.dataset[index] for index in indices]


def batch_seed(seed: int, epoch: int, position: int) -> int:
    """A seed for one batch's randomness; the same for any number of workers."""
    return int(numpy.random.SeedSequence((seed, epoch, position)).generate_state(1)[0])


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
        """The next ``epoch`` is the saved one, from its position."""
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
        self.loader = loader
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

    @property
    def samples(self) -> int:
        """As many as whole batches hold; the last one may be short."""
        whole = self.position * self.options.batch_size
        return whole if self.num_examples is None else min(whole, self.num_examples)


def make_stream(
    data: Any, args: FitArguments, device: torch.device, rank: int, size: int, *, training: bool
) -> DataStream:
    """The stream over a Dataset, an IterableDataset or a ready DataLoader.

    Args:
        data: what the user gave. A DataLoader brings its own batch size, order, collation and workers.
        args: batch sizes, workers, seed and shuffling for the others.
        device: pinned memory is used where this is a GPU.
        rank, size: this rank among the data-parallel ranks.
        training: shuffle and use the training batch size; else neither.

    Raises:
        ValueError: the data is empty.
        TypeError: it is none of the three.
    """
    seed = args.seed if args.data_seed is None else args.data_seed
    options = LoaderOptions(
        batch_size=args.per_device_train_batch_size if training else args.per_device_eval_batch_size,
        shuffle=args.shuffle and training,
        drop_last=args.dataloader_drop_last and training,
        collate_fn=default_collate,
        workers={
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory and device.type == "cuda",
            "persistent_workers": args.dataloader_persistent_workers and args.dataloader_num_workers > 0,
            "prefetch_factor": args.dataloader_prefetch_factor,
        },
    )
    if isinstance(data, DataLoader):
        if not has_plain_sampler(data):
            return LoaderStream(data, seed, rank, size)
        options = LoaderOptions(
            # A batch size that is looked for was the loader's to begin with.
            batch_size=options.batch_size if training and args.auto_find_batch_size else data.batch_size or 1,
            shuffle=isinstance(data.sampler, RandomSampler) or getattr(data.sampler, "shuffle", False) is True,
            drop_last=data.drop_last,
            collate_fn=data.collate_fn,
            workers={
                "num_workers": data.num_workers,
                "pin_memory": data.pin_memory,
                "prefetch_factor": data.prefetch_factor,
                "persistent_workers": data.persistent_workers,
                "worker_init_fn": data.worker_init_fn,
                "timeout": data.timeout,
                "multiprocessing_context": data.multiprocessing_context,
            },
        )
        data = data.dataset
    kind = "train_data" if training else "eval_data"
    if isinstance(data, IterableDataset):
        return IterableStream(data, options, seed, rank, size)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise TypeError(
            f"{kind} takes a Dataset (with __getitem__ and __len__), an IterableDataset or a DataLoader. "
            f"Received: {type(data).__name__}"
        )
    if len(data) == 0:
        raise ValueError(f"{kind} is empty: len({type(data).__name__}) is 0.")
    if options.drop_last and len(data) < options.batch_size * size:
        raise ValueError(
            f"{kind} has {len(data)} samples, fewer than one global micro-batch of {options.batch_size * size}, and "
            "dataloader_drop_last=True leaves out the only batch there is."
        )
    return MapStream(data, options, seed, rank, size)


def has_plain_sampler(loader: DataLoader[Any]) -> bool:
    """Whether a ready loader's order is one that we can make ourselves, and so jump in."""
    if loader.batch_size is None:
        return False
    if isinstance(loader.dataset, IterableDataset):
        return True
    sampler = loader.sampler
    standard_batches = type(loader.batch_sampler) is torch.utils.data.BatchSampler
    if type(sampler) is RandomSampler:
        return (
            standard_batches and not sampler.replacement and sampler.generator is None and sampler._num_samples is None
        )
    # A DistributedSampler has shared the samples among ranks already, which is done here.
    return standard_batches and type(sampler) in (SequentialSampler, DistributedSampler)
