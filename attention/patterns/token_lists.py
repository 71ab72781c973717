"""A pattern of lists of key blocks for single queries, as content-chosen attention makes them."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..documents import document_starts
from .base import Pattern
from .block_lists import check_alignment, sorted_without_repetitions
from .rules import Blocks
from .selection import Selector


@dataclass(frozen=True, repr=False, eq=False)
class TokenLists(Pattern):
    """For each query the key blocks that it sees; causal within its own block, never ahead.

    Args:
        block: tokens in a block of keys: a power of two.
        lists: int32 ``[batch or 1, choosers, listed tokens, width]``, indices of key blocks from
            the document's start, ascending, each at most once, then -1 for none. The choosers are
            the KV heads, or the query heads.
        choosers_per_kv_head: 1, or the query heads of a KV head if each of these has a list.
        listed: the tokens of the sequence that have lists, as ranges in the order of ``lists``: a
            rank lists its own queries only.
        document_start: the token at which the document begins, see :meth:`in_document`.
    """

    block: int
    lists: Tensor
    choosers_per_kv_head: int
    listed: tuple[tuple[int, int], ...]
    document_start: int = 0

    def __repr__(self) -> str:
        return f"TokenLists({self.block}, lists {list(self.lists.shape)})"

    @property
    def alignment(self) -> int:
        return self.block

    def _replace(self, **changes: Any) -> Self:
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, **changes)
        return copy

    def from_head(self, first: int) -> Self:
        return self._replace(lists=self.lists[:, first * self.choosers_per_kv_head :])

    def in_document(self, batch_rows: slice, start: int, stop: int) -> Self:
        if len(self.lists) == 1:
            batch_rows = slice(None)
        return self._replace(lists=self.lists[batch_rows], document_start=start)

    def check_batch(self, batch_size: int) -> None:
        if len(self.lists) not in (1, batch_size):
            raise ValueError(
                f"TokenLists has lists for a batch of {len(self.lists)}, "
                f"but q has {batch_size} rows"
            )

    def of_queries(self, positions: Tensor, num_kv_heads: int) -> Tensor:
        """Return the lists of some queries of the document, which must have lists.

        Args:
            positions: int64 ``[queries]``, in the document.

        Returns:
            int32 ``[batch or 1, choosers, queries, width]``.
        """
        ranges = torch.tensor(self.listed, device=positions.device).view(-1, 2, 1)
        starts, stops = ranges.unbind(1)  # [ranges, 1]
        lists_before = (stops - starts).cumsum(0) - (stops - starts)
        tokens = positions + self.document_start
        is_inside = (tokens >= starts) & (tokens < stops)  # [ranges, queries]
        if not bool(is_inside.any(0).all()):
            raise ValueError("TokenLists has no lists for some of the queries")
        places = ((tokens - starts + lists_before) * is_inside).sum(0)
        return self.lists[:, : num_kv_heads * self.choosers_per_kv_head, places]

    def mask(self, query_positions: Any, key_positions: Any, num_kv_heads: int) -> Tensor:
        """Return the visible pairs: bool ``[batch or 1, choosers, queries, keys]``."""
        queries = torch.as_tensor(query_positions)
        keys = torch.as_tensor(key_positions)
        lists = self.of_queries(queries, num_kv_heads)
        visible = (lists[..., None] == keys // self.block).any(-2)
        return visible & (queries[:, None] >= keys)

    def need(self, query_start: int, query_stop: int, head: int) -> tuple[Blocks, ...]:
        queries = torch.arange(query_start, query_stop)
        choosers = slice(head * self.choosers_per_kv_head, (head + 1) * self.choosers_per_kv_head)
        listed = self.of_queries(queries, head + 1)[:, choosers].unique().tolist()
        last = (query_stop - 1) // self.block
        return tuple(Blocks(block, 1, 1, self.block) for block in listed if 0 <= block <= last)

    def visible_keys(self, length: int, head: int) -> np.ndarray:
        choosers = slice(head * self.choosers_per_kv_head, (head + 1) * self.choosers_per_kv_head)
        positions = torch.arange(length)
        lists = self.of_queries(positions, head + 1)[:, choosers]
        own = (positions // self.block)[:, None]  # [queries, 1]
        count = ((lists >= 0) & (lists < own)).sum(-1) * self.block
        count += (lists == own).any(-1) * (positions % self.block + 1)
        return count.sum((0, 1)).numpy()

    def covers(self, num_kv_heads: int) -> bool:
        return True  # what a later query sees is not known before its content is


_SCORES_AT_ONCE = 1 << 22
"""Scores of queries with key blocks that are held at a time."""


def select_token_lists(
    selector: Selector,
    q: Tensor,
    summaries: Tensor,
    listed: tuple[tuple[int, int], ...],
    documents: Tensor | None,
) -> TokenLists:
    """Return the pattern that ``selector`` chooses for some queries of a sequence.

    Args:
        q: those queries, ``[batch, listed tokens, heads, dim]``.
        summaries: of all key blocks of the sequence, ``[batch, key_blocks, kv_heads, dim]``.
        listed: the tokens of the sequence that the queries are, as ranges in their order.
        documents: ids ``[batch, time]``, or None for a single document.
    """
    batch, num_key_blocks = summaries.shape[:2]
    device = q.device
    block_index = torch.arange(num_key_blocks, device=device)
    first_blocks = torch.zeros(1, num_key_blocks, dtype=torch.int64, device=device)
    if documents is not None:
        check_alignment(documents, selector.block)
        first_blocks = document_starts(documents[:, :: selector.block].to(device))

    ranges = [torch.arange(start, stop, device=device) for start, stop in listed]
    tokens = torch.cat(ranges or [block_index[:0]])
    own_blocks = tokens // selector.block
    scores_of_query = max(1, batch * q.shape[2] * num_key_blocks)
    chunk = max(1, _SCORES_AT_ONCE // scores_of_query)

    lists = []
    for queries, own in zip(q.split(chunk, 1), own_blocks.split(chunk), strict=True):
        first = first_blocks[:, own]  # [batch or 1, queries]: where their documents begin
        candidates = (block_index >= first[..., None]) & (block_index < own[:, None])
        chosen = selector.choose(queries, summaries, own, candidates.expand(batch, -1, -1))
        lists.append(torch.where(chosen < 0, -1, chosen - first[:, None, :, None]).int())
    all_lists = torch.cat(lists, 2) if lists else q.new_zeros(batch, 1, 0, 1, dtype=torch.int32)
    return TokenLists(
        block=selector.block,
        lists=sorted_without_repetitions(all_lists),
        choosers_per_kv_head=max(1, all_lists.shape[1] // summaries.shape[2]),
        listed=listed,
    )
