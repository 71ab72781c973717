"""Each KV head's own stripes from all ranks, and a halo of the local band from the neighbors.

What moves is about what is visible, whatever the number of ranks. See :mod:`.near_far` for the
words.
"""

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from ...attention.patterns import Blocks, ClosedFormPattern, Pattern, Selector
from ..layout import Layout
from .gather import all_gather_counts
from .halo import halo_stage
from .kv_schedule import KVSchedule
from .near_far import NearFarRules, PlacedRanges, ReceivedRows
from .plan import (
    AttentionSpec,
    BatchRows,
    Document,
    Exchange,
    PlanStage,
    SentRuns,
    TileJob,
    TokenRanges,
    tile_jobs,
)
from .ranges import Ranges


class StripesSchedule(KVSchedule):
    """Far keys (stripes, the first tokens) are gathered, head by head; the rest comes as a halo.

    Far keys that are further back than any near rule reaches are visible to the whole segment, so
    their tiles need no mask. All visible keys closer than that, stripes too, come with the halo, so
    that no pair counts twice.
    """

    name = "stripes"
    is_preferred = True

    def unsupported_reason(self, pattern: Pattern | Selector | None) -> str | None:
        if not isinstance(pattern, ClosedFormPattern):
            return "lists of blocks have no stripes; use ring"
        return None

    def num_stages(self, ranks: int) -> int:
        return 3

    def stages(self, spec: AttentionSpec, rank: int) -> Iterator[PlanStage]:
        yield _own_segments_stage(spec, rank)
        rules = NearFarRules(spec)
        if spec.model_has_near_rules:
            yield halo_stage(spec, rules, rank)
        if spec.model_has_far_rules and any(_crossing(rows, spec.layout) for rows in spec.rows):
            yield _far_stage(spec, rules, rank)


def _own_segments_stage(spec: AttentionSpec, rank: int) -> PlanStage:
    """Return the stage of the pairs inside each segment: the halo has the segments before it."""
    jobs: list[TileJob] = []
    segments = [
        TokenRanges.of_segments([segment], spec) for segment in spec.layout.segments_of_rank[rank]
    ]
    for rows in spec.rows:
        for tokens in segments:
            jobs += tile_jobs(tokens, tokens, rows, is_first=True)
    return PlanStage(None, tuple(jobs))


def _crossing(rows: BatchRows, layout: Layout) -> list[Document]:
    """Return the documents that are in more than one segment; only their far keys move."""
    return [document for document in rows.documents if not layout.in_one_segment(*document)]


def _far_stage(spec: AttentionSpec, rules: NearFarRules, rank: int) -> PlanStage:
    """Return the stage of the far keys.

    A rank's message holds, for each row of the batch and group of heads in turn, its positions in
    order.
    """
    layout = spec.layout
    length = layout.lengths[rank]
    rows_per_token = spec.num_kv_heads // rules.far_heads_per_row
    segment_slots = np.array([segment.slot for segment in layout.segments_in_order])

    jobs: list[TileJob] = []
    received = ReceivedRows(layout.ranks)
    first_sent, sent_counts = [], []
    num_columns = 0
    for rows in spec.rows:
        far_keys = rules.far_keys(_crossing(rows, layout))
        num_columns = max([num_columns, *map(len, far_keys)])
        jobs += _far_jobs(spec, rules, rank, rows, far_keys)
        placed = [PlacedRanges.place(ranges, layout) for ranges in far_keys]
        for row in rows.numbers:
            for group, ranges in enumerate(placed):
                received.add(row * rows_per_token + group, 0, ranges)

                is_own = ranges.rank == rank
                segment = ranges.segment[is_own]
                slot = (
                    segment_slots[segment] + ranges.start[is_own] - layout.segment_starts[segment]
                )
                first_sent.append((row * length + slot) * rows_per_token + group)
                sent_counts.append(ranges.count[is_own])

    receive_counts = all_gather_counts(received.counts)
    exchange = Exchange(
        is_all_gather=True,
        heads_per_row=rules.far_heads_per_row,
        rows_per_token=rows_per_token,
        sent_runs=SentRuns(np.concatenate(first_sent), np.concatenate(sent_counts)),
        send_counts=(int(receive_counts[rank]),) * layout.ranks,
        receive_counts=tuple(receive_counts.tolist()),
        placed_runs=received.placed_runs(num_columns, receive_counts),
        num_columns=num_columns,
    )
    return PlanStage(exchange, tuple(jobs))


def _far_jobs(
    spec: AttentionSpec, rules: NearFarRules, rank: int, rows: BatchRows, far_keys: list[Ranges]
) -> Iterator[TileJob]:
    """Yield the tiles of each segment of ``rank`` and the far keys before its near rules' reach."""
    for segment in spec.layout.segments_of_rank[rank]:
        document = rows.document_of(segment.start)
        if document.start == segment.start:
            continue  # nothing of it is before the segment

        columns_of_heads = []
        for head in range(spec.num_kv_heads):
            keys = far_keys[head // rules.far_heads_per_row]
            near_edge = rules.near_edge(head, segment.start - document.start)
            columns_of_heads.append(
                (keys.count_below(document.start), keys.count_below(document.start + near_edge))
            )

        first_head = 0
        num_queries = min(segment.stop, document.stop) - segment.start
        for (first, stop), same in groupby(
            columns_of_heads
        ):  # heads with the same keys share tiles
            kv_heads = slice(first_head, first_head + len(list(same)))
            first_head = kv_heads.stop
            if first == stop:
                continue
            num_keys = stop - first
            yield TileJob(
                batch=rows.batch,
                kv_heads=kv_heads,
                query_slots=slice(segment.slot, segment.slot + num_queries),
                key_columns=slice(first, stop),
                document=document,
                # All keys are seen, as if they were just before the queries.
                q_positions=Blocks(num_keys, 1, num_queries),
                k_positions=Blocks(0, 1, num_keys),
                sees_all=True,
            )
