"""Which token sits on which rank. Nothing here imports torch before it is given a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class Segment(NamedTuple):
    """Tokens side by side in the sequence, ``start`` to ``stop - 1``, side by side on one rank."""

    start: int
    stop: int
    rank: int
    """The rank that holds them."""
    slot: int
    """Where the first of them is among the tokens of that rank."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.stop - self.start

    @property
    def tokens(self) -> slice:
        """Its tokens in the whole sequence."""
        return slice(self.start, self.stop)

    @property
    def slots(self) -> slice:
        """Its tokens among those of its rank."""
        return slice(self.slot, self.slot + self.length)


@dataclass(frozen=True)
class Layout:
    """A bijection between the tokens of a sequence and the slots of its ranks.

    ``segments[rank]`` is a short tuple of ``(start, stop)`` token ranges, ascending, which the rank
    holds one after another. Ranks may hold different numbers of tokens, or none.

    Raises:
        ValueError: if a token has no place, or two.
    """

    segments: tuple[tuple[tuple[int, int], ...], ...]

    def __post_init__(self):
        next_token = 0
        for segment in self.segments_in_order:
            if segment.start != next_token or segment.stop <= segment.start:
                raise ValueError(
                    f"segments must hold every token once, but {segment.start}:{segment.stop} "
                    f"comes after {next_token} tokens"
                )
            next_token = segment.stop
        if any(list(of_rank) != sorted(of_rank) for of_rank in self.segments):
            raise ValueError(f"the segments of a rank must ascend, got {self.segments}")

    @classmethod
    def contiguous(cls, length: int, ranks: int = 1, block: int = 1) -> Layout:
        """Give rank ``r`` the ``r``-th of ``ranks`` parts.

        Edges are multiples of ``block``; sizes differ by at most one block.
        """
        return cls(tuple(_without_empty(part) for part in _equal_parts(length, ranks, block)))

    @classmethod
    def zigzag(cls, length: int, ranks: int, block: int = 1) -> Layout:
        """Give rank ``r`` the ``r``-th of ``2 * ranks`` parts from either end.

        Under a causal mask all ranks then have the same work.
        """
        parts = _equal_parts(length, 2 * ranks, block)
        return cls(tuple(_without_empty(parts[rank], parts[-1 - rank]) for rank in range(ranks)))

    @classmethod
    def striped(cls, length: int, ranks: int, block: int = 1) -> Layout:
        """Give rank ``r`` the blocks ``r, r + ranks, ...``; the last block may be shorter."""
        blocks = [(start, min(start + block, length)) for start in range(0, length, block)]
        return cls(tuple(tuple(blocks[rank::ranks]) for rank in range(ranks)))

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.segments)

    def grouped(self, size: int) -> Layout:
        """Return the layout in which each ``size`` successive ranks are a single one.

        It holds the tokens of all of them, ascending.
        """
        groups = []
        for first_rank in range(0, self.ranks, size):
            members = self.segments[first_rank : first_rank + size]
            merged: list[tuple[int, int]] = []
            for start, stop in sorted(segment for of_rank in members for segment in of_rank):
                if merged and merged[-1][1] == start:
                    start = merged.pop()[0]
                merged.append((start, stop))
            groups.append(tuple(merged))
        return Layout(tuple(groups))

    @cached_property
    def segments_of_rank(self) -> list[list[Segment]]:
        """The segments of each rank, in the order in which it holds them."""
        all_ranks = []
        for rank, of_rank in enumerate(self.segments):
            slot = 0
            segments = []
            for start, stop in of_rank:
                segments.append(Segment(start, stop, rank, slot))
                slot += stop - start
            all_ranks.append(segments)
        return all_ranks

    @cached_property
    def segments_in_order(self) -> list[Segment]:
        """All segments, in the order of the sequence."""
        return sorted(segment for of_rank in self.segments_of_rank for segment in of_rank)

    @cached_property
    def segment_starts(self) -> np.ndarray:
        """The first token of each segment, in the order of the sequence: int64 ``[segments]``."""
        return np.array([segment.start for segment in self.segments_in_order], np.int64)

    @cached_property
    def segment_ranks(self) -> np.ndarray:
        """The rank of each segment, in the order of the sequence: int64 ``[segments]``."""
        return np.array([segment.rank for segment in self.segments_in_order], np.int64)

    def in_one_segment(self, start: int, stop: int) -> bool:
        """Return whether the tokens from ``start`` to ``stop - 1`` are in the same segment."""
        number = int(np.searchsorted(self.segment_starts, start, "right")) - 1
        return self.segments_in_order[number].stop >= stop

    @cached_property
    def lengths(self) -> list[int]:
        """Number of tokens of each rank."""
        return [sum(stop - start for start, stop in of_rank) for of_rank in self.segments]

    @cached_property
    def length(self) -> int:
        """Number of tokens of the whole sequence."""
        return sum(self.lengths)

    def tokens(self, rank: int) -> Tensor:
        """Return the positions of a rank's tokens in the sequence: int64 ``[local time]``."""
        import torch

        return self.shard(torch.arange(self.length)[None], rank)[0]

    def shard(self, x: Tensor, rank: int) -> Tensor:
        """Return the part of ``x`` ``[batch, time, ...]`` that sits on ``rank``."""
        import torch

        # The empty slice is for a rank without tokens.
        return torch.cat([x[:, :0], *(x[:, start:stop] for start, stop in self.segments[rank])], 1)

    def unshard(self, shards: list[Tensor]) -> Tensor:
        """Return the whole sequence ``[batch, time, ...]`` from the shards of all ranks.

        Args:
            shards: one for each rank, in rank order; what exceeds the rank's tokens is ignored.
        """
        import torch

        return torch.cat(
            [shards[segment.rank][:, segment.slots] for segment in self.segments_in_order], 1
        )


def _equal_parts(length: int, parts: int, block: int) -> list[tuple[int, int]]:
    blocks = -(-length // block)
    edges = [min(length, blocks * part // parts * block) for part in range(parts + 1)]
    return list(pairwise(edges))


def _without_empty(*segments: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    return tuple((start, stop) for start, stop in segments if start < stop)
