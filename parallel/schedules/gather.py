"""All keys on every rank at once, as Llama 3 was trained (arXiv 2407.21783, sec. 3.3.2)."""

from collections.abc import Iterator

import numpy as np

from .kv_schedule import KVSchedule
from .plan import (
    AttentionSpec,
    BufferRange,
    Exchange,
    PlacedRuns,
    PlanStage,
    SentRuns,
    TokenRanges,
    tile_jobs,
)

_MOST_PADDING = 1.1
"""An all-gather is faster than messages of different lengths, if it is hardly longer."""


class GatherSchedule(KVSchedule):
    """Every rank receives all keys in a single exchange, and computes with them in one stage."""

    name = "gather"

    def num_stages(self, ranks: int) -> int:
        return 1

    def stages(self, spec: AttentionSpec, rank: int) -> Iterator[PlanStage]:
        layout = spec.layout
        all_tokens = TokenRanges([BufferRange(0, layout.length, 0)], spec)
        queries = TokenRanges.of_segments(layout.segments_of_rank[rank], spec)
        jobs = [
            job for rows in spec.rows for job in tile_jobs(queries, all_tokens, rows, is_first=True)
        ]
        yield PlanStage(_exchange(spec, rank), tuple(jobs))


def _exchange(spec: AttentionSpec, rank: int) -> Exchange:
    layout = spec.layout
    batch_size = spec.batch_size
    lengths = np.array(layout.lengths)
    receive_counts = all_gather_counts(batch_size * lengths)

    # Arrays over the segments, in order; the columns of a row are the tokens of the sequence.
    start, stop, segment_rank, slot = np.array(layout.segments_in_order, np.int64).T
    row = np.arange(batch_size)[:, None]
    first_of_rank = np.cumsum(receive_counts) - receive_counts
    first_column = row * layout.length + start
    first_row = first_of_rank[segment_rank] + row * lengths[segment_rank] + slot
    count = np.broadcast_to(stop - start, (batch_size, len(start)))

    own_length = layout.lengths[rank]
    return Exchange(
        is_all_gather=True,
        heads_per_row=spec.num_kv_heads,
        rows_per_token=1,
        sent_runs=SentRuns(np.arange(batch_size) * own_length, np.full(batch_size, own_length)),
        send_counts=(int(receive_counts[rank]),) * layout.ranks,
        receive_counts=tuple(receive_counts.tolist()),
        placed_runs=PlacedRuns(first_column.ravel(), first_row.ravel(), count.ravel()),
        num_columns=layout.length,
    )


def all_gather_counts(counts: np.ndarray) -> np.ndarray:
    """Return how many rows each rank contributes to an all-gather, for ``counts`` of its own.

    All contribute as many as the most have, if that makes the whole little longer.
    """
    if len(counts) * counts.max() <= _MOST_PADDING * counts.sum():
        return np.full_like(counts, counts.max())
    return counts
