"""Attention of single queries to the key blocks that each of them chose, with torch's kernels.

The queries that chose a key block are brought together, up to ``_ROWS`` of them in a group, so that
a group is a small dense product. Work follows the pairs that are seen. Each chosen block of a query
gives a partial result in a slot of its own; the slots of a query are merged at the end, always in
the same order. Likewise the gradients of a key block are added group by group.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..arguments import accumulation_dtype
from ..patterns import Blocks
from ..patterns.token_lists import TokenLists
from .piece_products import finite, piece_backward, piece_forward
from .pieces import Mask, visibility_bias
from .tiles import Tile

_ROWS = 64
"""Queries of a group: enough for a dense product; the last group of a key block is filled up."""
_PAIRS_AT_ONCE = 1 << 21
"""Pairs of a query and a key whose logits are held at a time."""
_NUMBERS_AT_ONCE = 1 << 24
"""Numbers of the partial results that are held at a time."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, pattern: TokenLists
) -> tuple[Tensor, Tensor]:
    """Compute the output and the log-sum-exp of a tile's queries.

    Args:
        q: ``[batch, heads, queries, dim]``.
        k, v: ``[batch, kv_heads, keys, dim]``.

    Returns:
        ``[batch, heads, queries, dim]`` and ``[batch, heads, queries]`` in fp32 (fp64 for fp64).
    """
    dtype = accumulation_dtype(q)
    rows = _QueryRows.of_tile(q, k, tile, pattern)
    blocks = _KeyBlocks(tile.k_positions, pattern.block, q.device)
    blocked_k = blocks.select(k)
    blocked_v = blocks.select(v)

    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    for chunk in rows.chunks():
        chunk_q = chunk.take(q)
        slot_out = torch.zeros(*chunk.slots_shape, q.shape[3], dtype=dtype, device=q.device)
        no_key = tile.logits.lse_without_keys
        slot_lse = torch.full(chunk.slots_shape, no_key, dtype=dtype, device=q.device)
        for group in chunk.groups(blocks):
            group_out, group_lse = piece_forward(
                group.queries(chunk_q), group.keys(blocked_k), group.keys(blocked_v),
                group.mask(blocks, chunk, q.dtype), tile.logits,
            )  # fmt: skip
            group.write(slot_out, group_out)
            group.write(slot_lse, group_lse)

        # Merge the slots of each query: [rows, slots, heads of the chooser, ...].
        if tile.logits.is_softmax:
            chunk_lse = slot_lse.logsumexp(1)
            weights = (slot_lse - finite(chunk_lse)[:, None]).exp()
            chunk_out = (weights[..., None] * slot_out).sum(1)
        else:
            chunk_lse = slot_lse.sum(1)
            chunk_out = slot_out.sum(1)
        chunk.put(out, chunk_out)
        chunk.put(lse, chunk_lse)
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tile: Tile,
    pattern: TokenLists,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of ``q``, ``k`` and ``v``, in their shapes, in fp32 (fp64 for fp64).

    Args:
        out, lse: final ones of the queries, over all keys that they see; ``lse`` is finite.
    """
    dtype = accumulation_dtype(q)
    rows = _QueryRows.of_tile(q, k, tile, pattern)
    blocks = _KeyBlocks(tile.k_positions, pattern.block, q.device)
    blocked_k = blocks.select(k)
    blocked_v = blocks.select(v)

    dq = torch.empty(q.shape, dtype=dtype, device=q.device)
    dk = torch.zeros(blocked_k.shape, dtype=dtype, device=q.device)
    dv = torch.zeros(blocked_v.shape, dtype=dtype, device=q.device)
    for chunk in rows.chunks():
        chunk_grad_out, chunk_q, chunk_out = (chunk.take(x) for x in (grad_out, q, out))
        chunk_lse = chunk.take(lse)
        slot_dq = torch.zeros(*chunk.slots_shape, q.shape[3], dtype=dtype, device=q.device)
        for group in chunk.groups(blocks):
            group_dq, group_dk, group_dv = piece_backward(
                group.queries(chunk_grad_out), group.queries(chunk_q), group.queries(chunk_out),
                group.queries(chunk_lse), group.keys(blocked_k), group.keys(blocked_v),
                group.mask(blocks, chunk, q.dtype), tile.logits,
            )  # fmt: skip
            group.write(slot_dq, group_dq)
            group.add(dk, group_dk)
            group.add(dv, group_dv)
        chunk.put(dq, slot_dq.sum(1))
    return dq, blocks.unselect(dk, k.shape), blocks.unselect(dv, v.shape)


class _KeyBlocks:
    """The keys of a tile, brought into whole blocks of their document.

    Args:
        positions: of the keys, in the order of the tile's tokens.
        size: keys of a block.
    """

    def __init__(self, positions: tuple[Blocks, ...], size: int, device: torch.device):
        self.size = size
        tokens = np.concatenate([np.zeros(0, np.int64), *(part.positions() for part in positions)])
        numbers, index = np.unique(tokens // size, return_inverse=True)
        self.numbers = torch.from_numpy(numbers).to(device)
        """Of the blocks in the document: int64 ``[key_blocks]``, ascending."""
        places = index * size + tokens % size
        self._places = torch.from_numpy(places).to(device)
        self._is_in_order = np.array_equal(places, np.arange(len(numbers) * size))
        exists = np.zeros(len(numbers) * size, bool)
        exists[places] = True
        self.exists = torch.from_numpy(exists.reshape(-1, size)).to(device)
        """Which keys of each block the tile has: bool ``[key_blocks, size]``."""

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def positions(self) -> Tensor:
        """The positions of all keys in the document: int64 ``[key_blocks, size]``."""
        return self.numbers[:, None] * self.size + torch.arange(
            self.size, device=self.numbers.device
        )

    def index_of(self, numbers: Tensor) -> Tensor:
        """Return the index of each block by its number in the document; -1 for none."""
        if not len(self):
            return torch.full_like(numbers, -1)
        index = torch.searchsorted(self.numbers, numbers).clamp(max=len(self) - 1)
        return torch.where(self.numbers[index] == numbers, index, -1)

    def select(self, x: Tensor) -> Tensor:
        """Turn ``[batch, kv_heads, keys, dim]`` into ``[all key blocks, size, dim]``.

        All means ``batch * kv_heads * key_blocks``. Keys that the tile has not are 0.
        """
        if not self._is_in_order:
            blocked = x.new_zeros(*x.shape[:2], len(self) * self.size, x.shape[3])
            x = blocked.index_copy_(2, self._places, x)
        return x.reshape(-1, self.size, x.shape[3])

    def unselect(self, blocked: Tensor, shape: torch.Size) -> Tensor:
        """Return the keys of :meth:`select`, in the tile's order and the given shape."""
        x = blocked.view(*shape[:2], -1, shape[3])
        return x if self._is_in_order else x[:, :, self._places]


@dataclass(frozen=True)
class _QueryRows:
    """Queries with their lists; a row is a query with the query heads of one chooser.

    Args:
        lists: numbers of key blocks, -1 for none: int ``[batch, choosers, queries, slots]``.
        positions: of the queries in the document, int64 ``[queries]``.
        tokens: the queries among those of the tile.
        kv_heads: of the tile.
        heads: query heads of the tile.
        dim: of a query.
    """

    lists: Tensor
    positions: Tensor
    tokens: slice
    kv_heads: int
    heads: int
    dim: int

    @classmethod
    def of_tile(cls, q: Tensor, k: Tensor, tile: Tile, pattern: TokenLists) -> "_QueryRows":
        """Return all queries of the tile."""
        ranges = [torch.from_numpy(part.positions()) for part in tile.q_positions]
        positions = torch.cat(ranges).to(q.device)
        lists = pattern.of_queries(positions, k.shape[1])
        lists = lists.to(q.device).expand(len(q), -1, -1, -1)
        return cls(lists, positions, slice(0, len(positions)), k.shape[1], *q.shape[1:4:2])

    @property
    def _choosers(self) -> int:
        return self.lists.shape[1]

    @property
    def slots_shape(self) -> tuple[int, int, int]:
        """Rows, slots of a row, and heads of a row."""
        batch, choosers, queries, slots = self.lists.shape
        return batch * choosers * queries, slots, self.heads // choosers

    def chunks(self) -> Iterator["_QueryRows"]:
        """Yield the queries, so many at a time that their partial results are held."""
        batch, _, num_queries, slots = self.lists.shape
        size = max(1, _NUMBERS_AT_ONCE // max(1, batch * self.heads * slots * self.dim))
        for start in range(0, num_queries, size):
            part = slice(start, min(num_queries, start + size))
            yield _QueryRows(
                self.lists[:, :, part],
                self.positions[part],
                part,
                self.kv_heads,
                self.heads,
                self.dim,
            )

    def take(self, x: Tensor) -> Tensor:
        """Turn ``[batch, heads, queries, ...]`` into ``[rows, heads of a row, ...]``."""
        by_chooser = x[:, :, self.tokens].unflatten(1, (self._choosers, -1))
        return by_chooser.transpose(2, 3).flatten(0, 2)

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Write what is ``[rows, heads of a row, ...]`` to ``[batch, heads, queries, ...]``."""
        batch, choosers, queries, _ = self.lists.shape
        by_chooser = rows.view(batch, choosers, queries, *rows.shape[1:]).transpose(2, 3)
        x[:, :, self.tokens] = by_chooser.flatten(1, 2)

    def groups(self, blocks: _KeyBlocks) -> Iterator["_Groups"]:
        """Bring together the rows that chose the same key block, some groups at a time."""
        batch, choosers, num_queries, slots = self.lists.shape
        index = blocks.index_of(self.lists.long()).flatten()
        entries = (index >= 0).nonzero()[:, 0]  # of [batch, choosers, queries, slots]
        if not len(entries):
            return
        rows = entries // slots
        kv_head = rows // num_queries % choosers * self.kv_heads // choosers
        batch_row = rows // (num_queries * choosers)
        key_block = (batch_row * self.kv_heads + kv_head) * len(blocks) + index[entries]

        # Entries in the order of their key blocks, cut into groups of _ROWS.
        order = key_block.argsort(stable=True)
        num_entries = key_block.bincount(minlength=batch * self.kv_heads * len(blocks))
        num_groups = -(-num_entries // _ROWS)
        first_entry = num_entries.cumsum(0) - num_entries
        first_group = num_groups.cumsum(0) - num_groups
        in_block = torch.arange(len(order), device=order.device) - first_entry[key_block[order]]
        group = first_group[key_block[order]] + in_block // _ROWS
        place = in_block % _ROWS

        block_of_group = torch.arange(len(num_groups), device=order.device)
        block_of_group = block_of_group.repeat_interleave(num_groups)
        before = torch.arange(len(block_of_group), device=order.device)
        before = before - first_group[block_of_group]
        # Places that stay free repeat the group's first entry, whose keys are hidden there.
        first_of_group = entries[order][first_entry[block_of_group] + before * _ROWS]
        entry_table = first_of_group[:, None].repeat(1, _ROWS)
        entry_table[group, place] = entries[order]
        is_entry = torch.zeros_like(entry_table, dtype=torch.bool)
        is_entry[group, place] = True

        pairs = _ROWS * blocks.size * self.heads // choosers
        for part in torch.arange(len(entry_table)).split(max(1, _PAIRS_AT_ONCE // pairs)):
            part = slice(int(part[0]), int(part[-1]) + 1)
            yield _Groups(
                rows=entry_table[part] // slots,
                slots=entry_table[part] % slots,
                is_row=is_entry[part],
                key_blocks=block_of_group[part],
                before=before[part],
            )


@dataclass(frozen=True)
class _Groups:
    """Groups of up to ``_ROWS`` rows that chose the same key block.

    Args:
        rows: int64 ``[groups, _ROWS]``.
        slots: which entry of the row's list the block is, int64 ``[groups, _ROWS]``.
        is_row: whether a place is taken, bool ``[groups, _ROWS]``.
        key_blocks: index in ``[batch, kv_heads, key_blocks]``, int64 ``[groups]``.
        before: how many groups of the same key block come before, int64 ``[groups]``.
    """

    rows: Tensor
    slots: Tensor
    is_row: Tensor
    key_blocks: Tensor
    before: Tensor

    def queries(self, x: Tensor) -> Tensor:
        """Take from ``[rows, heads, ...]`` as ``[groups, heads, _ROWS, ...]``."""
        taken = x.index_select(0, self.rows.flatten())
        return taken.view(*self.rows.shape, *x.shape[1:]).transpose(1, 2)

    def keys(self, blocked: Tensor) -> Tensor:
        """Take keys from ``[all key blocks, size, dim]`` as ``[groups, 1, size, dim]``."""
        return blocked.index_select(0, self.key_blocks)[:, None]

    def mask(self, blocks: _KeyBlocks, rows: _QueryRows, dtype: torch.dtype) -> Mask:
        """Return which of a group's keys each of its rows sees."""
        block = self.key_blocks % len(blocks)
        query_positions = rows.positions[self.rows % len(rows.positions)]  # [groups, _ROWS]
        key_positions = blocks.positions[block]  # [groups, size]
        visible = query_positions[..., None] >= key_positions[:, None]
        visible &= blocks.exists[block][:, None] & self.is_row[..., None]
        return Mask(visibility_bias(visible, dtype)[:, None], ~visible.any(-1)[:, None])

    def write(self, slots: Tensor, x: Tensor) -> None:
        """Write ``x`` ``[groups, heads, _ROWS, ...]`` to ``[rows, slots, heads, ...]``."""
        written = x.transpose(1, 2)[self.is_row].to(slots.dtype)
        slots[self.rows[self.is_row], self.slots[self.is_row]] = written

    def add(self, total: Tensor, x: Tensor) -> None:
        """Add ``x`` ``[groups, 1, size, dim]`` to the key blocks, always in the same order."""
        for before in range(int(self.before.min()), int(self.before.max()) + 1):
            is_now = self.before == before
            total.index_add_(0, self.key_blocks[is_now], x[is_now, 0].to(total.dtype))
