"""Patterns chosen from the content: each block of queries selects blocks of keys.

Imported without torch, like :mod:`~longspan.attention.patterns.patterns`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import check_at_least, check_power_of_two

if TYPE_CHECKING:
    from torch import Tensor


class Selector(ABC):
    """Chooses key blocks for each query block and KV head; ``attend`` accepts it as a pattern.

    No gradient flows through the choice. A selector sees only summaries of blocks, one vector per
    KV head for the queries and one for the keys: this is all that ranks exchange when they share a
    sequence. To write another one, implement :meth:`summaries` and :meth:`choose`.
    """

    block: int
    """Tokens in a block, of queries and of keys; documents start at multiples of it."""

    @property
    def alignment(self) -> int:
        """Documents must start at multiples of this, so that blocks never cross their edges."""
        return self.block

    def from_head(self, first: int) -> Selector:
        """Return the selector for KV heads from ``first`` on: the same, as the content decides."""
        return self

    @abstractmethod
    def summaries(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Summarize each block of queries and of keys. The last block may be short.

        Args:
            q: ``[batch, time, heads, dim]``.
            k: ``[batch, time, kv_heads, dim]``.

        Returns:
            Summaries of the query blocks and of the key blocks, ``[batch, blocks, kv_heads, dim]``.
        """

    @abstractmethod
    def choose(self, queries: Tensor, keys: Tensor, own: Tensor, visible: Tensor) -> Tensor:
        """Choose the key blocks that each query block sees.

        Args:
            queries, keys: summaries of some query blocks, and of all key blocks.
            own: indices of the query blocks among the key blocks, int64 ``[query_blocks]``.
            visible: key blocks of the same document, up to the query block's own: bool
                ``[batch, query_blocks, key_blocks]``.

        Returns:
            Indices of key blocks, -1 for none: int ``[batch, kv_heads, query_blocks, width]``.
        """


@dataclass(frozen=True)
class MoBA(Selector):
    """Mixture of block attention (arXiv 2502.13189): the ``top_k`` blocks with the best mean keys.

    The score of a key block is the product of its mean key with the mean query of the query block.
    The query block's own block is always among the chosen. All query heads of a KV head choose
    together, so that the blocks of each KV head are loaded once.
    """

    block: int
    top_k: int

    def __post_init__(self) -> None:
        check_power_of_two("MoBA", "block", self.block)
        check_at_least("MoBA", "top_k", self.top_k, 1)

    def summaries(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        kv_heads = k.shape[2]
        q = q.float().unflatten(2, (kv_heads, -1)).mean(3)  # [batch, time, kv_heads, dim]
        return self._block_means(q), self._block_means(k.float())

    def choose(self, queries: Tensor, keys: Tensor, own: Tensor, visible: Tensor) -> Tensor:
        import torch

        num_key_blocks = keys.shape[1]
        is_own = torch.arange(num_key_blocks, device=own.device) == own[:, None]
        # [batch, kv_heads, query_blocks, key_blocks]
        scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys)
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
        scores = scores.masked_fill(is_own, torch.inf)
        best = scores.topk(min(self.top_k, num_key_blocks), -1)
        return torch.where(best.values == -torch.inf, -1, best.indices)

    def _block_means(self, x: Tensor) -> Tensor:
        """Average over the tokens of each block. Returns ``[batch, blocks, kv_heads, dim]``."""
        import torch

        full_tokens = x.shape[1] // self.block * self.block
        means = x[:, :full_tokens].unflatten(1, (-1, self.block)).mean(2)
        if full_tokens == x.shape[1]:
            return means
        last_mean = x[:, full_tokens:].mean(1, keepdim=True)
        return torch.cat([means, last_mean], 1)
