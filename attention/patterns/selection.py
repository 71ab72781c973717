"""Patterns chosen from the content: which blocks of keys a block of queries sees, found from summaries of both.

Like :mod:`~longspan.attention.patterns.patterns`, imported without torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .patterns import _at_least, _power_of_two

if TYPE_CHECKING:
    from torch import Tensor


class Selector(ABC):
    """Chooses key blocks per query block and KV head; takes a pattern's place in ``attend``. No gradient flows through it.

    A selector sees summaries of blocks alone, one vector per KV head for queries and one for keys: this is all that ranks
    exchange when they share a sequence. To write another, implement :meth:`summaries` and :meth:`choose`.
    """

    block: int
    """Tokens in a block, of queries and of keys; documents start at multiples of it."""

    @property
    def alignment(self) -> int:
        return self.block

    def from_head(self, first: int) -> Selector:
        """The same for KV heads from ``first`` on: it asks the content."""
        return self

    @abstractmethod
    def summaries(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Of each block of queries and of keys: ``[batch, blocks, kv_heads, dim]``. The last block may be short."""

    @abstractmethod
    def choose(self, queries: Tensor, keys: Tensor, own: Tensor, visible: Tensor) -> Tensor:
        """The chosen blocks, -1 for none.

        Args:
            queries, keys: summaries; some query blocks, all key blocks.
            own: the query blocks' own indices among the key blocks, int64 ``[query_blocks]``.
            visible: key blocks of the same document, up to the query block's own: bool ``[batch, query_blocks, key_blocks]``.

        Returns:
            Indices among the key blocks: int ``[batch, kv_heads, query_blocks, width]``.
        """


@dataclass(frozen=True)
class MoBA(Selector):
    """Mixture of block attention (arXiv 2502.13189): the ``top_k`` blocks whose mean key fits the queries' mean best.

    The queries' own block is always one of them; all query heads of a KV head choose together, so that each KV head's blocks
    are loaded once.
    """

    block: int
    top_k: int

    def __post_init__(self):
        _power_of_two("MoBA", self.block)
        _at_least("MoBA", top_k=(self.top_k, 1))

    def summaries(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q = q.float().unflatten(2, (k.shape[2], -1)).mean(3)
        return self._means(q), self._means(k.float())

    def choose(self, queries: Tensor, keys: Tensor, own: Tensor, visible: Tensor) -> Tensor:
        import torch

        scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys)
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
        scores = scores.masked_fill(
            torch.arange(keys.shape[1], device=own.device) == own[:, None], torch.inf
        )
        best = scores.topk(min(self.top_k, keys.shape[1]), -1)
        return torch.where(best.values == -torch.inf, -1, best.indices)

    def _means(self, x: Tensor) -> Tensor:
        import torch

        whole = x.shape[1] // self.block * self.block
        means = x[:, :whole].unflatten(1, (-1, self.block)).mean(2)
        return (
            torch.cat([means, x[:, whole:].mean(1, keepdim=True)], 1)
            if whole < x.shape[1]
            else means
        )
