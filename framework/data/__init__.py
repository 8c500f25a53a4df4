"""Batches in one global order that the seed alone decides, shared among data-parallel ranks, resumable by samples.

Within an epoch the data is one sequence of samples. A *global micro-batch* is the next batch_size x ranks of them; each
rank takes its slice, and the next gradient_accumulation_steps global micro-batches make an update. So the same global
batch holds the same samples however it is split over ranks and micro-batches, and a position is a number of samples.
"""

from .columns import as_dataset, sets_by_name
from .limits import limit_evaluation
from .making import has_plain_sampler, make_stream
from .stream import DataStream

__all__ = ["DataStream", "as_dataset", "has_plain_sampler", "limit_evaluation", "make_stream", "sets_by_name"]
