"""What a rank sends, receives and computes for one attention: reckoned from the layout, without a tensor or a message.

A plan is a list of stages. Each has an :class:`Exchange`, which fills a buffer with keys and values of other ranks, and
:class:`TileJob` s, the tiles that are then possible. What makes the stages is in :mod:`.ways`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...attention.documents import document_spans
from ...attention.patterns import ClosedFormPattern, Pattern
from ...attention.patterns.rules import Blocks, Rule
from ..layout import Layout
from .heads import HeadExchange
from .ranges import expand, progressions


@dataclass(frozen=True)
class BatchRows:
    """The documents of some rows of the batch that are cut alike."""

    first: int
    stop: int
    starts: tuple[int, ...]
    """Where documents begin, from 0."""
    length: int

    @property
    def batch(self) -> slice:
        return slice(self.first, self.stop)

    @property
    def documents(self) -> list[tuple[int, int]]:
        return list(zip(self.starts, [*self.starts[1:], self.length], strict=True))

    def document(self, number: int) -> tuple[int, int]:
        return self.starts[number], self.starts[number + 1] if number + 1 < len(
            self.starts
        ) else self.length

    def document_of(self, position: int) -> tuple[int, int]:
        """The one that has ``position``."""
        return self.document(self.overlapping(position, position + 1)[0])

    def overlapping(self, start: int, stop: int) -> range:
        """Numbers of the documents that have some of these tokens."""
        first, last = np.searchsorted(self._starts, [start, stop - 1], "right")
        return range(int(first) - 1, int(last))

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.array(self.starts)


@dataclass(frozen=True)
class AttentionSpec:
    """An attention over ranks.

    Args:
        pattern: of the KV heads, the first of which is head 0; None where any key may be seen.
        rows: of the whole batch, in order.
        near, far: whether any head of the model has rules with an end to their reach, and without: ranks with other heads take
            part in the same collectives.
    """

    layout: Layout
    pattern: Pattern | None
    kv_heads: int
    rows: tuple[BatchRows, ...]
    near: bool
    far: bool

    @property
    def batch(self) -> int:
        return self.rows[-1].stop

    @cached_property
    def _reaches(self) -> list[Rule] | None:
        """All rules, where each has an end to its reach."""
        if not isinstance(self.pattern, ClosedFormPattern):
            return None
        rules = {rule for head in range(self.kv_heads) for rule in self.pattern.rules(head)}
        return None if any(rule.reach is None for rule in rules) else list(rules)

    @cached_property
    def _steps(self) -> set[int] | None:
        """Blocks of the stripes; None for lists of blocks."""
        if self.pattern is None:
            return None
        return {
            rule.block
            for head in range(self.kv_heads)
            for rule in self.pattern.rules(head)
            if rule.step > 1
        }

    def may_step(self, size: int) -> bool:
        """Whether all kernels take blocks of ``size`` at equal distances: those of the stripes, where there are any."""
        return self._steps is not None and self._steps <= {size}

    def earliest(self, query: int) -> int:
        """Before this nothing is seen from position ``query`` of a document on."""
        return (
            min((rule.first_key(query) for rule in self._reaches), default=query)
            if self._reaches is not None
            else 0
        )


class Traffic(NamedTuple):
    """Numbers that move: of the dtype of queries, keys and values."""

    sent: int
    received: int

    @property
    def back(self) -> "Traffic":
        """Of the same way in the other direction."""
        return Traffic(self.received, self.sent)

    def times(self, dim: int) -> "Traffic":
        return Traffic(self.sent * dim, self.received * dim)

    @staticmethod
    def total(parts: "Iterable[Traffic]") -> "Traffic":
        return Traffic(*(sum(numbers) for numbers in zip((0, 0), *parts, strict=True)))


@dataclass(frozen=True, eq=False)
class Exchange:
    """Rows of keys and values on their way: a row has all heads of a token, or a single one.

    Args:
        everyone: whether every rank gets the same of this one, as in an all-gather.
        heads: KV heads of a row.
        per_token: rows of a token, ``kv_heads / heads``.
        sent: this rank's rows, as runs (first, count): by destination, by place in the buffer there. Rows are counted
            ``[batch, local time, per_token]``; those of a run are ``per_token`` apart.
        send, receive: rows for and from each rank; for everyone they may be padded.
        place: where the received rows belong, as runs (first column, first row, count): columns of the whole buffer.
        columns: of the buffer ``[batch, per_token, columns, heads, dim]``.
    """

    everyone: bool
    heads: int
    per_token: int
    sent: tuple[np.ndarray, np.ndarray]
    send: tuple[int, ...]
    receive: tuple[int, ...]
    place: tuple[np.ndarray, np.ndarray, np.ndarray]
    columns: int
    unique: tuple[int, ...] = ()
    """Of the rows sent, so many at a time are none twice; empty where it is so for those of each destination."""
    _index: dict[torch.device, "Index"] = field(default_factory=dict, repr=False)

    def traffic(self, rank: int, dim: int) -> "Traffic":
        """Numbers that go from ``rank`` to others and come to it, where a key and its value have ``dim``."""
        rows = Traffic(sum(self.send) - self.send[rank], sum(self.receive) - self.receive[rank])
        return rows.times(self.heads * dim)

    @property
    def regular(self) -> bool:
        """Whether equally much comes from every rank."""
        return len(set(self.receive)) == 1

    @property
    def received(self) -> int:
        """Rows that arrive at this rank, its own and padding among them."""
        return sum(self.receive)

    def on(self, device: torch.device) -> "Index":
        """Its runs row by row, as tensors; made once."""
        if device not in self._index:
            first, count = self.sent
            column, row, placed = self.place
            column, row = expand(column, placed), expand(row, placed)
            in_order = np.array_equal(column, row) and len(row) == self.received
            sent = expand(first, count, self.per_token)
            self._index[device] = Index(
                *(torch.from_numpy(x).to(device) for x in (sent, column, row)), in_order
            )
        return self._index[device]


class Index(NamedTuple):
    """What an :class:`Exchange` moves, row by row: int64."""

    sent: Tensor
    """Of each row to send its number among this rank's."""
    column: Tensor
    row: Tensor
    """Of each column that is filled, the received row."""
    in_order: bool
    """Whether the buffer is what was received."""


@dataclass(frozen=True)
class TileJob:
    """A tile: queries of this rank against columns of a buffer.

    Args:
        batch, heads, queries, keys: rows of the batch, KV heads, slots and columns.
        document: its first token and the one behind its last; ``q_at`` and ``k_at`` count from the first.
        first: whether these queries have no result yet.
        dense: every query sees every key, and ``q_at`` and ``k_at`` are made up.
    """

    batch: slice
    heads: slice
    queries: slice
    keys: slice
    document: tuple[int, int]
    q_at: Blocks
    k_at: Blocks
    first: bool = False
    dense: bool = False


@dataclass(frozen=True)
class PlanStage:
    """Tiles, and the exchange that they wait for: None for this rank's own keys."""

    exchange: Exchange | None
    jobs: tuple[TileJob, ...]


class PositionRun(NamedTuple):
    """Positions of one document that lie in a buffer side by side."""

    at: Blocks
    columns: slice

    @property
    def start(self) -> int:
        return self.at.start * self.at.size

    @property
    def stop(self) -> int:
        return (self.at.start + (self.at.count - 1) * self.at.step + 1) * self.at.size

    def clip(self, start: int, stop: int) -> "PositionRun":
        """Without positions that are not in ``[start, stop)``; a progression stays as it is."""
        start, stop = max(start, self.start), min(stop, self.stop)
        if self.at.step > 1:
            return self
        column = self.columns.start + start - self.start
        return PositionRun(Blocks(start, 1, stop - start), slice(column, column + stop - start))


class TokenRanges:
    """Ascending ranges of the sequence in a buffer, ``(start, stop, column)``, columns one after another."""

    def __init__(self, pieces: Iterable[tuple[int, int, int]], problem: AttentionSpec):
        self.pieces, self.problem = list(pieces), problem

    def documents(self, rows: BatchRows) -> list[tuple[int, int]]:
        """Those that have some of its tokens."""
        numbers = {n for start, stop, _ in self.pieces for n in rows.overlapping(start, stop)}
        return [rows.document(n) for n in sorted(numbers)]

    def of_document(self, start: int, stop: int) -> list[PositionRun]:
        """Those in the document from ``start`` to ``stop``, by their positions in it."""
        inside = [(a, b, column) for a, b, column in self.pieces if a < stop and b > start]
        own = [(max(a, start), min(b, stop), column + max(a, start) - a) for a, b, column in inside]
        found, column = [], own[0][2] if own else 0
        for at in progressions([(a - start, b - start) for a, b, _ in own], self.problem.may_step):
            found.append(PositionRun(at, slice(column, column + len(at))))
            column += len(at)
        return found


def tiles(
    queries: TokenRanges,
    keys: TokenRanges,
    rows: BatchRows,
    problem: AttentionSpec,
    first: bool = False,
) -> Iterator[TileJob]:
    """For each run of ``queries`` in a document a tile with each run of keys that it may see.

    Args:
        first: whether no other keys came before these.
    """
    for document in queries.documents(rows):
        key_runs = keys.of_document(*document)
        for run in queries.of_document(*document) if key_runs else ():
            earliest = problem.earliest(run.start)
            seen = [
                key.clip(earliest, run.stop)
                for key in key_runs
                if key.start < run.stop and key.stop > earliest
            ]
            for n, key in enumerate(seen):
                heads = slice(0, problem.kv_heads)
                yield TileJob(
                    rows.batch,
                    heads,
                    run.columns,
                    key.columns,
                    document,
                    run.at,
                    key.at,
                    first=first and n == 0,
                )


@dataclass(frozen=True, eq=False)
class Plan:
    """What one rank does.

    Args:
        batch: rows.
        rank: its place among the ranks that have the same heads.
        stages: among those.
        heads: the exchange of heads before and after them, or None.
        first_kv_head: of those that this rank has for the stages.
        peers: the ranks that have the same heads, by their numbers in the group.
        key: of all that the plan depends on, the same on every rank.
    """

    batch: int
    rank: int
    stages: tuple[PlanStage, ...]
    heads: HeadExchange | None
    first_kv_head: int
    peers: range
    key: int

    def traffic(self, key_dim: int, value_dim: int) -> tuple[Traffic, Traffic]:
        """What moves forward, and backward: keys and values once more, and their gradients home."""
        stages = [
            stage.exchange.traffic(self.rank, key_dim + value_dim)
            for stage in self.stages
            if stage.exchange
        ]
        forward, backward = list(stages), [*stages, *(one.back for one in stages)]
        if self.heads is not None:
            q, k = (
                Traffic(*self.heads.heads_moved(share)).times(self.batch)
                for share in (self.heads.heads, self.heads.kv_heads)
            )
            inputs = [q.times(key_dim), k.times(key_dim + value_dim)]
            forward += [*inputs, q.times(value_dim).back]
            backward += [q.times(value_dim), *(one.back for one in inputs)]
        return Traffic.total(forward), Traffic.total(backward)

    def buffer(self, key_dim: int, value_dim: int) -> int:
        """Numbers of others' keys and values that this rank holds at a time: of a stage and the one that follows."""
        sizes = [
            stage.exchange.columns * stage.exchange.per_token * stage.exchange.heads
            for stage in self.stages
            if stage.exchange
        ]
        return (
            max((a + b for a, b in pairwise([0, *sizes])), default=0)
            * self.batch
            * (key_dim + value_dim)
        )


def batch_rows(documents: Tensor | None, batch: int, length: int) -> tuple[BatchRows, ...]:
    """The rows of a batch, those together that are cut alike. ``documents``: ids ``[batch, length]``."""
    if documents is None or not batch:
        return (BatchRows(0, batch, (0,), length),)
    starts = [
        tuple(start for _, start, _ in own)
        for _, own in groupby(document_spans(documents), key=itemgetter(0))
    ]
    found, first = [], 0
    for own, same in groupby(starts):
        stop = first + len(list(same))
        found.append(BatchRows(first, stop, own, length))
        first = stop
    return tuple(found)
