"""What one rank sends, receives and computes for one attention, found from the layout alone.

A :class:`Plan` is a list of stages. Each has an :class:`Exchange`, which fills a buffer with keys
and values of other ranks, and :class:`TileJob` s, the tiles that can be computed once it is full. A
KV schedule (:mod:`.kv_schedule`) makes the stages.

Words: a *slot* is the place of a token among those of its rank, a *column* the place of a token in
a buffer, and a *KV row* what a message is made of: key and value of one token, for some of its
heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...attention.patterns import Blocks, ClosedFormPattern, Rule
from ...attention.softmax.tile_batch import Document, TileBatch, TilePlace
from ..layout import Layout, Segment
from .heads import HeadSplit
from .ranges import as_progressions, expand

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class BatchRows:
    """Successive rows of the batch whose documents begin at the same tokens."""

    first_row: int
    stop_row: int
    document_starts: tuple[int, ...]
    """The first token of each document, from 0 on."""
    length: int
    """Number of tokens of a row."""

    @property
    def batch(self) -> slice:
        """The rows, as an index into the batch."""
        return slice(self.first_row, self.stop_row)

    @property
    def numbers(self) -> range:
        """The numbers of the rows."""
        return range(self.first_row, self.stop_row)

    @property
    def documents(self) -> list[Document]:
        """All documents of a row, in order."""
        return [self.document(number) for number in range(len(self.document_starts))]

    def document(self, number: int) -> Document:
        """Return the document of that number, from 0."""
        is_last = number + 1 == len(self.document_starts)
        stop = self.length if is_last else self.document_starts[number + 1]
        return Document(self.document_starts[number], stop)

    def document_of(self, position: int) -> Document:
        """Return the document that has the token at ``position``."""
        return self.document(self.overlapping(position, position + 1)[0])

    def overlapping(self, start: int, stop: int) -> range:
        """Return the numbers of the documents that have some of the tokens in ``[start, stop)``."""
        first, last = np.searchsorted(self._starts, [start, stop - 1], "right")
        return range(int(first) - 1, int(last))

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.array(self.document_starts)


def batch_rows(documents: Tensor | None, batch: int, length: int) -> tuple[BatchRows, ...]:
    """Return the rows of a batch, grouped where successive rows have the same documents.

    Args:
        documents: ids ``[batch, length]``; None if every row is a single document.
    """
    from ...attention.documents import document_spans

    if documents is None or not batch:
        return (BatchRows(0, batch, (0,), length),)

    starts_of_rows = [
        tuple(start for _, start, _ in spans)
        for _, spans in groupby(document_spans(documents), key=itemgetter(0))
    ]
    groups = []
    first_row = 0
    for document_starts, same in groupby(starts_of_rows):
        stop_row = first_row + len(list(same))
        groups.append(BatchRows(first_row, stop_row, document_starts, length))
        first_row = stop_row
    return tuple(groups)


@dataclass(frozen=True)
class AttentionSpec:
    """An attention over ranks that have the same heads: what a KV schedule makes stages for.

    Args:
        layout: of the sequence over these ranks.
        pattern: of these ranks' KV heads, the first of which is its head 0; None if any key may be
            seen (lists of blocks).
        num_kv_heads: of these ranks.
        rows: of the whole batch, in order.
        model_has_near_rules, model_has_far_rules: whether the pattern of any head of the model has
            a rule with a finite reach (near), and one that shows keys at any distance (far). Ranks
            with other heads take part in the same collectives, so these say which collectives there
            are.
    """

    layout: Layout
    pattern: ClosedFormPattern | None
    num_kv_heads: int
    rows: tuple[BatchRows, ...]
    model_has_near_rules: bool
    model_has_far_rules: bool

    @property
    def batch_size(self) -> int:
        """Number of rows of the batch."""
        return self.rows[-1].stop_row

    @cached_property
    def _rules(self) -> set[Rule] | None:
        """The rules of all heads; None if any key may be seen."""
        if self.pattern is None:
            return None
        return {rule for head in range(self.num_kv_heads) for rule in self.pattern.rules(head)}

    @cached_property
    def _has_finite_reach(self) -> bool:
        """Whether no key is visible beyond a certain distance."""
        return self._rules is not None and all(rule.reach is not None for rule in self._rules)

    @cached_property
    def _stripe_blocks(self) -> set[int] | None:
        """The block sizes of all stripes; None if any key may be seen."""
        if self._rules is None:
            return None
        return {rule.block for rule in self._rules if rule.step > 1}

    def allows_progression(self, size: int) -> bool:
        """Return whether keys may be given as blocks of ``size`` tokens at equal distances.

        Every kernel supports this for the blocks of the pattern's own stripes, and for no others.
        """
        return self._stripe_blocks is not None and self._stripe_blocks <= {size}

    def first_visible_key(self, query: int) -> int:
        """Return a position of a document before which no query from ``query`` on sees anything."""
        if not self._has_finite_reach:
            return 0
        return min((rule.first_key(query) for rule in self._rules or ()), default=query)


class Traffic(NamedTuple):
    """How many numbers, of the dtype of queries, keys and values, a rank sends and receives."""

    sent: int
    received: int

    @property
    def reversed(self) -> Traffic:
        """The traffic of the same exchange in the other direction."""
        return Traffic(self.received, self.sent)

    def times(self, factor: int) -> Traffic:
        """Return the traffic of messages ``factor`` times as large."""
        return Traffic(self.sent * factor, self.received * factor)

    @staticmethod
    def total(exchanges: Iterable[Traffic]) -> Traffic:
        """Return the sum of all exchanges."""
        sent = 0
        received = 0
        for traffic in exchanges:
            sent += traffic.sent
            received += traffic.received
        return Traffic(sent, received)


class SentRuns(NamedTuple):
    """The KV rows that a rank sends, as runs: arrays int64 ``[runs]``."""

    first_row: np.ndarray
    """The first row of each run, counted over ``[batch, local time, rows_per_token]``."""
    length: np.ndarray
    """Number of tokens of each run; rows of successive tokens are ``rows_per_token`` apart."""


class PlacedRuns(NamedTuple):
    """Where the received KV rows belong, as runs: arrays int64 ``[runs]``."""

    first_column: np.ndarray
    """The first column of each run, counted over ``[batch, rows_per_token, columns]``."""
    first_row: np.ndarray
    """The received row that belongs there."""
    length: np.ndarray
    """Number of successive columns, and rows, of each run."""


@dataclass(frozen=True, eq=False)
class Exchange:
    """KV rows that ranks exchange; a row has all heads of a token, a single one, or some.

    Args:
        is_all_gather: whether every rank gets the same rows from this one.
        heads_per_row: KV heads of a row.
        rows_per_token: ``num_kv_heads / heads_per_row``.
        sent_runs: the rows that this rank sends, by destination, and by column of the buffer there.
        send_counts, receive_counts: number of rows for and from each rank; in an all-gather they
            may include padding.
        placed_runs: where the received rows belong.
        num_columns: of the buffer ``[batch, rows_per_token, columns, heads_per_row, dim]``.
    """

    is_all_gather: bool
    heads_per_row: int
    rows_per_token: int
    sent_runs: SentRuns
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    placed_runs: PlacedRuns
    num_columns: int
    distinct_counts: tuple[int, ...] = ()
    """Sizes of groups of sent rows without duplicates; each can be added with one index_add_.

    Empty if the rows for each destination are such a group.
    """
    _indices: dict[torch.device, ExchangeIndex] = field(default_factory=dict, repr=False)

    def traffic(self, rank: int, dim: int) -> Traffic:
        """Return what ``rank`` sends to and receives from others.

        Args:
            dim: of a key and its value together.
        """
        sent_rows = sum(self.send_counts) - self.send_counts[rank]
        received_rows = sum(self.receive_counts) - self.receive_counts[rank]
        return Traffic(sent_rows, received_rows).times(self.heads_per_row * dim)

    @property
    def is_even(self) -> bool:
        """Whether the same number of rows comes from every rank."""
        return len(set(self.receive_counts)) == 1

    @property
    def received_rows(self) -> int:
        """Number of rows that arrive at this rank, including its own and padding."""
        return sum(self.receive_counts)

    @property
    def buffer_rows(self) -> int:
        """Number of KV rows of the buffer, for one row of the batch."""
        return self.num_columns * self.rows_per_token

    def index_on(self, device: torch.device) -> ExchangeIndex:
        """Return the rows that move one by one, as tensors on ``device``; made once a device."""
        import torch

        if device not in self._indices:
            first_column, first_row, count = self.placed_runs
            sent_rows = expand(*self.sent_runs, self.rows_per_token)
            columns = expand(first_column, count)
            received_rows = expand(first_row, count)
            in_order = np.array_equal(columns, received_rows)
            self._indices[device] = ExchangeIndex(
                torch.from_numpy(sent_rows).to(device),
                torch.from_numpy(columns).to(device),
                torch.from_numpy(received_rows).to(device),
                in_order and len(received_rows) == self.received_rows,
            )
        return self._indices[device]


class ExchangeIndex(NamedTuple):
    """What an :class:`Exchange` moves, row by row: int64 ``[rows]``."""

    sent_rows: Tensor
    """The number, among this rank's rows, of each row to send."""
    columns: Tensor
    """Every column of the buffer that is filled, ..."""
    received_rows: Tensor
    """... and the received row that fills it."""
    is_in_order: bool
    """Whether the received rows are those of the first columns, in order."""


@dataclass(frozen=True)
class TileJob(TilePlace):
    """A tile: queries of this rank against the keys in columns of a buffer.

    Args:
        kv_heads: KV heads, with the query heads that read them.
        is_first: whether these queries have no result from an earlier tile.
        sees_all: every query sees every key, whatever the pattern. ``q_positions`` and
            ``k_positions`` are then stand-ins, under which a causal mask shows everything.
    """

    kv_heads: slice
    is_first: bool = False
    sees_all: bool = False


@dataclass(frozen=True)
class TileGroup:
    """Tiles of a stage that are computed together."""

    kv_heads: slice
    sees_all: bool
    tiles: TileBatch


@dataclass(frozen=True)
class PlanStage:
    """Tiles, and the exchange that they wait for: None for tiles of this rank's own keys."""

    exchange: Exchange | None
    jobs: tuple[TileJob, ...]

    @cached_property
    def groups(self) -> list[TileGroup]:
        """The tiles, as few groups as possible, in an order that keeps that of a query's tiles."""
        of_document: dict[tuple, list[TileJob]] = {}
        for job in self.jobs:
            rows = (job.batch.start, job.batch.stop)
            of_document.setdefault((rows, job.document), []).append(job)

        jobs_of_group: dict[tuple, list[TileJob]] = {}
        for jobs in of_document.values():  # tiles of different documents share no tokens
            for job, turn in zip(jobs, _turns(jobs), strict=True):
                heads = (job.kv_heads.start, job.kv_heads.stop)
                # A kernel reads keys that are side by side, or blocks at one distance.
                keys = job.k_positions
                distance = (1, 1) if keys.is_contiguous else (keys.step, keys.size)
                key = (turn, *heads, job.sees_all, job.is_first, distance)
                jobs_of_group.setdefault(key, []).append(job)
        return [
            TileGroup(jobs[0].kv_heads, jobs[0].sees_all, TileBatch(tuple(jobs), jobs[0].is_first))
            for _, jobs in sorted(jobs_of_group.items(), key=itemgetter(0))
        ]


def _turns(jobs: list[TileJob]) -> list[int]:
    """Return when to compute each tile of a document, as soon as possible.

    Tiles that share queries, or keys, have different turns, and keep their order.
    """
    # [jobs, (heads, queries, keys), (start, stop)]
    ranges = np.array(
        [
            [(part.start, part.stop) for part in (job.kv_heads, job.query_slots, job.key_columns)]
            for job in jobs
        ]
    )
    turns = np.zeros(len(jobs), np.int64)
    for number in range(1, len(jobs)):
        before = ranges[:number]
        overlaps = (before[..., 0] < ranges[number, :, 1]) & (before[..., 1] > ranges[number, :, 0])
        conflicts = overlaps[:, 0] & (overlaps[:, 1] | overlaps[:, 2])
        if conflicts.any():
            turns[number] = turns[:number][conflicts].max() + 1
    return turns.tolist()


class PositionRun(NamedTuple):
    """Positions of one document whose tokens are in a buffer side by side."""

    positions: Blocks
    columns: slice

    @property
    def start(self) -> int:
        """The first position."""
        return self.positions.first_position

    @property
    def stop(self) -> int:
        """The position after the last."""
        return self.positions.end_position

    def clip(self, start: int, stop: int) -> PositionRun:
        """Return the run without the positions outside of ``[start, stop)``.

        A progression is returned as it is: the pattern hides what is not visible.
        """
        if not self.positions.is_contiguous:
            return self
        start = max(start, self.start)
        stop = min(stop, self.stop)
        column = self.columns.start + start - self.start
        return PositionRun(Blocks(start, 1, stop - start), slice(column, column + stop - start))


class BufferRange(NamedTuple):
    """Tokens ``start`` to ``stop - 1`` of the sequence, in a buffer from ``column`` on."""

    start: int
    stop: int
    column: int


class TokenRanges:
    """Which tokens of the sequence a buffer has: ascending ranges, one after another.

    A rank's own tokens are such a buffer, whose columns are its slots.
    """

    def __init__(self, ranges: Iterable[BufferRange], spec: AttentionSpec):
        self.ranges = list(ranges)
        self.spec = spec

    @classmethod
    def of_segments(cls, segments: Iterable[Segment], spec: AttentionSpec) -> TokenRanges:
        """Return the tokens of segments of one rank."""
        return cls((BufferRange(part.start, part.stop, part.slot) for part in segments), spec)

    def documents(self, rows: BatchRows) -> list[Document]:
        """Return the documents that have some of these tokens, in order."""
        numbers = set()
        for part in self.ranges:
            numbers |= set(rows.overlapping(part.start, part.stop))
        return [rows.document(number) for number in sorted(numbers)]

    def in_document(self, document: Document) -> list[PositionRun]:
        """Return the tokens of a document, by their positions in it."""
        clipped = []
        for part in self.ranges:
            start = max(part.start, document.start)
            stop = min(part.stop, document.stop)
            if start < stop:
                clipped.append(BufferRange(start, stop, part.column + start - part.start))
        if not clipped:
            return []

        positions = [(part.start - document.start, part.stop - document.start) for part in clipped]
        runs = []
        column = clipped[0].column
        for progression in as_progressions(positions, self.spec.allows_progression):
            stop_column = column + len(progression)
            runs.append(PositionRun(progression, slice(column, stop_column)))
            column = stop_column
        return runs


def tile_jobs(
    queries: TokenRanges, keys: TokenRanges, rows: BatchRows, is_first: bool = False
) -> Iterator[TileJob]:
    """Yield a tile for each run of queries and each run of keys of the same document they may see.

    Args:
        is_first: whether no other keys came before these.
    """
    spec = queries.spec
    for document in queries.documents(rows):
        key_runs = keys.in_document(document)
        if not key_runs:
            continue
        for query_run in queries.in_document(document):
            first_key = spec.first_visible_key(query_run.start)
            visible = [
                run.clip(first_key, query_run.stop)
                for run in key_runs
                if run.start < query_run.stop and run.stop > first_key
            ]
            for number, key_run in enumerate(visible):
                yield TileJob(
                    batch=rows.batch,
                    kv_heads=slice(0, spec.num_kv_heads),
                    query_slots=query_run.columns,
                    key_columns=key_run.columns,
                    document=document,
                    q_positions=query_run.positions,
                    k_positions=key_run.positions,
                    is_first=is_first and number == 0,
                )


def own_keys_stage(spec: AttentionSpec, rank: int) -> PlanStage:
    """Return the stage of a rank's queries and its own keys, for which nothing moves."""
    own_tokens = TokenRanges.of_segments(spec.layout.segments_of_rank[rank], spec)
    jobs = [
        job for rows in spec.rows for job in tile_jobs(own_tokens, own_tokens, rows, is_first=True)
    ]
    return PlanStage(None, tuple(jobs))


@dataclass(frozen=True, eq=False)
class Plan:
    """What one rank does.

    Args:
        batch_size: number of rows.
        rank: this rank, among those that have the same heads.
        stages: exchanges between the ranks that have the same heads, and tiles.
        head_split: how heads are exchanged before and after the stages; None if ranks have all
            heads.
        first_kv_head: the first KV head that this rank has in the stages.
        peers: the ranks that have the same heads, by their numbers in the group.
        key: a number of all that the plan depends on, the same on every rank.
    """

    batch_size: int
    rank: int
    stages: tuple[PlanStage, ...]
    head_split: HeadSplit | None
    first_kv_head: int
    peers: range
    key: int

    @property
    def exchanges(self) -> list[Exchange]:
        """The exchanges of all stages, in order."""
        return [stage.exchange for stage in self.stages if stage.exchange is not None]

    def traffic(self, key_dim: int, value_dim: int) -> tuple[Traffic, Traffic]:
        """Return what moves in forward and in backward.

        In backward keys and values move once more, and their gradients return to their ranks.
        """
        exchanges = [part.traffic(self.rank, key_dim + value_dim) for part in self.exchanges]
        forward = list(exchanges)
        backward = [*exchanges, *(traffic.reversed for traffic in exchanges)]

        if self.head_split is not None:
            q_heads, kv_heads = (
                Traffic(*self.head_split.heads_moved(heads)).times(self.batch_size)
                for heads in (self.head_split.query_heads, self.head_split.kv_heads)
            )
            inputs = [q_heads.times(key_dim), kv_heads.times(key_dim + value_dim)]
            out = q_heads.times(value_dim)
            forward += [*inputs, out.reversed]
            backward += [out, *(traffic.reversed for traffic in inputs)]
        return Traffic.total(forward), Traffic.total(backward)

    def buffer(self, key_dim: int, value_dim: int) -> int:
        """Return how many numbers of other ranks' keys and values are held at a time, at most.

        They are those of a stage and of the next one, which is on its way meanwhile.
        """
        heads = [part.buffer_rows * part.heads_per_row for part in self.exchanges]
        most = max((current + following for current, following in pairwise([0, *heads])), default=0)
        return most * self.batch_size * (key_dim + value_dim)
