"""Tiles by torch's own kernels, on CPU and GPU.

Only the keys that the pattern needs are computed, one piece of the tile at a time.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import accumulation_dtype, with_dense_heads
from ..patterns import Blocks, ClosedFormPattern, Pattern
from ..patterns.block_lists import BlockLists
from ..patterns.token_lists import TokenLists
from . import chosen_blocks
from .piece_products import finite, piece_backward, piece_forward
from .pieces import (
    HeadGroup,
    Piece,
    QueryRange,
    block_list_pieces,
    closed_form_pieces,
    group_heads,
    key_block_size,
    query_ranges,
)
from .tiles import LogitOptions, Tile, merge_


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, logits: LogitOptions
) -> str | None:
    """Return None: this backend supports every call."""
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """See :func:`~longspan.attention.softmax.backends.tile_forward`."""
    value_dim = v.shape[-1]
    dtype = q.dtype
    q, k, v = _heads_first(q, k, v)  # [batch, heads, time, dim], one dim for all
    if isinstance(tile.pattern, TokenLists):
        out, lse = chosen_blocks.forward(q, k, v, tile, tile.pattern)
    else:
        out, lse = _forward_by_pieces(q, k, v, tile)
    out = out[..., :value_dim].transpose(1, 2).to(dtype)  # [batch, time, heads, value_dim]
    return out, lse.transpose(1, 2)


def _forward_by_pieces(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """Compute output and log-sum-exp; all tensors are ``[batch, heads, time, ...]``."""
    dtype = accumulation_dtype(q)
    out = _empty_time_first(q, dtype)
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    written = _WrittenQueries((out, 0.0), (lse, tile.logits.lse_without_keys))

    for key_range in _key_ranges(tile, k.shape[1]):
        range_k = key_range.select(k)
        range_v = key_range.select(v)
        for piece in key_range.pieces(tile, q):
            place = (slice(None), _query_heads(piece, q, k), piece.queries)
            new_out, new_lse = piece_forward(
                q[place], range_k.take(piece), range_v.take(piece), piece.mask, tile.logits
            )
            if written.claim(place):
                out[place] = new_out
                lse[place] = new_lse
            else:
                merge_(out[place], lse[place], new_out, new_lse, tile.logits)

    written.fill_rest()
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tile: Tile,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`~longspan.attention.softmax.backends.tile_backward`."""
    head_dim = q.shape[-1]
    value_dim = v.shape[-1]
    if grad_lse is not None:
        # A key's weight p moves lse by p: as if each value had one more entry, 1, that the output
        # does not show.
        grad_out = torch.cat([grad_out, grad_lse[..., None].to(grad_out.dtype)], -1)
        v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], -1)
        out = F.pad(out, (0, 1))
    grad_out, q, k, v, out = _heads_first(grad_out, q, k, v, out)  # [batch, heads, time, dim]
    lse = finite(lse.transpose(1, 2))
    if isinstance(tile.pattern, TokenLists):
        gradients = chosen_blocks.backward(grad_out, q, k, v, out, lse, tile, tile.pattern)
    else:
        gradients = _backward_by_pieces(grad_out, q, k, v, out, lse, tile)
    dq, dk, dv = gradients
    return (
        dq[..., :head_dim].transpose(1, 2),  # [batch, time, heads, dim]
        dk[..., :head_dim].transpose(1, 2),
        dv[..., :value_dim].transpose(1, 2),
    )


def _backward_by_pieces(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients; all tensors are ``[batch, heads, time, ...]``."""
    dtype = accumulation_dtype(q)
    dq = _empty_time_first(q, dtype)
    written = _WrittenQueries((dq, 0.0))

    dk_ranges = []
    dv_ranges = []
    for key_range in _key_ranges(tile, k.shape[1]):
        range_k = key_range.select(k)
        range_v = key_range.select(v)
        range_dk = key_range.zeros(k, dtype)
        range_dv = key_range.zeros(v, dtype)
        for piece in key_range.pieces(tile, q):
            place = (slice(None), _query_heads(piece, q, k), piece.queries)
            dq_piece, dk_piece, dv_piece = piece_backward(
                grad_out[place],
                q[place],
                out[place],
                lse[place],
                range_k.take(piece),
                range_v.take(piece),
                piece.mask,
                tile.logits,
            )
            if written.claim(place):
                dq[place] = dq_piece
            else:
                dq[place] += dq_piece
            range_dk.add(piece, dk_piece)
            range_dv.add(piece, dv_piece)
        dk_ranges.append(range_dk.keys)
        dv_ranges.append(range_dv.keys)

    written.fill_rest()
    dk = torch.cat(dk_ranges, 2) if len(dk_ranges) != 1 else dk_ranges[0]
    dv = torch.cat(dv_ranges, 2) if len(dv_ranges) != 1 else dv_ranges[0]
    return dq, dk, dv


Place = tuple[slice, slice, slice]
"""Batch rows, query heads and tokens of a piece's queries."""


class _WrittenQueries:
    """Which queries of some results have been written.

    Filling the results with zeros beforehand would cost as much as a piece.

    Args:
        results: tensors ``[batch, heads, time, ...]``, each with the value of unwritten queries.
    """

    def __init__(self, *results: tuple[Tensor, float]):
        self._results = results
        num_heads, num_queries = results[0][0].shape[1:3]
        self._is_written = np.zeros((num_heads, num_queries), bool)

    def claim(self, place: Place) -> bool:
        """Mark the queries as written. Return whether none of them was before.

        If only some were, the others are filled, so that all of them can be added to.
        """
        _, heads, queries = place
        is_written = self._is_written[heads, queries]
        is_new = not is_written.any()
        if not is_new and not is_written.all():
            self._fill(heads, queries)
        self._is_written[heads, queries] = True
        return is_new

    def fill_rest(self) -> None:
        """Fill all queries that were not written."""
        self._fill(slice(None), slice(None))

    def _fill(self, heads: slice, queries: slice) -> None:
        is_written = self._is_written[heads, queries]
        if is_written.all():
            return
        for tensor, value in self._results:
            is_missing = torch.from_numpy(~is_written).to(tensor.device)
            trailing_dims = [1] * (tensor.ndim - 3)
            is_missing = is_missing.view(1, *is_missing.shape, *trailing_dims)
            tensor[:, heads, queries].masked_fill_(is_missing, value)


def _empty_time_first(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an empty ``[batch, heads, time, dim]`` whose memory has time before heads.

    That is the order of the operation's users, so the results need no copy.
    """
    time_first = torch.empty_like(
        like.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format
    )
    return time_first.transpose(1, 2)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """Return ``[batch, heads, time, dim]`` with dense heads, all padded with zeros to one dim.

    It is the largest. Zeros added to the entries of keys or values change nothing.
    """
    dim = max(x.shape[-1] for x in tensors)
    padded = [F.pad(x, (0, dim - x.shape[-1])) if x.shape[-1] < dim else x for x in tensors]
    return [with_dense_heads(x).transpose(1, 2) for x in padded]


def _query_heads(piece: Piece, q: Tensor, k: Tensor) -> slice:
    group_size = q.shape[1] // k.shape[1]
    return slice(piece.kv_heads.start * group_size, piece.kv_heads.stop * group_size)


def _key_ranges(tile: Tile, kv_heads: int) -> Iterator["_KeyRange"]:
    first_token = 0
    for positions in tile.k_positions:
        tokens = slice(first_token, first_token + len(positions))
        yield _KeyRange(tile.pattern, kv_heads, positions, tokens)
        first_token = tokens.stop


class _KeyRange:
    """One range of a tile's keys: its pieces, and its keys in blocks.

    Args:
        positions: of the keys in the document.
        tokens: places of the keys in the tile.
    """

    def __init__(self, pattern: Pattern, kv_heads: int, positions: Blocks, tokens: slice):
        self.kv_heads = kv_heads
        self.positions = positions
        self.tokens = tokens

        self.block_lists: BlockLists | None = None
        self.head_groups: list[HeadGroup] = []
        if isinstance(pattern, BlockLists):
            self.block_lists = pattern
            self.key_block = pattern.block
            self.is_blocked = True
        else:
            assert isinstance(pattern, ClosedFormPattern)
            self.head_groups = group_heads(pattern, kv_heads)
            # Without far keys all pieces take slices of keys.
            self.is_blocked = not positions.is_contiguous or any(
                any(group.far_rules) for group in self.head_groups
            )
            self.key_block = key_block_size(self.head_groups, positions) if self.is_blocked else 1

        # The first block begins before the first key if that is not at a multiple of the block.
        self.front_padding = 0
        if positions.is_contiguous:
            self.front_padding = positions.first_position % self.key_block

    def pieces(self, tile: Tile, like: Tensor) -> Iterator[Piece]:
        """Yield the pieces of all of the tile's queries; their masks have the dtype of ``like``."""
        for queries in query_ranges(tile.q_positions):
            yield from self._pieces_of(queries, like)

    def _pieces_of(self, queries: QueryRange, like: Tensor) -> Iterator[Piece]:
        if self.block_lists is not None:
            yield from block_list_pieces(
                self.block_lists, self.kv_heads, queries, self.positions, like
            )
        for group in self.head_groups:
            yield from closed_form_pieces(group, queries, self.positions, self.key_block, like)

    def select(self, x: Tensor) -> "_BlockedKeys":
        """Return the range's part of ``x``, ``[batch, kv_heads, keys of the tile, dim]``."""
        x = x[:, :, self.tokens]
        num_keys = x.shape[2]
        if not self.is_blocked:
            return _BlockedKeys(x, 1, 0, num_keys)
        if num_keys == self._padded_length:
            return _BlockedKeys(x.contiguous(), self.key_block, self.front_padding, num_keys)
        padded = self.zeros(x, x.dtype)
        padded.keys.copy_(x)
        return padded

    def zeros(self, like: Tensor, dtype: torch.dtype) -> "_BlockedKeys":
        """Return a sum for each key of the range, 0 to begin with."""
        batch, kv_heads, _, dim = like.shape
        shape = (batch, kv_heads, self._padded_length, dim)
        x = torch.zeros(shape, dtype=dtype, device=like.device)
        return _BlockedKeys(x, self.key_block, self.front_padding, len(self.positions))

    @property
    def _padded_length(self) -> int:
        """The number of keys including the padding of the first and of the last block."""
        num_blocks = -(-(self.front_padding + len(self.positions)) // self.key_block)
        return num_blocks * self.key_block


class _BlockedKeys:
    """Keys, values or their gradients, which pieces take, or add to, by slices or by blocks.

    Args:
        padded: ``[batch, kv_heads, padded keys, dim]``.
        key_block: keys in a block.
        front_padding: padded keys before the first key.
        num_keys: keys without the padding.
    """

    def __init__(self, padded: Tensor, key_block: int, front_padding: int, num_keys: int):
        self._padded = padded
        self._key_block = key_block
        self.keys = padded[:, :, front_padding : front_padding + num_keys]
        """The keys without the padding, a view."""

    def take(self, piece: Piece) -> Tensor:
        """Return the keys of a piece: ``[batch, kv_heads, keys, dim]``."""
        if isinstance(piece.keys, slice):
            return self.keys[:, piece.kv_heads, piece.keys]
        index = self._block_index(piece.kv_heads, piece.keys)
        batch, kv_heads, _ = index.shape
        dim = self._padded.shape[3]
        return self._blocks.index_select(0, index.flatten()).view(batch, kv_heads, -1, dim)

    def add(self, piece: Piece, x: Tensor) -> None:
        """Add ``x``, ``[batch, kv_heads, keys, dim]``, to the keys of a piece."""
        if isinstance(piece.keys, slice):
            self.keys[:, piece.kv_heads, piece.keys] += x
            return
        index = self._block_index(piece.kv_heads, piece.keys).flatten()
        self._blocks.index_add_(0, index, x.reshape(len(index), -1).to(self._padded.dtype))

    @property
    def _blocks(self) -> Tensor:
        """All blocks: ``[batch * kv_heads * key_blocks, key_block * dim]``, a view."""
        return self._padded.view(-1, self._key_block * self._padded.shape[3])

    def _block_index(self, kv_heads: slice, key_blocks: Tensor) -> Tensor:
        """Return where the blocks are in ``_blocks``: ``[batch, kv_heads, key_blocks]``."""
        batch, num_heads, num_keys, _ = self._padded.shape
        blocks_per_head = num_keys // self._key_block
        head_index = torch.arange(batch * num_heads, device=self._padded.device)
        first_block = head_index.view(batch, num_heads, 1)[:, kv_heads] * blocks_per_head
        return first_block + key_blocks
