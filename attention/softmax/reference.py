"""Every pair of a tile in fp64, hidden ones masked: the oracle of the other backends."""

import numpy as np
import torch
from torch import Tensor

from ..arguments import accumulation_dtype
from ..patterns import Pattern
from ..patterns.rules import Blocks
from .tiles import LogitOptions, Tile


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, logits: LogitOptions
) -> None:
    """It does all."""


def forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    q64, k64, v64 = _wide(q, k, v)
    p, lse = _weights(q64, k64, tile)
    out = torch.einsum("bhgqk,bkhd->bqhgd", p, v64).flatten(2, 3)
    return out.to(q.dtype), lse.to(accumulation_dtype(q))


def backward(grad_out, q, k, v, out, lse, tile: Tile, grad_lse: Tensor | None):
    """The softmax's own gradient, from the final log-sum-exp (FlashAttention, arXiv 2205.14135, algorithm 4)."""
    logits, dtype = tile.logits, accumulation_dtype(q)
    grad_out, q, k, v, out, lse = _wide(grad_out, q, k, v, out, lse)
    group = lambda x: x.unflatten(2, (k.shape[2], -1))  # noqa: E731
    s, cap = _scores(q, k, tile)
    p = (
        s.sigmoid()
        if logits.sigmoid_bias is not None
        else (s - _finite(_rows(lse, k))[..., None]).exp()
    )
    dp = torch.einsum("bqhgd,bkhd->bhgqk", group(grad_out), v)
    if logits.sigmoid_bias is not None:
        ds = dp * p * (1 - p)
    else:
        delta = (grad_out * out).sum(-1) - (0.0 if grad_lse is None else grad_lse.double())
        ds = p * (dp - _rows(delta, k)[..., None])
    ds = ds * cap * logits.scale
    dq = torch.einsum("bhgqk,bkhd->bqhgd", ds, k).flatten(2, 3)
    dk = torch.einsum("bhgqk,bqhgd->bkhd", ds, group(q))
    dv = torch.einsum("bhgqk,bqhgd->bkhd", p, group(grad_out))
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def positions(at: tuple[Blocks, ...], device: torch.device) -> Tensor:
    """Of all rows, in order."""
    return torch.from_numpy(
        np.concatenate([np.zeros(0, np.int64), *(blocks.positions() for blocks in at)])
    ).to(device)


def _weights(q, k, tile):
    s, _ = _scores(q, k, tile)
    if tile.logits.sigmoid_bias is not None:
        return s.sigmoid(), torch.zeros(q.shape[:3], device=q.device)
    lse = s.logsumexp(-1)
    return (s - _finite(lse)[..., None]).exp(), lse.flatten(1, 2).transpose(1, 2)


def _scores(q, k, tile):
    """LogitOptions ``[batch, kv_heads, group, queries, keys]``, minus infinity where hidden, and the softcap's derivative."""
    logits = tile.logits
    s = torch.einsum("bqhgd,bkhd->bhgqk", q.unflatten(2, (k.shape[2], -1)), k) * logits.scale
    cap = torch.ones(())
    if logits.softcap is not None:
        s = (s / logits.softcap).tanh()
        cap, s = 1 - s.square(), s * logits.softcap
    if logits.sigmoid_bias is not None:
        s = s + logits.sigmoid_bias
    visible = tile.pattern.mask(
        positions(tile.q_positions, q.device), positions(tile.k_positions, q.device), k.shape[2]
    )
    visible = visible if visible.ndim == 4 else visible[None]
    return s.masked_fill(~visible[:, :, None], -torch.inf), cap


def _rows(x: Tensor, k: Tensor) -> Tensor:
    """From ``[batch, queries, heads]`` to ``[batch, kv_heads, group, queries]``."""
    return x.transpose(1, 2).unflatten(1, (k.shape[2], -1))


def _finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [x.double() for x in tensors]
