"""The halo: the keys just before a segment that its queries see, from the ranks that hold them."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from ...attention.patterns import Blocks
from ..layout import Segment
from .near_far import NearFarRules, PlacedRanges, ReceivedRows
from .plan import AttentionSpec, BatchRows, BufferRange, Exchange, PlanStage, SentRuns, TileJob
from .ranges import Ranges, as_progressions


def halo_stage(spec: AttentionSpec, rules: NearFarRules, rank: int) -> PlanStage:
    """Return the stage of the halos of all segments of ``rank``.

    A rank's message holds, for each segment of the receiver in turn, the rows of the batch, the
    groups of heads and the positions in order. A key may be in it twice, for two segments.
    """
    layout = spec.layout
    rows_per_token = spec.num_kv_heads // rules.near_heads_per_row

    jobs: list[TileJob] = []
    received = ReceivedRows(layout.ranks)
    first_column = 0  # of the segment's halo; those of a rank's segments are side by side
    for segment in layout.segments_of_rank[rank]:
        longest = 0
        for rows in spec.rows:
            halos = rules.halos(rows, segment.start, segment.stop)
            longest = max(longest, *map(len, halos))
            placed = [PlacedRanges.place(ranges, layout) for ranges in halos]
            for row in rows.numbers:
                for group, ranges in enumerate(placed):
                    received.add(row * rows_per_token + group, first_column, ranges)
            jobs += _halo_jobs(spec, rules, rows, segment, first_column, halos)
        first_column += longest

    sent_runs, send_counts, distinct_counts = _sent_rows(spec, rules, rank)
    exchange = Exchange(
        is_all_gather=False,
        heads_per_row=rules.near_heads_per_row,
        rows_per_token=rows_per_token,
        sent_runs=sent_runs,
        send_counts=send_counts,
        receive_counts=tuple(received.counts.tolist()),
        placed_runs=received.placed_runs(first_column, received.counts),
        num_columns=first_column,
        distinct_counts=distinct_counts,
    )
    return PlanStage(exchange, tuple(jobs))


def _sent_rows(
    spec: AttentionSpec, rules: NearFarRules, rank: int
) -> tuple[SentRuns, tuple[int, ...], tuple[int, ...]]:
    """Return the rows that ``rank`` sends, their number by rank, and by receiving segment."""
    layout = spec.layout
    length = layout.lengths[rank]
    rows_per_token = spec.num_kv_heads // rules.near_heads_per_row

    first_rows: list[int] = []
    counts: list[int] = []
    rows_for_segment = []
    send_counts = np.zeros(layout.ranks, np.int64)
    for receiver in _halo_receivers(spec, rules, rank):
        already_sent = sum(counts)
        for rows in spec.rows:
            halos = rules.halos(rows, receiver.start, receiver.stop)
            parts = [
                (group, part)
                for group, ranges in enumerate(halos)
                for part in _held_parts(ranges, layout.segments_of_rank[rank])
            ]
            for row in rows.numbers:
                for group, part in parts:
                    first_rows.append((row * length + part.column) * rows_per_token + group)
                    counts.append(part.stop - part.start)
        rows_for_segment.append(sum(counts) - already_sent)
        send_counts[receiver.rank] += rows_for_segment[-1]

    sent_runs = SentRuns(np.array(first_rows, np.int64), np.array(counts, np.int64))
    return sent_runs, tuple(send_counts.tolist()), tuple(rows_for_segment)


def _halo_receivers(spec: AttentionSpec, rules: NearFarRules, rank: int) -> list[Segment]:
    """Return the segments to whose halo ``rank`` may have to give: by rank, then in order."""
    layout = spec.layout
    receivers = set()
    for segment in layout.segments_of_rank[rank]:
        within_reach = [segment.start + 1, segment.stop + rules.near_reach_tokens]
        first, last = np.searchsorted(layout.segment_starts, within_reach)
        receivers |= set(layout.segments_in_order[first:last])
    return sorted(receivers, key=lambda segment: (segment.rank, segment.start))


def _held_parts(ranges: Ranges, segments: list[Segment]) -> Iterator[BufferRange]:
    """Yield the parts of ``ranges`` that are in a rank's segments, with slots as columns."""
    for segment in segments:
        for start, stop in ranges.clip(segment.start, segment.stop).pairs():
            yield BufferRange(start, stop, segment.slot + start - segment.start)


def _halo_jobs(
    spec: AttentionSpec,
    rules: NearFarRules,
    rows: BatchRows,
    segment: Segment,
    first_column: int,
    halos: list[Ranges],
) -> Iterator[TileJob]:
    """Yield the tiles of a segment and its halo: only the segment's first document has one."""
    document = rows.document_of(segment.start)
    num_queries = min(segment.stop, document.stop) - segment.start
    q_positions = Blocks(segment.start - document.start, 1, num_queries)

    first_head = 0
    for pairs, same in groupby(halos, key=Ranges.pairs):  # heads with the same halo share tiles
        kv_heads = slice(first_head, first_head + len(list(same)) * rules.near_heads_per_row)
        first_head = kv_heads.stop
        column = first_column
        positions = [(start - document.start, stop - document.start) for start, stop in pairs]
        for k_positions in as_progressions(positions, spec.allows_progression):
            key_columns = slice(column, column + len(k_positions))
            column = key_columns.stop
            yield TileJob(
                batch=rows.batch,
                kv_heads=kv_heads,
                query_slots=slice(segment.slot, segment.slot + num_queries),
                key_columns=key_columns,
                document=document,
                q_positions=q_positions,
                k_positions=k_positions,
            )
