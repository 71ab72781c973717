"""How keys reach the queries of other ranks: each schedule as the stages of one rank's plan.

``ring``     from each other rank in turn, one at a time, what it has for this one
``gather``   all keys from all ranks at once
``stripes``  what a head sees however far is gathered, head by head; the rest comes from the neighbours, as a halo

In each, every pair of a query and a key that it sees falls into exactly one tile. The first stage, on this rank's own keys, has
all its queries; so has the only one of ``gather``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from ...attention.patterns import ClosedFormPattern
from ...attention.patterns.rules import Blocks, Rule
from ..layout import Layout
from .plan import AttentionSpec, BatchRows, Exchange, PlanStage, TileJob, TokenRanges, tiles
from .ranges import Ranges, progressions

_PADDING = (
    1.1  # an all-gather is faster than messages of unequal length, as long as it is hardly longer
)


def _placed(layout: Layout, rank: int) -> list[tuple[int, int, int]]:
    return [(start, stop, slot) for start, stop, _, slot in layout.segments_of_rank[rank]]


def own_keys(problem: AttentionSpec, rank: int) -> Iterator[PlanStage]:
    """Of a single rank."""
    own = TokenRanges(_placed(problem.layout, rank), problem)
    yield PlanStage(
        None,
        tuple(job for rows in problem.rows for job in tiles(own, own, rows, problem, first=True)),
    )


def ring(problem: AttentionSpec, rank: int) -> Iterator[PlanStage]:
    """Rank ``r`` computes with its own keys, then those of ``r - 1``, ``r - 2``, ...: Ring Attention (arXiv 2310.01889).

    Each rank sends what is needed straight to the one that needs it, and not what lies after all its queries or before their
    reach; the gradients of keys go straight home, where they are summed in fp32.
    """
    layout, ranks = problem.layout, problem.layout.ranks
    yield from own_keys(problem, rank)
    own = TokenRanges(_placed(layout, rank), problem)
    for away in range(1, ranks):
        source, target = (rank - away) % ranks, (rank + away) % ranks
        first, count, jobs, lines = [], [], [], []
        for rows in problem.rows:
            outgoing = _needed(problem, rows, rank, target)
            for row in range(rows.first, rows.stop):
                first += [row * layout.lengths[rank] + slot for _, _, slot in outgoing]
                count += [stop - start for start, stop, _ in outgoing]
            column, pieces = 0, []
            for start, stop, _ in _needed(problem, rows, source, rank):
                pieces.append((start, stop, column))
                column += stop - start
            lines += [column] * (rows.stop - rows.first)
            jobs += tiles(own, TokenRanges(pieces, problem), rows, problem)
        count_of_line, columns = np.array(lines), max(lines)
        before = np.cumsum(count_of_line) - count_of_line
        yield PlanStage(
            Exchange(
                everyone=False,
                heads=problem.kv_heads,
                per_token=1,
                sent=(np.array(first, np.int64), np.array(count, np.int64)),
                send=_to(target, sum(count), ranks),
                receive=_to(source, sum(lines), ranks),
                place=(np.arange(len(lines)) * columns, before, count_of_line),
                columns=columns,
            ),
            tuple(jobs),
        )


def _to(rank: int, rows: int, ranks: int) -> tuple[int, ...]:
    return (0,) * rank + (rows,) + (0,) * (ranks - rank - 1)


def _needed(
    problem: AttentionSpec, rows: BatchRows, holder: int, asker: int
) -> list[tuple[int, int, int]]:
    """Of each segment of ``holder`` the part ``(start, stop, slot)`` from the first key to the last that ``asker`` sees."""
    queries, found = problem.layout.segments[asker], []
    if not queries:
        return []
    stops = np.array([stop for _, stop in queries])
    for start, stop, slot in _placed(problem.layout, holder):
        at = int(
            np.searchsorted(stops, start, "right")
        )  # the first segment with a query that is not before the first key
        if at == len(queries):
            continue
        query = max(queries[at][0], start)
        document = rows.document_of(query)[0]
        first = max(start, document + problem.earliest(query - document))
        last = min(stop, int(stops[-1]))
        if first < last:
            found.append((first, last, slot + first - start))
    return found


def gather(problem: AttentionSpec, rank: int) -> Iterator[PlanStage]:
    """All keys on every rank, as Llama 3 was trained (arXiv 2407.21783, sec. 3.3.2)."""
    layout = problem.layout
    batch, own = problem.batch, layout.lengths[rank]
    receive = _shares(batch * np.array(layout.lengths))
    first = np.cumsum(receive) - receive
    start, stop, owner, slot = np.array(layout.segments_in_order, np.int64).T
    lengths = np.array(layout.lengths)
    row = np.arange(batch)[:, None]
    place = (
        row * layout.length + start,
        first[owner] + row * lengths[owner] + slot,
        np.broadcast_to(stop - start, (batch, len(start))),
    )
    exchange = Exchange(
        everyone=True,
        heads=problem.kv_heads,
        per_token=1,
        sent=(np.arange(batch) * own, np.full(batch, own)),
        send=(int(receive[rank]),) * layout.ranks,
        receive=tuple(receive.tolist()),
        place=tuple(x.ravel() for x in place),
        columns=layout.length,
    )
    queries, keys = (
        TokenRanges(_placed(layout, rank), problem),
        TokenRanges([(0, layout.length, 0)], problem),
    )
    yield PlanStage(
        exchange,
        tuple(
            job for rows in problem.rows for job in tiles(queries, keys, rows, problem, first=True)
        ),
    )


def _shares(rows: np.ndarray) -> np.ndarray:
    """What each rank contributes where every rank gets all: as many as the most have, where that is little more."""
    return (
        np.full_like(rows, rows.max()) if len(rows) * rows.max() <= _PADDING * rows.sum() else rows
    )


def stripes(problem: AttentionSpec, rank: int) -> Iterator[PlanStage]:
    """What a KV head sees however far - its stripes, the first tokens - from all ranks, and the rest from the neighbours.

    Below the reach of the other rules every key of the first kind is seen by every query that comes after it: a tile without a
    mask. The halo holds all from there up to the segment, of both kinds, so that no pair counts twice.
    """
    segments = [TokenRanges([segment], problem) for segment in _placed(problem.layout, rank)]
    local = (
        job
        for rows in problem.rows
        for own in segments
        for job in tiles(own, own, rows, problem, first=True)
    )
    yield PlanStage(None, tuple(local))
    split = _NearFarRules(problem)
    if problem.near:
        yield _halo(problem, split, rank)
    if problem.far and any(
        not problem.layout.in_one_segment(*own) for rows in problem.rows for own in rows.documents
    ):
        yield _far(problem, split, rank)


class _NearFarRules:
    """The rules of each head, those with an end to their reach (near) and those without (far)."""

    def __init__(self, problem: AttentionSpec):
        rules = [problem.pattern.rules(head) for head in range(problem.kv_heads)]
        self.pattern = problem.pattern
        self.near = [tuple(rule for rule in own if rule.reach is not None) for own in rules]
        self.far = [tuple(rule for rule in own if rule.reach is None) for own in rules]
        bands = all(len(own) == 1 and own[0].is_band for own in self.near)
        self.near_heads = len(rules) if bands and len(set(self.near)) == 1 else 1
        """KV heads that move together: all where they need the same of the halo, else each for itself."""
        self.far_heads = len(rules) if len(set(self.far)) == 1 else 1

    def edge(self, head: int, query: int) -> int:
        """Where the reach of the near rules begins, from position ``query`` on."""
        return min((rule.first_key(query) for rule in self.near[head]), default=query)

    def halo(self, rows: BatchRows, start: int, stop: int, head: int) -> Ranges:
        """The keys before a segment that its queries see from :meth:`edge` on."""
        document, end = rows.document_of(start)
        query, edge = start - document, self.edge(head, start - document)
        if edge >= query:
            return Ranges.of(())
        if self.near_heads > 1:
            return Ranges.of([(document + edge, start)])
        blocks = self.pattern.need(query, min(stop, end) - document, head)
        return Ranges.of_blocks(blocks, document).clip(document + edge, start)

    def halos(self, rows: BatchRows, start: int, stop: int) -> list[Ranges]:
        """For each group of heads that move together."""
        return [
            self.halo(rows, start, stop, head) for head in range(0, len(self.near), self.near_heads)
        ]


def _halo(problem: AttentionSpec, split: _NearFarRules, rank: int) -> PlanStage:
    layout, per_token = problem.layout, problem.kv_heads // split.near_heads
    own, length = _placed(layout, rank), layout.lengths[rank]
    # In a message: by the segment that asks, the row of the batch, the head and the position. Two may ask for the same.
    first, count, unique, send = [], [], [], np.zeros(layout.ranks, np.int64)
    for target, start, stop in _halo_receivers(problem, split, rank):
        before = sum(count)
        for rows in problem.rows:
            halos = enumerate(split.halos(rows, start, stop))
            parts = [
                (head, a, b, slot) for head, ranges in halos for a, b, slot in _within(ranges, own)
            ]
            for row in range(rows.first, rows.stop):
                first += [(row * length + slot) * per_token + head for head, _, _, slot in parts]
                count += [b - a for _, a, b, _ in parts]
        unique.append(sum(count) - before)
        send[target] += unique[-1]

    place, jobs, region = [], [], 0
    received = np.zeros(layout.ranks, np.int64)
    for start, stop, slot in own:
        found = [(rows, split.halos(rows, start, stop)) for rows in problem.rows]
        for rows, halos in found:
            parts = [_PlacedRanges.of(ranges, layout) for ranges in halos]
            for row in range(rows.first, rows.stop):
                for head, part in enumerate(parts):
                    place.append(
                        (
                            row * per_token + head,
                            region + part.column,
                            part,
                            received[part.holder] + part.before,
                        )
                    )
                    received = received + part.of_ranks
            jobs += _halo_jobs(problem, split, rows, (start, stop, slot), region, halos)
        region += max(len(ranges) for _, halos in found for ranges in halos)
    begin = np.cumsum(received) - received
    runs = [
        (line * region + column, begin[part.holder] + row, part.count)
        for line, column, part, row in place
    ]
    exchange = Exchange(
        everyone=False,
        heads=split.near_heads,
        per_token=per_token,
        sent=(np.array(first, np.int64), np.array(count, np.int64)),
        send=tuple(send.tolist()),
        receive=tuple(received.tolist()),
        place=_joined(runs),
        columns=region,
        unique=tuple(unique),
    )
    return PlanStage(exchange, tuple(jobs))


def _joined(runs: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Their first columns, first rows and counts, each in one array."""
    none = np.zeros(0, np.int64)
    return tuple(np.concatenate(parts) for parts in zip((none, none, none), *runs, strict=True))


def _halo_receivers(
    problem: AttentionSpec, split: _NearFarRules, rank: int
) -> list[tuple[int, int, int]]:
    """Segments (rank, start, stop), in order, to whose halo ``rank`` may have to give."""
    layout = problem.layout
    reach = max((rule.reach * rule.block for rules in split.near for rule in rules), default=0)
    found = set()
    for start, stop, _ in _placed(layout, rank):
        first, last = np.searchsorted(layout.segment_starts, [start + 1, stop + reach])
        found |= {(holder, a, b) for a, b, holder, _ in layout.segments_in_order[first:last]}
    return sorted(found)


def _within(ranges: Ranges, own: list[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """The parts ``(start, stop, slot)`` of ``ranges`` that are in a rank's segments."""
    for start, stop, slot in own:
        for a, b in ranges.clip(start, stop).pairs():
            yield a, b, slot + a - start


def _halo_jobs(
    problem: AttentionSpec,
    split: _NearFarRules,
    rows: BatchRows,
    segment: tuple[int, int, int],
    column: int,
    halos: list[Ranges],
):
    start, stop, slot = segment
    document = rows.document_of(start)
    queries = min(stop, document[1]) - start
    at, first = Blocks(start - document[0], 1, queries), 0
    for ranges, same in groupby(halos, key=Ranges.pairs):
        heads = slice(first, first + len(list(same)) * split.near_heads)
        first, place = heads.stop, column
        for keys in progressions(
            [(a - document[0], b - document[0]) for a, b in ranges], problem.may_step
        ):
            columns = slice(place, place + len(keys))
            place = columns.stop
            yield TileJob(
                rows.batch, heads, slice(slot, slot + queries), columns, document, at, keys
            )


def _far(problem: AttentionSpec, split: _NearFarRules, rank: int) -> PlanStage:
    layout, per_token = problem.layout, problem.kv_heads // split.far_heads
    slots = np.array([slot for _, _, _, slot in layout.segments_in_order])
    # In a rank's message: by the row of the batch, the head and the position.
    given, sent, place, jobs, columns = np.zeros(layout.ranks, np.int64), [], [], [], 0
    for rows in problem.rows:
        crossing = [own for own in rows.documents if not layout.in_one_segment(*own)]
        keys = [
            _far_keys(crossing, split.far[head])
            for head in range(0, problem.kv_heads, split.far_heads)
        ]
        columns = max([columns, *map(len, keys)])
        jobs += _far_jobs(problem, split, rank, rows, keys)
        parts = [_PlacedRanges.of(ranges, layout) for ranges in keys]
        for row in range(rows.first, rows.stop):
            for head, part in enumerate(parts):
                place.append((row * per_token + head, part, given[part.holder] + part.before))
                mine = part.holder == rank
                slot = (
                    slots[part.segment[mine]]
                    + part.start[mine]
                    - layout.segment_starts[part.segment[mine]]
                )
                sent.append(
                    ((row * layout.lengths[rank] + slot) * per_token + head, part.count[mine])
                )
                given = given + part.of_ranks
    receive = _shares(given)
    begin = np.cumsum(receive) - receive
    exchange = Exchange(
        everyone=True,
        heads=split.far_heads,
        per_token=per_token,
        sent=tuple(np.concatenate(x) for x in zip(*sent, strict=True)),
        send=(int(receive[rank]),) * layout.ranks,
        receive=tuple(receive.tolist()),
        place=_joined(
            [
                (line * columns + part.column, begin[part.holder] + row, part.count)
                for line, part, row in place
            ]
        ),
        columns=columns,
    )
    return PlanStage(exchange, tuple(jobs))


@dataclass(frozen=True, repr=False)
class _FixedRules(ClosedFormPattern):
    """These rules, in every head."""

    given: tuple[Rule, ...]

    def rules(self, head: int) -> tuple[Rule, ...]:
        return self.given


def _far_keys(documents: list[tuple[int, int]], rules: tuple[Rule, ...]) -> Ranges:
    """What ``rules``, whose reach has no end, show of the documents."""
    found = []
    for start, stop in documents if rules else ():
        found += (
            Ranges.of_blocks(_FixedRules(rules).need(0, stop - start, 0), start)
            .clip(start, stop)
            .pairs()
        )
    return Ranges.of(found)


@dataclass(frozen=True)
class _PlacedRanges:
    """Ranges that lie in one segment each, and where they are: arrays with one number for each range."""

    start: np.ndarray
    count: np.ndarray
    column: np.ndarray
    """Tokens of the ranges before it."""
    segment: np.ndarray
    holder: np.ndarray
    before: np.ndarray
    """Tokens of the ranges before it that its holder has."""
    of_ranks: np.ndarray
    """Tokens that each rank has."""

    @classmethod
    def of(cls, ranges: Ranges, layout: Layout) -> "_PlacedRanges":
        """Of any ranges: they are cut where segments begin."""
        ranges = ranges.cut(layout.segment_starts)
        count, segment = (
            ranges.stop - ranges.start,
            np.searchsorted(layout.segment_starts, ranges.start, "right") - 1,
        )
        holder, before = layout.segment_ranks[segment], np.empty_like(count)
        order = np.argsort(holder, kind="stable")
        ends, of_ranks = (
            np.cumsum(count[order]),
            np.bincount(holder, count, layout.ranks).astype(np.int64),
        )
        before[order] = ends - count[order] - (np.cumsum(of_ranks) - of_ranks)[holder[order]]
        return cls(ranges.start, count, np.cumsum(count) - count, segment, holder, before, of_ranks)


def _far_jobs(
    problem: AttentionSpec, split: _NearFarRules, rank: int, rows: BatchRows, keys: list[Ranges]
) -> Iterator[TileJob]:
    for start, stop, slot in _placed(problem.layout, rank):
        document = rows.document_of(start)
        if document[0] == start:
            continue
        found = []
        for head in range(problem.kv_heads):
            own, edge = (
                keys[head // split.far_heads],
                document[0] + split.edge(head, start - document[0]),
            )
            found.append((own.below(document[0]), own.below(edge)))
        first, queries = 0, min(stop, document[1]) - start
        for (begin, end), same in groupby(found):
            heads = slice(first, first + len(list(same)))
            first = heads.stop
            if begin < end:  # all of them are seen, as if they stood before the queries
                at, before = Blocks(end - begin, 1, queries), Blocks(0, 1, end - begin)
                own_slots, columns = slice(slot, slot + queries), slice(begin, end)
                yield TileJob(
                    rows.batch, heads, own_slots, columns, document, at, before, dense=True
                )
