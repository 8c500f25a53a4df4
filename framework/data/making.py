"""Making of the stream over what a user gives as data: a Dataset, an IterableDataset or a ready DataLoader."""

import dataclasses
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from ...strategies.base import Strategy
from ..arguments import FitArguments
from .collating import Collate, CollatePinnable, check_can_be_sent, collate, collation_of
from .columns import as_dataset
from .lengths import LengthGroups
from .limits import limit_epochs
from .mapped import MapStream
from .parts import PartsStream, has_parts
from .reread import IterableStream, LoaderStream
from .stream import DataStream, LoaderOptions
from .whole_batches import DECLARED, as_it_is, fetch_of, gives_batches
from .worker import OutliveSignal


def make_stream(
    data: Any,
    args: FitArguments,
    strategy: Strategy,
    collator: Collate | None = None,
    *,
    training: bool,
    batches: int = 1,
) -> DataStream:
    """Make the stream over a Dataset, an IterableDataset or a ready DataLoader, see ``make_whole_stream``; one to train
    on ends its epochs where the arguments limit them. ``batches`` are those of an update.
    """
    stream = make_whole_stream(data, args, strategy, collator, training=training)
    if training:
        limit_epochs(stream, args, batches)
    return stream


def make_whole_stream(
    data: Any, args: FitArguments, strategy: Strategy, collator: Collate | None, *, training: bool
) -> DataStream:
    """Make the stream over all of the data.

    Args:
        data: what the user gave. A DataLoader brings its own batch size, order, collation and workers; a mapping of
            tensors or arrays, or a table of pyarrow's, holds a sample in each row.
        args: batch sizes, workers, seed and shuffling for datasets.
        strategy: it says which rank this is among the data-parallel ones, and how many devices the rank feeds; on GPUs,
            memory is pinned.
        collator: makes a batch of a list of samples; None takes torch's default, or the loader's own.
        training: shuffle and use the training batch size; else do neither.

    Raises:
        ValueError: the data is empty, has no lengths to group by, or makes its batches without the collator.
        TypeError: the data is none of the three, or the collator can't be sent to workers.
    """
    data = as_dataset(data)
    seed = args.seed if args.data_seed is None else args.data_seed
    rank, size = strategy.data_rank, strategy.data_size
    per_device = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
    shuffles = training and not args.overfit_batches
    options = LoaderOptions(
        batch_size=per_device * strategy.devices_per_rank,
        shuffle=shuffles and args.shuffle and args.train_sampling_strategy != "sequential",
        drop_last=args.dataloader_drop_last and training,
        collate_fn=collator or collate,
        workers={
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory and strategy.device.type == "cuda",
            "persistent_workers": args.dataloader_persistent_workers and args.dataloader_num_workers > 0,
            "prefetch_factor": args.dataloader_prefetch_factor,
        },
        per_device=per_device,
    )
    groups = training and args.train_sampling_strategy == "group_by_length"
    if groups and isinstance(data, DataLoader | IterableDataset):
        raise ValueError(
            "train_sampling_strategy='group_by_length' orders a Dataset with __getitem__ and __len__. Received: "
            f"train_data, a {type(data).__name__}. Give Fit the dataset, or leave the argument out."
        )
    if collator is not None:
        own = isinstance(data, DataLoader)
        workers = data.num_workers if own else args.dataloader_num_workers
        check_can_be_sent(collator, workers, data.multiprocessing_context if own else None)
    if isinstance(data, DataLoader):
        collation = collation_of(data, collator)
        if not has_plain_sampler(data):
            return LoaderStream(data, seed, rank, size, collation)
        # Where auto_find_batch_size is at work, its first batch size was the loader's.
        keeps_size = training and args.auto_find_batch_size
        batch_size = options.batch_size if keeps_size else data.batch_size or 1
        options = options_of(data, batch_size, collation, repeats=training and bool(args.overfit_batches))
        data = data.dataset
    if collator is not None and gives_batches(data):
        raise ValueError(
            f"data_collator={collator!r:.80} makes a batch of samples, and {type(data).__name__}.{DECLARED} is True: "
            "its __getitems__ returns batches. Leave one of the two out."
        )
    if options.collate_fn is collate and (fetch := fetch_of(data)) is not None:
        options = dataclasses.replace(options, fetch=fetch, collate_fn=as_it_is)
    if (
        options.workers["pin_memory"] and torch.accelerator.is_available()
    ):  # torch's loader pins under the same condition
        options = dataclasses.replace(options, collate_fn=CollatePinnable(options.collate_fn))
    if options.workers["num_workers"]:
        outlives = OutliveSignal(options.workers.get("worker_init_fn"))
        options = dataclasses.replace(options, workers={**options.workers, "worker_init_fn": outlives})
    kind = "train_data" if training else "eval_data"
    if isinstance(data, IterableDataset) and has_parts(data):
        return PartsStream(data, options, seed, strategy)
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
    update_samples = options.batch_size * size * args.gradient_accumulation_steps
    by_length = LengthGroups(data, args.length_column_name, update_samples) if groups else None
    return MapStream(data, options, seed, rank, size, by_length)


def options_of(loader: DataLoader[Any], batch_size: int, collation: Collate, repeats: bool) -> LoaderOptions:
    """Return how a ready loader makes its batches.

    Args:
        loader: the user's.
        batch_size: samples per micro-batch and rank.
        collation: see ``collation_of``.
        repeats: whether every epoch has the same batches, and so isn't shuffled.
    """
    shuffles = isinstance(loader.sampler, RandomSampler) or getattr(loader.sampler, "shuffle", False) is True
    return LoaderOptions(
        batch_size=batch_size,
        shuffle=shuffles and not repeats,
        drop_last=loader.drop_last,
        collate_fn=collation,
        workers={
            "num_workers": loader.num_workers,
            "pin_memory": loader.pin_memory,
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers,
            "worker_init_fn": loader.worker_init_fn,
            "timeout": loader.timeout,
            "multiprocessing_context": loader.multiprocessing_context,
        },
    )


def has_plain_sampler(loader: DataLoader[Any]) -> bool:
    """Return whether the order of a ready loader is one that a MapStream can make, and so jump in."""
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
    # A DistributedSampler shares samples among ranks itself, which the stream does.
    return standard_batches and type(sampler) in (SequentialSampler, DistributedSampler)
