"""Ring Attention: the keys of one other rank after another (arXiv 2310.01889)."""

from collections.abc import Iterator

import numpy as np

from .kv_schedule import KVSchedule
from .plan import (
    AttentionSpec,
    BatchRows,
    BufferRange,
    Exchange,
    PlacedRuns,
    PlanStage,
    SentRuns,
    TileJob,
    TokenRanges,
    own_keys_stage,
    tile_jobs,
)


class RingSchedule(KVSchedule):
    """Rank ``r`` computes with its own keys, then those of ``r - 1``, ``r - 2``, and so on.

    Each rank sends what is needed straight to the rank that needs it, and neither what comes after
    all of its queries nor what is before their reach. Gradients of keys return straight to their
    rank, where they are summed in fp32.
    """

    name = "ring"

    def num_stages(self, ranks: int) -> int:
        return ranks

    def stages(self, spec: AttentionSpec, rank: int) -> Iterator[PlanStage]:
        yield own_keys_stage(spec, rank)
        for distance in range(1, spec.layout.ranks):
            yield _stage(spec, rank, distance)


def _stage(spec: AttentionSpec, rank: int, distance: int) -> PlanStage:
    """Return the stage with the keys of ``rank - distance``; ours go to ``rank + distance``."""
    layout = spec.layout
    source = (rank - distance) % layout.ranks
    target = (rank + distance) % layout.ranks
    own_length = layout.lengths[rank]
    queries = TokenRanges.of_segments(layout.segments_of_rank[rank], spec)

    jobs: list[TileJob] = []
    first_sent: list[int] = []
    sent_counts: list[int] = []
    tokens_received: list[int] = []  # of each row of the batch
    for rows in spec.rows:
        outgoing = _needed_keys(spec, rows, rank, target)
        for row in rows.numbers:
            first_sent += [row * own_length + needed.column for needed in outgoing]
            sent_counts += [needed.stop - needed.start for needed in outgoing]

        column = 0
        received = []
        for needed in _needed_keys(spec, rows, source, rank):
            received.append(BufferRange(needed.start, needed.stop, column))
            column += needed.stop - needed.start
        tokens_received += [column] * len(rows.numbers)
        jobs += tile_jobs(queries, TokenRanges(received, spec), rows)

    # The received rows of each row of the batch fill its first columns.
    counts = np.array(tokens_received)
    num_columns = max(tokens_received)
    exchange = Exchange(
        is_all_gather=False,
        heads_per_row=spec.num_kv_heads,
        rows_per_token=1,
        sent_runs=SentRuns(np.array(first_sent, np.int64), np.array(sent_counts, np.int64)),
        send_counts=_only_for(target, sum(sent_counts), layout.ranks),
        receive_counts=_only_for(source, sum(tokens_received), layout.ranks),
        placed_runs=PlacedRuns(
            np.arange(len(counts)) * num_columns, np.cumsum(counts) - counts, counts
        ),
        num_columns=num_columns,
    )
    return PlanStage(exchange, tuple(jobs))


def _only_for(rank: int, count: int, ranks: int) -> tuple[int, ...]:
    return (0,) * rank + (count,) + (0,) * (ranks - rank - 1)


def _needed_keys(
    spec: AttentionSpec, rows: BatchRows, key_rank: int, query_rank: int
) -> list[BufferRange]:
    """Return the keys of ``key_rank`` that ``query_rank`` needs, with their slots as columns.

    For each segment, those from the first to the last that some query may see.
    """
    query_segments = spec.layout.segments[query_rank]
    if not query_segments:
        return []
    query_stops = np.array([stop for _, stop in query_segments])

    needed = []
    for segment in spec.layout.segments_of_rank[key_rank]:
        # The first segment with a query that is not before the first key.
        number = int(np.searchsorted(query_stops, segment.start, "right"))
        if number == len(query_segments):
            continue
        first_query = max(query_segments[number][0], segment.start)
        document = rows.document_of(first_query)
        first_key = document.start + spec.first_visible_key(first_query - document.start)

        start = max(segment.start, first_key)
        stop = min(segment.stop, int(query_stops[-1]))
        if start < stop:
            needed.append(BufferRange(start, stop, segment.slot + start - segment.start))
    return needed
