"""Tiles through torch's own kernels, on CPU and GPU: only the keys that the pattern needs, a few pieces at a time."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import accumulation_dtype
from ..patterns import Pattern
from ..patterns.block_lists import BlockLists
from ..patterns.rules import Blocks
from .pieces import Mask, Piece, granule, groups, list_pieces, pieces
from .tiles import LogitOptions, Tile, merge_

# Where torch has a flash kernel that gives the log-sum-exp and takes the final one back.
_FLASH_DEVICES = {"cpu"}
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
# Elsewhere the formula, for so many pairs of one head at a time.
_PAIRS = 1 << 21


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, logits: LogitOptions
) -> None:
    """It does all."""


def forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """See :func:`~longspan.attention.softmax.backends.tile_forward`."""
    value_dim, dtype = v.shape[-1], accumulation_dtype(q)
    q, k, v = _heads_first(q, k, v)
    out, lse = _time_first(q, dtype), torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    done = _RowTracker(out, lse, empty=-torch.inf if tile.logits.sigmoid_bias is None else 0.0)
    for run in _runs(tile, k.shape[1]):
        run_k, run_v = (run.keys(x) for x in (k, v))
        for piece in run.pieces(tile, q):
            heads, rows = _query_heads(piece, q, k), piece.queries
            new, new_lse = _piece_forward(
                q[:, heads, rows], run_k.take(piece), run_v.take(piece), piece.mask, tile.logits
            )
            if done.any(heads, rows):
                merge_(out[:, heads, rows], lse[:, heads, rows], new, new_lse, tile.logits)
            else:
                out[:, heads, rows], lse[:, heads, rows] = new, new_lse
    done.fill()
    return out[..., :value_dim].transpose(1, 2).to(q.dtype), lse.transpose(1, 2)


def backward(grad_out, q, k, v, out, lse, tile: Tile, grad_lse: Tensor | None):
    """See :func:`~longspan.attention.softmax.backends.tile_backward`."""
    dims = [x.shape[-1] for x in (q, k, v)]
    if grad_lse is not None:
        # A key's weight p moves lse by p: as if each value had one more entry, 1, which the output does not show.
        grad_out = torch.cat([grad_out, grad_lse[..., None].to(grad_out.dtype)], -1)
        v, out = torch.cat([v, v.new_ones(*v.shape[:3], 1)], -1), F.pad(out, (0, 1))
    grad_out, q, k, v, out = _heads_first(grad_out, q, k, v, out)
    lse = lse.transpose(1, 2)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)  # rows that see nothing: no NaN from inf - inf
    dtype = accumulation_dtype(q)
    dq, dk, dv = _time_first(q, dtype), [], []
    done = _RowTracker(dq)
    for run in _runs(tile, k.shape[1]):
        run_k, run_v = (run.keys(x) for x in (k, v))
        run_dk, run_dv = (run.zeros(x, dtype) for x in (k, v))
        for piece in run.pieces(tile, q):
            heads, rows = _query_heads(piece, q, k), piece.queries
            own = [x[:, heads, rows] for x in (grad_out, q, out, lse)]
            dq_piece, dk_piece, dv_piece = _piece_backward(
                *own, run_k.take(piece), run_v.take(piece), piece.mask, tile.logits
            )
            if done.any(heads, rows):
                dq[:, heads, rows] += dq_piece
            else:
                dq[:, heads, rows] = dq_piece
            run_dk.add(piece, dk_piece)
            run_dv.add(piece, dv_piece)
        dk.append(run_dk.rows)
        dv.append(run_dv.rows)
    done.fill()
    gradients = (dq, *(torch.cat(parts, 2) if len(parts) != 1 else parts[0] for parts in (dk, dv)))
    return tuple(x[..., :dim].transpose(1, 2) for x, dim in zip(gradients, dims, strict=True))


class _RowTracker:
    """Which rows of ``[batch, heads, time, ...]`` have been written: filling them all before costs as much as a piece."""

    def __init__(self, *tensors: Tensor, empty: float = 0.0):
        self.tensors, self.empty = tensors, (0.0, empty)
        self.rows = np.zeros(tensors[0].shape[1:3], bool)

    def any(self, heads: slice, rows: slice) -> bool:
        """Whether some were; they all are from now on."""
        found = bool(self.rows[heads, rows].any())
        if found and not self.rows[heads, rows].all():
            self.fill(heads, rows)
        self.rows[heads, rows] = True
        return found

    def fill(self, heads: slice = slice(None), rows: slice = slice(None)) -> None:
        """Make what was not written an empty result."""
        if self.rows[heads, rows].all():
            return
        missing = torch.from_numpy(~self.rows[heads, rows]).to(self.tensors[0].device)
        for tensor, value in zip(self.tensors, self.empty, strict=False):
            tensor[:, heads, rows].masked_fill_(
                missing.view(1, *missing.shape, *[1] * (tensor.ndim - 3)), value
            )


def _time_first(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Empty ``[batch, heads, time, dim]`` that lies in memory as the operations' users have it, time before heads."""
    return torch.empty_like(
        like.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format
    ).transpose(1, 2)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """``[batch, heads, time, dim]``, all of one dim: zeros added to keys or values change nothing."""
    dim = max(x.shape[-1] for x in tensors)
    return [
        F.pad(x, (0, dim - x.shape[-1])).transpose(1, 2) if x.shape[-1] < dim else x.transpose(1, 2)
        for x in tensors
    ]


def _query_heads(piece: Piece, q: Tensor, k: Tensor) -> slice:
    group = q.shape[1] // k.shape[1]
    return slice(piece.heads.start * group, piece.heads.stop * group)


def _runs(tile: Tile, kv_heads: int) -> Iterator["_Run"]:
    row = 0
    for at in tile.k_positions:
        yield _Run(tile.pattern, kv_heads, at, slice(row, row + len(at)))
        row += len(at)


class _Run:
    """One range of a tile's keys: which pieces it has, and its rows in granules."""

    def __init__(self, pattern: Pattern, kv_heads: int, at: Blocks, rows: slice):
        self.kv_heads, self.at, self.of_tile = kv_heads, at, rows
        self.lists = isinstance(pattern, BlockLists)
        self.groups = [] if self.lists else groups(pattern, kv_heads)
        self.gathers = self.lists or at.step > 1 or any(any(group.far) for group in self.groups)
        self.size = pattern.block if self.lists else granule(self.groups, at) if self.gathers else 1
        self.front = at.start * at.size % self.size if at.step == 1 else 0

    def pieces(self, tile: Tile, like: Tensor) -> Iterator[Piece]:
        row = 0
        for at in tile.q_positions:
            consecutive = (
                [at]
                if at.step == 1
                else [Blocks(at.start + i * at.step, 1, 1, at.size) for i in range(at.count)]
            )
            for queries in consecutive:
                if self.lists:
                    yield from list_pieces(tile.pattern, self.kv_heads, queries, row, self.at, like)
                for group in self.groups:
                    yield from pieces(group, queries, row, self.at, self.size, like)
                row += len(queries)

    def keys(self, x: Tensor) -> "_Keys":
        """Of ``x`` ``[batch, kv_heads, keys of the tile, dim]``."""
        x = x[:, :, self.of_tile]
        if not self.gathers:
            return _Keys(x, 1, 0, x.shape[2])
        if x.shape[2] == self._padded:
            return _Keys(x.contiguous(), self.size, self.front, x.shape[2])
        keys = self.zeros(x, x.dtype)
        keys.rows.copy_(x)
        return keys

    def zeros(self, like: Tensor, dtype: torch.dtype) -> "_Keys":
        """A sum for each row of the run."""
        x = torch.zeros(
            *like.shape[:2], self._padded, like.shape[3], dtype=dtype, device=like.device
        )
        return _Keys(x, self.size, self.front, len(self.at))

    @property
    def _padded(self) -> int:
        """Rows with those that fill up the first granule and the last."""
        return -(-(self.front + len(self.at)) // self.size) * self.size


class _Keys:
    """Rows of keys ``[batch, kv_heads, rows, dim]`` that pieces take, and add to, by slices or by granules."""

    def __init__(self, x: Tensor, size: int, front: int, count: int):
        self.x, self.size, self.front, self.count = x, size, front, count

    @property
    def rows(self) -> Tensor:
        """Without the padding."""
        return self.x[:, :, self.front : self.front + self.count]

    def take(self, piece: Piece) -> Tensor:
        if isinstance(piece.keys, slice):
            return self.rows[:, piece.heads, piece.keys]
        index, shape = self._index(piece)
        return self._granules.index_select(0, index).view(shape)

    def add(self, piece: Piece, x: Tensor) -> None:
        if isinstance(piece.keys, slice):
            self.rows[:, piece.heads, piece.keys] += x
        else:
            index, _ = self._index(piece)
            self._granules.index_add_(0, index, x.reshape(len(index), -1).to(self.x.dtype))

    @property
    def _granules(self) -> Tensor:
        return self.x.view(-1, self.size * self.x.shape[3])

    def _index(self, piece: Piece) -> tuple[Tensor, tuple[int, ...]]:
        batch, heads, rows, dim = self.x.shape
        first = torch.arange(batch * heads, device=self.x.device).view(batch, heads, 1)[
            :, piece.heads
        ] * (rows // self.size)
        index = first + piece.keys
        return index.flatten(), (batch, index.shape[1], -1, dim)


def _piece_forward(q, k, v, mask: Mask | str | None, logits: LogitOptions):
    if (
        q.device.type not in _FLASH_DEVICES
        or logits.softcap is not None
        or logits.sigmoid_bias is not None
    ):
        return _formula_forward(q, k, v, mask, logits)
    causal, added = _flash_mask(mask, q, k)
    out, lse = _FLASH(q, k, v, 0.0, causal, attn_mask=added, scale=logits.scale)
    if (
        isinstance(mask, Mask) and mask.blind is not None
    ):  # the kernel gives such rows 0 and a log-sum-exp of 0
        lse = lse.masked_fill(_of_query_heads(mask.blind, q, k), -torch.inf)
    return out, lse


def _piece_backward(grad_out, q, out, lse, k, v, mask: Mask | str | None, logits: LogitOptions):
    if (
        q.device.type not in _FLASH_DEVICES
        or logits.softcap is not None
        or logits.sigmoid_bias is not None
    ):
        return _formula_backward(grad_out, q, out, lse, k, v, mask, logits)
    causal, added = _flash_mask(mask, q, k)
    return _FLASH_BACKWARD(
        grad_out, q, k, v, out.to(q.dtype), lse, 0.0, causal, attn_mask=added, scale=logits.scale
    )


def _flash_mask(mask: Mask | str | None, q: Tensor, k: Tensor) -> tuple[bool, Tensor | None]:
    """Whether causal, and the additive mask ``[batch or 1, heads or 1, queries, keys]``."""
    return (
        (False, _of_query_heads(mask.added, q, k))
        if isinstance(mask, Mask)
        else (mask == "causal", None)
    )


def _of_query_heads(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """From ``[batch or 1, kv_heads or 1, ...]`` to one of each query head, where there is more than one."""
    return x if x.shape[1] == 1 else x.repeat_interleave(q.shape[1] // k.shape[1], 1)


def _formula_forward(q, k, v, mask, logits):
    outs, lses = [], []
    for rows in _chunks(q, k):
        s, _ = _scores(q[:, :, rows], k, mask, rows, logits)
        if logits.sigmoid_bias is not None:
            p, lse = s.sigmoid(), s.new_zeros(s.shape[:-1])
        else:
            lse = s.logsumexp(-1)
            p = (s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
        outs.append(torch.einsum("bhgqk,bhkd->bhgqd", p, v.to(p.dtype)).flatten(1, 2))
        lses.append(lse.flatten(1, 2))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _formula_backward(grad_out, q, out, lse, k, v, mask, logits):
    """FlashAttention's backward (arXiv 2205.14135, algorithm 4)."""
    dtype = accumulation_dtype(q)
    dq, dk, dv = (
        [],
        torch.zeros(k.shape, dtype=dtype, device=k.device),
        torch.zeros(v.shape, dtype=dtype, device=v.device),
    )
    for rows in _chunks(q, k):
        own = (_grouped(x[:, :, rows].to(dtype), k) for x in (grad_out, q, out, lse))
        grad_out_rows, q_rows, out_rows, lse_rows = own
        s, slope = _scores(q[:, :, rows], k, mask, rows, logits)
        dp = torch.einsum("bhgqd,bhkd->bhgqk", grad_out_rows, v.to(dtype))
        if logits.sigmoid_bias is not None:
            p = s.sigmoid()
            ds = p * (1 - p) * dp
        else:
            p = (s - lse_rows[..., None]).exp()
            ds = p * (dp - (grad_out_rows * out_rows).sum(-1, keepdim=True))
        ds = ds * slope
        dq.append(torch.einsum("bhgqk,bhkd->bhgqd", ds, k.to(dtype)).flatten(1, 2))
        dk += torch.einsum("bhgqk,bhgqd->bhkd", ds, q_rows)
        dv += torch.einsum("bhgqk,bhgqd->bhkd", p, grad_out_rows)
    return torch.cat(dq, 2), dk, dv


def _chunks(q: Tensor, k: Tensor) -> list[slice]:
    size = max(1, _PAIRS // max(1, k.shape[2]))
    return [slice(start, min(q.shape[2], start + size)) for start in range(0, q.shape[2], size)]


def _scores(
    q: Tensor, k: Tensor, mask: Mask | str | None, rows: slice, logits: LogitOptions
) -> tuple[Tensor, Tensor | float]:
    """LogitOptions ``[batch, kv_heads, group, queries, keys]``, hidden ones minus infinity, and their slope in the products."""
    dtype, slope = accumulation_dtype(q), logits.scale
    s = torch.einsum("bhgqd,bhkd->bhgqk", _grouped(q.to(dtype), k), k.to(dtype)) * logits.scale
    if logits.softcap is not None:
        s = (s / logits.softcap).tanh()
        s, slope = s * logits.softcap, (1 - s.square()) * logits.scale
    if logits.sigmoid_bias is not None:
        s = s + logits.sigmoid_bias
    if isinstance(mask, Mask):
        s = s + mask.added[:, :, None, rows]
    elif mask == "causal":
        at = torch.arange(k.shape[2], device=q.device)
        s = s.masked_fill(at[rows, None] < at, -torch.inf)
    return s, slope


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """``[batch, kv_heads, heads per KV head, ...]``."""
    return x.unflatten(1, (k.shape[1], -1))
