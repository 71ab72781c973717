"""Patterns chosen from the content: each query chooses blocks of keys.

Imported without torch, like :mod:`~longspan.attention.patterns.patterns`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..errors import InvalidField, check_at_least, check_power_of_two

if TYPE_CHECKING:
    from torch import Tensor


class Selector(ABC):
    """Chooses key blocks for each query; ``attend`` accepts it as a pattern.

    A query chooses among the complete blocks before its own, in its document: so nothing that comes
    later can take part in a choice. No gradient flows through it. Of the keys a selector sees one
    vector per block and KV head: this is all that ranks exchange to choose when they share a
    sequence. To write another one, implement :meth:`summaries` and :meth:`choose`.
    """

    block: int
    """Tokens in a block of keys; documents start at multiples of it."""

    @property
    def alignment(self) -> int:
        """Documents must start at multiples of this, so that blocks never cross their edges."""
        return self.block

    def from_head(self, first: int) -> Selector:
        """Return the selector for KV heads from ``first`` on: the same, as the content decides."""
        return self

    @abstractmethod
    def summaries(self, k: Tensor) -> Tensor:
        """Summarize each block of keys; a last block that is short may get anything.

        Args:
            k: ``[batch, time, kv_heads, dim]``.

        Returns:
            ``[batch, blocks, kv_heads, any dim]``.
        """

    @abstractmethod
    def choose(self, q: Tensor, summaries: Tensor, own: Tensor, candidates: Tensor) -> Tensor:
        """Choose the key blocks that each query sees.

        Args:
            q: some queries, ``[batch, queries, heads, dim]``.
            summaries: of all key blocks of the sequence.
            own: the block of each query, int64 ``[queries]``.
            candidates: key blocks of the query's document before its own: bool
                ``[batch, queries, key_blocks]``.

        Returns:
            Indices of candidates and own blocks, -1 for none: int
            ``[batch, choosers, queries, width]``, where the choosers are the KV heads or the query
            heads.
        """


@dataclass(frozen=True)
class MoBA(Selector):
    """Mixture of block attention (arXiv 2502.13189): the ``top_k`` blocks with the best mean keys.

    The score of a key block is the product of its mean key with the query (section 2.2). A query's
    own block is always among the chosen, and complete blocks before it compete for the others. Of
    equal scores the earlier block wins.

    Args:
        block: tokens in a block of keys: a power of two.
        top_k: number of blocks that a query sees, including its own.
        select: ``head`` for a choice by every query head, as published; ``group`` for one by the
            mean of the query heads of each KV head, which then load its keys once.
    """

    block: int
    top_k: int
    select: Literal["group", "head"] = "group"

    def __post_init__(self) -> None:
        check_power_of_two("MoBA", "block", self.block)
        check_at_least("MoBA", "top_k", self.top_k, 1)
        if self.select not in ("group", "head"):
            raise InvalidField("select", f"must be group or head, got {self.select!r}", "MoBA")

    def summaries(self, k: Tensor) -> Tensor:
        """Return the mean key of each block, whose bits do not depend on the order of the sum."""
        import torch

        whole_blocks = k.shape[1] // self.block
        means = k[:, : whole_blocks * self.block].double().unflatten(1, (-1, self.block)).mean(2)
        if whole_blocks * self.block < k.shape[1]:  # nobody chooses an incomplete block
            means = torch.cat([means, torch.zeros_like(k[:, :1], dtype=means.dtype)], 1)
        return means.float()

    def choose(self, q: Tensor, summaries: Tensor, own: Tensor, candidates: Tensor) -> Tensor:
        import torch

        kv_heads = summaries.shape[2]
        by_kv_head = q.double().unflatten(
            2, (kv_heads, -1)
        )  # [batch, queries, kv_heads, group, dim]
        if self.select == "group":
            by_kv_head = by_kv_head.mean(3, keepdim=True)
        # In fp64 and then rounded, so that the order of a sum never decides a choice: ranks that
        # share a sequence, and chunks of other lengths, choose the same.
        scores = torch.einsum("bqhgd,bkhd->bhgqk", by_kv_head, summaries.double()).float()
        scores = scores.flatten(1, 2)  # [batch, choosers, queries, key_blocks]
        scores = scores.masked_fill(~candidates[:, None], -torch.inf)

        count = min(self.top_k - 1, scores.shape[-1])
        best = _ordered(scores).topk(count, -1).indices
        best = torch.where(scores.gather(-1, best) == -torch.inf, -1, best)
        own_blocks = own[:, None].expand(*best.shape[:-1], 1)
        return torch.cat([own_blocks, best], -1)


def _ordered(scores: Tensor) -> Tensor:
    """Return int64 numbers in the order of fp32 ``scores``; of equal ones the first is the largest.

    The bits of positive floats are ordered like integers, those of negative ones the other way
    round.
    """
    import torch

    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    width = scores.shape[-1]
    return ascending * width - torch.arange(width, device=scores.device)
