"""A pattern of arbitrary block lists: a user's own, or chosen from the content."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..documents import document_spans
from .patterns import Pattern, _power_of_two
from .rules import Blocks
from .selection import Selector


@dataclass(frozen=True, repr=False, eq=False)
class BlockLists(Pattern):
    """For each query block the key blocks that it sees; causal within a block, and never ahead.

    Args:
        block: tokens in a block, of queries and keys: a power of two.
        lists: int ``[kv_heads or 1, query_blocks, width]``, positions counted from a document's start; or
            ``[batch, kv_heads, query_blocks, width]`` with the query blocks of the **sequence** and key blocks of their
            document, as a selector makes them. -1 stands for none; order and repetition do not matter.
    """

    block: int
    lists: Tensor
    first_head: int = 0

    def __post_init__(self):
        _power_of_two("BlockLists", self.block)
        lists = torch.as_tensor(self.lists)
        if lists.ndim not in (3, 4) or lists.is_floating_point() or lists.dtype == torch.bool:
            raise ValueError(
                "BlockLists.lists must be integers [kv_heads, query_blocks, width] or [batch, kv_heads, query_blocks, width], "
                f"got {lists.dtype} of shape {tuple(lists.shape)}"
            )
        none = torch.iinfo(torch.int32).max
        lists = lists.to(torch.int32)
        lists = torch.where(lists < 0, none, lists).sort(-1).values
        again = torch.zeros_like(lists, dtype=torch.bool)
        again[..., 1:] = lists[..., 1:] == lists[..., :-1]
        lists = torch.where(again, none, lists).sort(-1).values
        object.__setattr__(self, "lists", torch.where(lists == none, -1, lists))

    @classmethod
    def where(
        cls, block: int, sees: Callable | np.ndarray, length: int, num_kv_heads: int = 1
    ) -> "BlockLists":
        """Lists for documents of up to ``length`` tokens.

        Args:
            sees: ``sees(query_blocks, key_blocks, head)``, bool for arrays of block indices that broadcast; or a bool array
                ``[kv_heads or 1, query_blocks, key_blocks]``.
            num_kv_heads: how many heads to ask the function for; 1 for the same in all.
        """
        _power_of_two("BlockLists", block)
        blocks = np.arange(-(-length // block))
        if callable(sees):
            shape = (len(blocks), len(blocks))
            table = np.stack(
                [
                    np.broadcast_to(sees(blocks[:, None], blocks, head), shape)
                    for head in range(num_kv_heads)
                ]
            )
        else:
            table = np.asarray(sees)
            if (
                table.dtype != bool
                or table.ndim != 3
                or table.shape[1] < len(blocks)
                or table.shape[2] < len(blocks)
            ):
                raise ValueError(
                    f"sees must be a bool array [kv_heads, {len(blocks)}, {len(blocks)}] for length {length}, "
                    f"got {table.dtype} of shape {table.shape}"
                )
            table = table[:, : len(blocks), : len(blocks)]
        table = table & (blocks[:, None] >= blocks)
        width = max(1, int(table.sum(-1).max()))
        order = np.argsort(~table, axis=-1, kind="stable")[..., :width]
        return cls(
            block, torch.from_numpy(np.where(np.take_along_axis(table, order, -1), order, -1))
        )

    def __repr__(self) -> str:
        return f"BlockLists({self.block}, lists {list(self.lists.shape)})"

    @property
    def alignment(self) -> int:
        return self.block

    def from_head(self, first: int) -> "BlockLists":
        return self._with(first_head=self.first_head + first)

    def _with(self, **changes) -> "BlockLists":
        """A copy whose lists are in order already."""
        copy = object.__new__(BlockLists)
        copy.__dict__.update(self.__dict__, **changes)
        return copy

    def in_document(self, row: slice, start: int, stop: int) -> "BlockLists":
        """The same for one document alone, the tokens ``start`` to ``stop`` of the batch's ``row``."""
        if self.lists.ndim == 3:
            return self
        if start % self.block:
            raise ValueError(
                f"documents must start at multiples of BlockLists.block {self.block}, got one at {start}"
            )
        row = slice(None) if len(self.lists) == 1 else row
        return self._with(lists=self.lists[row, :, start // self.block : -(-stop // self.block)])

    def check_batch(self, batch: int) -> None:
        """Refuse lists of another batch."""
        if self.lists.ndim == 4 and len(self.lists) not in (1, batch):
            raise ValueError(
                f"BlockLists has lists for a batch of {len(self.lists)}, but q has {batch} rows"
            )

    def of_heads(self, num_kv_heads: int) -> Tensor:
        """The lists of that many heads: int32 ``[batch or 1, num_kv_heads, query_blocks, width]``."""
        lists = self.lists if self.lists.ndim == 4 else self.lists[None]
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
        blocks = self.lists.shape[-2]
        if length > blocks * self.block:
            raise ValueError(
                f"BlockLists has lists for {blocks} blocks of {self.block}, but a document has {length} tokens"
            )

    def mask(self, query_positions, key_positions, num_kv_heads: int) -> Tensor:
        """Of one document: bool ``[num_kv_heads, queries, keys]``, with the batch before that where the lists have one."""
        queries, keys = torch.as_tensor(query_positions), torch.as_tensor(key_positions)
        lists = self.of_heads(num_kv_heads).to(queries.device)
        blocks = int(keys.max()) // self.block + 1 if len(keys) else 1
        table = torch.zeros(*lists.shape[:3], blocks + 1, dtype=torch.bool, device=queries.device)
        table.scatter_(-1, torch.where((lists < 0) | (lists >= blocks), blocks, lists).long(), True)
        seen = table[:, :, queries // self.block][..., keys // self.block] & (
            queries[:, None] >= keys
        )
        return seen if self.lists.ndim == 4 else seen[0]

    def need(self, query_start: int, query_stop: int, head: int) -> tuple[Blocks, ...]:
        rows = self.of_heads(head + 1)[
            :, head, query_start // self.block : -(-query_stop // self.block)
        ]
        blocks = rows.unique().tolist()
        last = (query_stop - 1) // self.block
        return tuple(Blocks(b, 1, 1, self.block) for b in blocks if 0 <= b <= last)

    def visible(self, length: int, head: int) -> np.ndarray:
        at = torch.arange(length)
        shown = [
            self.mask(rows, at, head + 1)[..., head, :, :].sum(-1) for rows in at.split(self.block)
        ]
        return torch.cat([part.sum(0) if part.ndim == 2 else part for part in shown]).numpy()

    def covers(self, num_kv_heads: int) -> bool:
        blocks = torch.arange(self.lists.shape[-2]) * self.block
        seen = self.mask(blocks, blocks, num_kv_heads).any(-3)  # in every row of the batch
        return bool((seen | (blocks[:, None] < blocks)).all())


# Query blocks whose scores are held at a time.
_CHUNK = 256


def chosen_lists(
    selector: Selector, queries: Tensor, keys: Tensor, at: Tensor, documents: Tensor | None
) -> BlockLists:
    """The pattern that ``selector`` chooses for the query blocks ``at`` of a sequence.

    Args:
        queries, keys: summaries of those query blocks and of all key blocks.
        documents: ids ``[batch, time]``; the lists count blocks from a document's start.
    """
    blocks = keys.shape[1]
    index = torch.arange(blocks, device=keys.device)
    ids = first = torch.zeros(1, blocks, dtype=torch.int64, device=keys.device)
    if documents is not None:
        for _, start, _ in document_spans(documents):
            if start % selector.block:
                raise ValueError(
                    f"documents must start at multiples of the pattern's block {selector.block}, got one at {start}"
                )
        ids = documents[:, :: selector.block].to(keys.device)
        begins = torch.zeros_like(ids, dtype=torch.bool)
        begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
        first = (index * begins).cummax(1).values  # where each block's document begins
    lists = torch.full(
        (keys.shape[0], keys.shape[2], blocks, 1), -1, dtype=torch.int32, device=keys.device
    )
    chosen = []
    for part, own in zip(queries.split(_CHUNK, 1), at.split(_CHUNK), strict=True):
        visible = (ids[:, own, None] == ids[:, None]) & (index <= own[:, None])
        found = selector.choose(part, keys, own, visible.expand(keys.shape[0], -1, -1))
        chosen.append(torch.where(found < 0, -1, found - first[:, None, own, None]))
    if chosen:
        chosen = torch.cat(chosen, 2).int()
        lists = lists.repeat(1, 1, 1, chosen.shape[-1])
        lists[:, :, at] = chosen
    return BlockLists(selector.block, lists)
