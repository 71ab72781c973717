"""A pattern of arbitrary block lists."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..documents import document_spans
from ..errors import InvalidField, check_power_of_two
from .base import Pattern
from .rules import Blocks


@dataclass(frozen=True, repr=False, eq=False)
class BlockLists(Pattern):
    """For each query block the key blocks that it sees; causal within a block, never ahead.

    Args:
        block: tokens in a block, of queries and keys: a power of two.
        lists: int ``[kv_heads or 1, query_blocks, width]``, which count from a document's start; or
            ``[batch, kv_heads, query_blocks, width]`` with the query blocks of the
            **sequence** and the key blocks of their document. -1 stands for none; order and
            repetitions do not matter.
    """

    block: int
    lists: Tensor
    first_head: int = 0

    def __post_init__(self) -> None:
        check_power_of_two("BlockLists", "block", self.block)
        lists = torch.as_tensor(self.lists)
        if lists.ndim not in (3, 4) or lists.is_floating_point() or lists.dtype == torch.bool:
            reason = (
                "must be integers [kv_heads, query_blocks, width] or "
                "[batch, kv_heads, query_blocks, width], "
                f"got {lists.dtype} of shape {tuple(lists.shape)}"
            )
            raise InvalidField("lists", reason, "BlockLists")
        object.__setattr__(self, "lists", sorted_without_repetitions(lists.to(torch.int32)))

    @classmethod
    def where(
        cls, block: int, sees: Callable | np.ndarray, length: int, num_kv_heads: int = 1
    ) -> "BlockLists":
        """Return the lists of a function or of a table, for documents of up to ``length`` tokens.

        Args:
            sees: a function ``sees(query_blocks, key_blocks, head)``, which returns bool for arrays
                of block indices that broadcast; or a bool array ``[kv_heads or 1, query_blocks,
                key_blocks]``.
            num_kv_heads: how many heads to call the function for; 1 if all heads see the same.
        """
        check_power_of_two("BlockLists", "block", block)
        num_blocks = -(-length // block)
        blocks = np.arange(num_blocks)
        if callable(sees):
            table = _tabulate(sees, blocks, num_kv_heads)
        else:
            table = _checked_table(sees, num_blocks, length)
        table = table & (blocks[:, None] >= blocks)  # [kv_heads, query_blocks, key_blocks]

        # The visible key blocks of each query block come first, in ascending order.
        width = max(1, int(table.sum(-1).max()))
        order = np.argsort(~table, axis=-1, kind="stable")[..., :width]
        visible = np.take_along_axis(table, order, -1)
        return cls(block, torch.from_numpy(np.where(visible, order, -1)))

    def __repr__(self) -> str:
        return f"BlockLists({self.block}, lists {list(self.lists.shape)})"

    @property
    def alignment(self) -> int:
        return self.block

    @property
    def _per_batch_row(self) -> bool:
        return self.lists.ndim == 4

    def from_head(self, first: int) -> Self:
        return self._replace(first_head=self.first_head + first)

    def _replace(self, **changes: Any) -> Self:
        """Return a copy with other fields, without sorting lists that are sorted."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, **changes)
        return copy

    def in_document(self, batch_rows: slice, start: int, stop: int) -> Self:
        if not self._per_batch_row:
            return self
        if start % self.block:
            raise ValueError(
                f"documents must start at multiples of BlockLists.block {self.block}, "
                f"got one at {start}"
            )
        if len(self.lists) == 1:
            batch_rows = slice(None)
        query_blocks = slice(start // self.block, -(-stop // self.block))
        return self._replace(lists=self.lists[batch_rows, :, query_blocks])

    def check_batch(self, batch_size: int) -> None:
        if self._per_batch_row and len(self.lists) not in (1, batch_size):
            raise ValueError(
                f"BlockLists has lists for a batch of {len(self.lists)}, "
                f"but q has {batch_size} rows"
            )

    def of_heads(self, num_kv_heads: int) -> Tensor:
        """Return the lists of the first ``num_kv_heads`` heads.

        Returns:
            int32 ``[batch or 1, num_kv_heads, query_blocks, width]``.
        """
        lists = self.lists if self._per_batch_row else self.lists[None]
        if lists.shape[1] == 1:
            return lists.expand(-1, num_kv_heads, -1, -1)
        if self.first_head + num_kv_heads > lists.shape[1]:
            last = self.first_head + num_kv_heads - 1
            raise ValueError(
                f"BlockLists has lists for {lists.shape[1]} KV heads, but is asked for head {last}"
            )
        return lists[:, self.first_head : self.first_head + num_kv_heads]

    def check(self, num_kv_heads: int, length: int) -> None:
        self.of_heads(num_kv_heads)
        num_blocks = self.lists.shape[-2]
        if length > num_blocks * self.block:
            raise ValueError(
                f"BlockLists has lists for {num_blocks} blocks of {self.block}, "
                f"but a document has {length} tokens"
            )

    def mask(self, query_positions: Any, key_positions: Any, num_kv_heads: int) -> Tensor:
        """Return the visible pairs of one document.

        Returns:
            Bool ``[num_kv_heads, queries, keys]``, or ``[batch, num_kv_heads, queries, keys]`` if
            the lists have a batch dimension.
        """
        queries = torch.as_tensor(query_positions)
        keys = torch.as_tensor(key_positions)
        lists = self.of_heads(num_kv_heads).to(queries.device)

        # One more column takes the entries that stand for none, and those of absent key blocks.
        num_key_blocks = int(keys.max()) // self.block + 1 if len(keys) else 1
        absent = (lists < 0) | (lists >= num_key_blocks)
        columns = torch.where(absent, num_key_blocks, lists).long()
        # [batch or 1, kv_heads, query_blocks, key_blocks + 1]
        table = torch.zeros(
            *lists.shape[:3], num_key_blocks + 1, dtype=torch.bool, device=queries.device
        )
        table.scatter_(-1, columns, True)

        visible = table[:, :, queries // self.block][..., keys // self.block]
        visible = visible & (queries[:, None] >= keys)  # [batch or 1, kv_heads, queries, keys]
        return visible if self._per_batch_row else visible[0]

    def need(self, query_start: int, query_stop: int, head: int) -> tuple[Blocks, ...]:
        query_blocks = slice(query_start // self.block, -(-query_stop // self.block))
        key_blocks = self.of_heads(head + 1)[:, head, query_blocks].unique().tolist()
        last = (query_stop - 1) // self.block
        return tuple(Blocks(block, 1, 1, self.block) for block in key_blocks if 0 <= block <= last)

    def visible_keys(self, length: int, head: int) -> np.ndarray:
        positions = torch.arange(length)
        counts = []
        for queries in positions.split(self.block):
            count = self.mask(queries, positions, head + 1)[..., head, :, :].sum(-1)
            counts.append(count.sum(0) if self._per_batch_row else count)
        return torch.cat(counts).numpy()

    def covers(self, num_kv_heads: int) -> bool:
        first_tokens = torch.arange(self.lists.shape[-2]) * self.block
        is_ahead = first_tokens[:, None] < first_tokens
        # By some head, in every row of the batch.
        covered = self.mask(first_tokens, first_tokens, num_kv_heads).any(-3)
        return bool((covered | is_ahead).all())


def sorted_without_repetitions(lists: Tensor) -> Tensor:
    """Sort the last dimension, without repetitions; the entries -1, for none, come last."""
    none = torch.iinfo(torch.int32).max
    lists = torch.where(lists < 0, none, lists).sort(-1).values
    is_repeated = torch.zeros_like(lists, dtype=torch.bool)
    is_repeated[..., 1:] = lists[..., 1:] == lists[..., :-1]
    lists = torch.where(is_repeated, none, lists).sort(-1).values
    return torch.where(lists == none, -1, lists)


def _tabulate(sees: Callable, blocks: np.ndarray, num_kv_heads: int) -> np.ndarray:
    """Call ``sees`` for all pairs of blocks: bool ``[num_kv_heads, query_blocks, key_blocks]``."""
    shape = (len(blocks), len(blocks))
    tables = [
        np.broadcast_to(sees(blocks[:, None], blocks, head), shape) for head in range(num_kv_heads)
    ]
    return np.stack(tables)


def _checked_table(sees: np.ndarray, num_blocks: int, length: int) -> np.ndarray:
    """Return the part of the table that ``length`` tokens need; ValueError if it is too small."""
    table = np.asarray(sees)
    is_table = table.dtype == bool and table.ndim == 3
    if not is_table or table.shape[1] < num_blocks or table.shape[2] < num_blocks:
        raise ValueError(
            f"sees must be a bool array [kv_heads, {num_blocks}, {num_blocks}] for length "
            f"{length}, got {table.dtype} of shape {table.shape}"
        )
    return table[:, :num_blocks, :num_blocks]


def check_alignment(documents: Tensor, block: int) -> None:
    """Raise ValueError if a document starts inside a block."""
    for span in document_spans(documents):
        if span.start % block:
            raise ValueError(
                f"documents must start at multiples of the pattern's block {block}, "
                f"got one at {span.start}"
            )
