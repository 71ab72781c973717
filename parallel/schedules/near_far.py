"""What the schedule ``stripes`` is made of: rules by their reach, and received rows by their place.

A rule with a finite reach shows keys *near* the query, as a band does. One without shows keys at
any distance, as stripes and the first tokens do: it is *far*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...attention.patterns import ClosedFormPattern, Rule
from ..layout import Layout
from .plan import AttentionSpec, BatchRows, Document, PlacedRuns
from .ranges import Ranges


class NearFarRules:
    """The rules of each KV head, split into near and far."""

    def __init__(self, spec: AttentionSpec):
        assert spec.pattern is not None  # see StripesSchedule.unsupported_reason
        rules_of_heads = [spec.pattern.rules(head) for head in range(spec.num_kv_heads)]
        self.pattern = spec.pattern
        self.num_kv_heads = spec.num_kv_heads
        self.near = [_with_finite_reach(rules, True) for rules in rules_of_heads]
        """The near rules of each head."""
        self.far = [_with_finite_reach(rules, False) for rules in rules_of_heads]
        """The far rules of each head."""

        # Heads that need the same keys move in one KV row, others each in a row of their own.
        all_bands = all(len(rules) == 1 and rules[0].is_band for rules in self.near)
        share_halo = all_bands and len(set(self.near)) == 1
        share_far = len(set(self.far)) == 1
        self.near_heads_per_row = self.num_kv_heads if share_halo else 1
        self.far_heads_per_row = self.num_kv_heads if share_far else 1

    @property
    def near_reach_tokens(self) -> int:
        """How many tokens back the near rules of any head reach, at most."""
        reaches = [
            rule.reach * rule.block
            for rules in self.near
            for rule in rules
            if rule.reach is not None
        ]
        return max(reaches, default=0)

    def near_edge(self, head: int, query: int) -> int:
        """Return where the near rules' reach begins, for position ``query`` of a document.

        Later queries reach no further back.
        """
        return min((rule.first_key(query) for rule in self.near[head]), default=query)

    def halo(self, rows: BatchRows, start: int, stop: int, head: int) -> Ranges:
        """Return the keys before a segment that its queries see from :meth:`near_edge` on.

        They include those that far rules show there.
        """
        document = rows.document_of(start)
        query = start - document.start
        edge = self.near_edge(head, query)
        if edge >= query:
            return Ranges.from_pairs(())
        if self.near_heads_per_row > 1:
            return Ranges.from_pairs([(document.start + edge, start)])
        last_query = min(stop, document.stop) - document.start
        visible = self.pattern.need(query, last_query, head)
        return Ranges.from_blocks(visible, document.start).clip(document.start + edge, start)

    def halos(self, rows: BatchRows, start: int, stop: int) -> list[Ranges]:
        """Return the halo of a segment for each group of heads that share KV rows."""
        first_heads = range(0, self.num_kv_heads, self.near_heads_per_row)
        return [self.halo(rows, start, stop, head) for head in first_heads]

    def far_keys(self, documents: list[Document]) -> list[Ranges]:
        """Return the far keys of documents for each group of heads that share KV rows."""
        first_heads = range(0, self.num_kv_heads, self.far_heads_per_row)
        return [far_key_ranges(documents, self.far[head]) for head in first_heads]


def _with_finite_reach(rules: tuple[Rule, ...], finite: bool) -> tuple[Rule, ...]:
    return tuple(rule for rule in rules if (rule.reach is not None) == finite)


def far_key_ranges(documents: list[Document], rules: tuple[Rule, ...]) -> Ranges:
    """Return the keys of documents that ``rules``, all of them far, show to some query."""
    if not rules:
        return Ranges.from_pairs(())
    pattern = _FixedRules(rules)
    pairs = []
    for start, stop in documents:
        visible = Ranges.from_blocks(pattern.need(0, stop - start, 0), start)
        pairs += visible.clip(start, stop).pairs()
    return Ranges.from_pairs(pairs)


@dataclass(frozen=True, repr=False)
class _FixedRules(ClosedFormPattern):
    """A pattern with these rules in every head."""

    fixed: tuple[Rule, ...]

    def rules(self, head: int) -> tuple[Rule, ...]:
        return self.fixed


@dataclass(frozen=True)
class PlacedRanges:
    """Ranges of tokens that lie in one segment each, and where they are.

    Arrays are int64 ``[ranges]``, unless it is said otherwise.
    """

    start: np.ndarray
    """The first token of each range."""
    count: np.ndarray
    """Its number of tokens."""
    column: np.ndarray
    """Number of tokens of all ranges before it."""
    segment: np.ndarray
    """The number of its segment, in the order of the sequence."""
    rank: np.ndarray
    """The rank that holds it."""
    tokens_before_on_rank: np.ndarray
    """Number of tokens of the ranges before it that the same rank holds."""
    tokens_of_ranks: np.ndarray
    """Number of tokens that each rank holds: int64 ``[ranks]``."""

    @classmethod
    def place(cls, ranges: Ranges, layout: Layout) -> PlacedRanges:
        """Find where any ranges are; they are split where segments begin."""
        ranges = ranges.split_at(layout.segment_starts)
        count = ranges.stops - ranges.starts
        segment = np.searchsorted(layout.segment_starts, ranges.starts, "right") - 1
        rank = layout.segment_ranks[segment]
        tokens_of_ranks = np.bincount(rank, count, layout.ranks).astype(np.int64)

        # Counted over the ranges sorted by rank, less what the ranks before hold.
        by_rank = np.argsort(rank, kind="stable")
        before = np.cumsum(count[by_rank]) - count[by_rank]
        before_rank = np.cumsum(tokens_of_ranks) - tokens_of_ranks
        tokens_before_on_rank = np.empty_like(count)
        tokens_before_on_rank[by_rank] = before - before_rank[rank[by_rank]]

        column = np.cumsum(count) - count
        return cls(
            ranges.starts, count, column, segment, rank, tokens_before_on_rank, tokens_of_ranks
        )


class _Placement(NamedTuple):
    line: int
    first_column: np.ndarray
    row_of_rank: np.ndarray
    """The received row, counted over those of the same rank."""
    ranges: PlacedRanges


class ReceivedRows:
    """The KV rows that fill a buffer, and the order in which each rank sends them.

    The buffer is ``[lines, columns]``, with a line for each row of the batch and group of heads.
    """

    def __init__(self, ranks: int):
        self.counts = np.zeros(ranks, np.int64)
        """Number of rows from each rank: int64 ``[ranks]``."""
        self._placements: list[_Placement] = []

    def add(self, line: int, first_column: int, ranges: PlacedRanges) -> None:
        """Let the tokens of ``ranges`` fill the columns of a line from ``first_column`` on."""
        row_of_rank = self.counts[ranges.rank] + ranges.tokens_before_on_rank
        columns = first_column + ranges.column
        self._placements.append(_Placement(line, columns, row_of_rank, ranges))
        self.counts = self.counts + ranges.tokens_of_ranks

    def placed_runs(self, num_columns: int, receive_counts: np.ndarray) -> PlacedRuns:
        """Return the runs, once it is known how wide the buffer is and what each rank sends.

        Args:
            receive_counts: :attr:`counts`, or more with padding: int64 ``[ranks]``.
        """
        first_of_rank = np.cumsum(receive_counts) - receive_counts
        none = np.zeros(0, np.int64)
        first_columns, first_rows, counts = [none], [none], [none]
        for placement in self._placements:
            first_columns.append(placement.line * num_columns + placement.first_column)
            first_rows.append(first_of_rank[placement.ranges.rank] + placement.row_of_rank)
            counts.append(placement.ranges.count)
        return PlacedRuns(
            np.concatenate(first_columns), np.concatenate(first_rows), np.concatenate(counts)
        )
