"""Which token sits on which rank."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A bijection between the tokens of a sequence and the slots of its ranks.

    ``segments[rank]`` is a short tuple of ``(start, stop)`` token ranges, which the rank holds one after another.
    """

    segments: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def contiguous(cls, length: int, ranks: int = 1, block: int = 1) -> "Layout":
        """Rank ``r`` holds the ``r``-th part; edges fall on multiples of ``block``, the parts are equal give or take one."""
        edges = _edges(length, ranks, block)
        return cls(tuple((edge,) for edge in edges))

    @cached_property
    def length(self) -> int:
        """Tokens in the whole sequence."""
        return sum(stop - start for rank in self.segments for start, stop in rank)

    def tokens(self, rank: int) -> Tensor:
        """Global positions of the tokens of ``rank``, int64, in the order in which it holds them."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.segments[rank]])

    def shard(self, x: Tensor, rank: int) -> Tensor:
        """The part of ``x`` ``[batch, time, ...]`` that sits on ``rank``."""
        return torch.cat([x[:, start:stop] for start, stop in self.segments[rank]], 1)

    def unshard(self, parts: list[Tensor]) -> Tensor:
        """The whole sequence from the parts of all ranks, in rank order."""
        whole = torch.cat(parts, 1)
        order = torch.cat([self.tokens(rank) for rank in range(len(self.segments))])
        return whole[:, order.argsort().to(whole.device)]


def _edges(length: int, parts: int, block: int) -> list[tuple[int, int]]:
    blocks = -(-length // block)
    marks = [min(length, blocks * part // parts * block) for part in range(parts + 1)]
    return list(pairwise(marks))
