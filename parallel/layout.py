"""Which token sits on which rank."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A bijection between the tokens of a sequence and the slots of its ranks.

    ``segments[rank]`` is a short tuple of ``(start, stop)`` token ranges, ascending, which the rank holds one after another.
    Ranks may hold unequally many tokens, or none.

    Raises:
        ValueError: where a token has no place, or two.
    """

    segments: tuple[tuple[tuple[int, int], ...], ...]

    def __post_init__(self):
        at = 0
        for start, stop, _, _ in self.in_order:
            if start != at or stop <= start:
                raise ValueError(
                    f"segments must hold every token once: {start}:{stop} follows upon {at}"
                )
            at = stop
        if any(list(own) != sorted(own) for own in self.segments):
            raise ValueError(f"the segments of a rank must ascend, got {self.segments}")

    @classmethod
    def contiguous(cls, length: int, ranks: int = 1, block: int = 1) -> "Layout":
        """Rank ``r`` holds the ``r``-th part; edges fall on multiples of ``block``, the parts are equal give or take one."""
        return cls(tuple(_not_empty(edge) for edge in _edges(length, ranks, block)))

    @classmethod
    def zigzag(cls, length: int, ranks: int, block: int = 1) -> "Layout":
        """Of ``2 * ranks`` such parts rank ``r`` holds the ``r``-th from either end: equal work under a causal mask."""
        edges = _edges(length, 2 * ranks, block)
        return cls(tuple(_not_empty(edges[rank], edges[-1 - rank]) for rank in range(ranks)))

    @classmethod
    def striped(cls, length: int, ranks: int, block: int = 1) -> "Layout":
        """Rank ``r`` holds the blocks ``r, r + ranks, ...``; the last may be cut short."""
        starts = range(0, length, block)
        return cls(
            tuple(
                tuple((a, min(a + block, length)) for a in starts[rank::ranks])
                for rank in range(ranks)
            )
        )

    @property
    def ranks(self) -> int:
        return len(self.segments)

    def grouped(self, size: int) -> "Layout":
        """As if each ``size`` ranks in a row were one, which holds the tokens of all of them, ascending."""
        merged = []
        for first in range(0, self.ranks, size):
            own: list[tuple[int, int]] = []
            for start, stop in sorted(
                segment for rank in self.segments[first : first + size] for segment in rank
            ):
                if own and own[-1][1] == start:
                    start = own.pop()[0]
                own.append((start, stop))
            merged.append(tuple(own))
        return Layout(tuple(merged))

    @cached_property
    def in_order(self) -> list[tuple[int, int, int, int]]:
        """All segments by their place in the sequence: (start, stop, rank, first slot on that rank)."""
        found = []
        for rank, own in enumerate(self.segments):
            slot = 0
            for start, stop in own:
                found.append((start, stop, rank, slot))
                slot += stop - start
        return sorted(found)

    @cached_property
    def placed(self) -> list[list[tuple[int, int, int]]]:
        """The segments of each rank: (start, stop, first slot)."""
        found: list[list[tuple[int, int, int]]] = [[] for _ in self.segments]
        for start, stop, rank, slot in self.in_order:
            found[rank].append((start, stop, slot))
        return found

    @cached_property
    def edges(self) -> np.ndarray:
        """Where the segments begin, ascending."""
        return np.array([start for start, _, _, _ in self.in_order], np.int64)

    @cached_property
    def holders(self) -> np.ndarray:
        """The ranks that have them."""
        return np.array([rank for _, _, rank, _ in self.in_order], np.int64)

    def in_one_segment(self, start: int, stop: int) -> bool:
        """Whether these tokens sit side by side."""
        return self.in_order[int(np.searchsorted(self.edges, start, "right")) - 1][1] >= stop

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each rank."""
        return [sum(stop - start for start, stop in own) for own in self.segments]

    @cached_property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.lengths)

    def tokens(self, rank: int) -> Tensor:
        """Global positions of the tokens of ``rank``, int64, in the order in which it holds them."""
        return self.shard(torch.arange(self.length)[None], rank)[0]

    def shard(self, x: Tensor, rank: int) -> Tensor:
        """The part of ``x`` ``[batch, time, ...]`` that sits on ``rank``."""
        return torch.cat([x[:, :0], *(x[:, start:stop] for start, stop in self.segments[rank])], 1)

    def unshard(self, parts: list[Tensor]) -> Tensor:
        """The whole sequence from the parts of all ranks, in rank order; a part may be longer than its rank's tokens."""
        return torch.cat(
            [
                parts[rank][:, slot : slot + stop - start]
                for start, stop, rank, slot in self.in_order
            ],
            1,
        )


def _edges(length: int, parts: int, block: int) -> list[tuple[int, int]]:
    blocks = -(-length // block)
    marks = [min(length, blocks * part // parts * block) for part in range(parts + 1)]
    return list(pairwise(marks))


def _not_empty(*segments: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    return tuple((start, stop) for start, stop in segments if start < stop)


def check_shard(layout: Layout, group: dist.ProcessGroup, tokens: int) -> None:
    """Refuse a layout of other ranks than ``group``'s, or a shard that has not this rank's number of tokens."""
    if layout.ranks != group.size():
        raise ValueError(f"layout is over {layout.ranks} ranks, but group has {group.size()}")
    if tokens != layout.lengths[group.rank()]:
        raise ValueError(
            f"layout gives rank {group.rank()} {layout.lengths[group.rank()]} tokens, but it has {tokens}"
        )
