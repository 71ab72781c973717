"""Heads for tokens: which rank computes which heads (DeepSpeed-Ulysses, arXiv 2309.14509).

Ranks that have some tokens of all heads exchange them for all their tokens of some heads, and back
after the attention. :mod:`longspan.parallel.head_exchange` moves them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..layout import Layout

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def heads_unsupported_reason(num_heads: int, num_kv_heads: int, ranks: int) -> str | None:
    """Return why that many ranks cannot share the heads, or None if they can."""
    if num_heads % ranks:
        return f"{num_heads} query heads do not split over {ranks} ranks"
    if num_kv_heads % ranks and ranks % num_kv_heads:
        return f"{num_kv_heads} KV heads neither split over {ranks} ranks nor the ranks over them"
    return None


class TokenOrder(NamedTuple):
    """Permutations of the tokens of all ranks of a :class:`HeadSplit`: int64 ``[tokens]``."""

    by_position: Tensor
    """Takes the tokens of one rank after another into the order of the sequence."""
    by_rank: Tensor
    """The way back."""


class HeadSplit:
    """Which heads, of all their tokens, each of ``ranks`` computes.

    Query heads are split evenly. If there are fewer KV heads than ranks, a KV head goes to every
    rank whose query heads read it.

    Args:
        layout: of the sequence over all ranks.
        ranks: the successive ranks of the layout that share the heads.
        rank: this one, as an index into ``ranks``.
        num_heads, num_kv_heads: of the whole attention; see :func:`heads_unsupported_reason`.
    """

    def __init__(self, layout: Layout, ranks: range, rank: int, num_heads: int, num_kv_heads: int):
        size = len(ranks)
        self.ranks = ranks
        self.rank = rank
        self.lengths = [layout.lengths[n] for n in ranks]
        """Number of tokens of each of the ranks."""
        self._segments = [segment for n in ranks for segment in layout.segments[n]]
        self._orders: dict[torch.device, TokenOrder] = {}

        heads_per_rank = num_heads // size
        self.query_heads = [
            slice(n * heads_per_rank, (n + 1) * heads_per_rank) for n in range(size)
        ]
        """Query heads of each of the ranks."""

        kv_heads_per_rank = max(1, num_kv_heads // size)
        ranks_per_kv_head = max(1, size // num_kv_heads)
        self.kv_heads = [
            slice(first, first + kv_heads_per_rank)
            for first in (n // ranks_per_kv_head * kv_heads_per_rank for n in range(size))
        ]
        """KV heads of each of the ranks."""

    @property
    def own_query_heads(self) -> slice:
        """The query heads that this rank computes."""
        return self.query_heads[self.rank]

    @property
    def own_kv_heads(self) -> slice:
        """The KV heads that this rank's query heads read."""
        return self.kv_heads[self.rank]

    def heads_moved(self, heads: list[slice]) -> tuple[int, int]:
        """Return how many heads of tokens this rank sends, and receives, before the attention.

        For one batch row. ``heads`` is :attr:`query_heads` or :attr:`kv_heads`.
        """
        counts = [of_rank.stop - of_rank.start for of_rank in heads]
        own_count = counts[self.rank]
        own_length = self.lengths[self.rank]
        sent = own_length * (sum(counts) - own_count)
        received = own_count * (sum(self.lengths) - own_length)
        return sent, received

    def token_order(self, device: torch.device) -> TokenOrder:
        """Return the permutations between rank order and sequence order, made once a device."""
        import torch

        if device not in self._orders:
            tokens = [np.arange(start, stop) for start, stop in self._segments]
            positions = np.concatenate([np.zeros(0, np.int64), *tokens])
            by_position = torch.from_numpy(np.argsort(positions, kind="stable")).to(device)
            self._orders[device] = TokenOrder(by_position, by_position.argsort())
        return self._orders[device]
