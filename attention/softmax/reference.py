"""Tiles with every pair in fp64, hidden ones masked: the oracle of the other backends.

It shares no formula with them on purpose.
"""

import numpy as np
import torch
from torch import Tensor

from ..arguments import accumulation_dtype
from ..patterns import Blocks, Pattern
from .tiles import LogitOptions, Tile


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, logits: LogitOptions
) -> str | None:
    """Return None: this backend supports every call."""
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """See :func:`~longspan.attention.softmax.backends.tile_forward`."""
    scores, _ = _scores(q.double(), k.double(), tile)
    if tile.logits.is_softmax:
        row_lse = scores.logsumexp(-1)  # [batch, kv_heads, group, queries]
        weights = (scores - _finite(row_lse)[..., None]).exp()
        lse = row_lse.flatten(1, 2).transpose(1, 2)  # [batch, queries, heads]
    else:
        weights = scores.sigmoid()
        lse = torch.zeros(q.shape[:3], device=q.device)
    out = torch.einsum("bhgqk,bkhd->bqhgd", weights, v.double()).flatten(2, 3)
    return out.to(q.dtype), lse.to(accumulation_dtype(q))


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
    """See :func:`~longspan.attention.softmax.backends.tile_backward`.

    The softmax's own gradient, from the final log-sum-exp (FlashAttention, arXiv 2205.14135,
    algorithm 4).
    """
    logits = tile.logits
    dtype = accumulation_dtype(q)
    grad_out, q, k, v, out, lse = (x.double() for x in (grad_out, q, k, v, out, lse))
    kv_heads = k.shape[2]
    grouped_q = q.unflatten(2, (kv_heads, -1))  # [batch, queries, kv_heads, group, dim]
    grouped_grad_out = grad_out.unflatten(2, (kv_heads, -1))

    scores, softcap_slope = _scores(q, k, tile)
    if not logits.is_softmax:  # no log-sum-exp tells which queries see nothing
        sees_keys = (scores > -torch.inf).any(-1)  # [batch, kv_heads, group, queries]
        grouped_grad_out = grouped_grad_out.where(sees_keys.movedim(3, 1)[..., None], 0.0)
    grad_weights = torch.einsum("bqhgd,bkhd->bhgqk", grouped_grad_out, v)
    if logits.is_softmax:
        weights = (scores - _finite(_per_kv_head(lse, kv_heads))[..., None]).exp()
        delta = (grad_out * out).sum(-1) - (0.0 if grad_lse is None else grad_lse.double())
        grad_scores = weights * (grad_weights - _per_kv_head(delta, kv_heads)[..., None])
    else:
        weights = scores.sigmoid()
        grad_scores = grad_weights * weights * (1 - weights)
    grad_products = grad_scores * softcap_slope * logits.scale

    dq = torch.einsum("bhgqk,bkhd->bqhgd", grad_products, k).flatten(2, 3)
    dk = torch.einsum("bhgqk,bqhgd->bkhd", grad_products, grouped_q)
    dv = torch.einsum("bhgqk,bqhgd->bkhd", weights, grouped_grad_out)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _scores(q: Tensor, k: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """Compute the logits of all pairs, minus infinity for hidden ones.

    Returns:
        Logits ``[batch, kv_heads, group, queries, keys]``, and the derivative of the softcap.
    """
    logits = tile.logits
    kv_heads = k.shape[2]
    grouped_q = q.unflatten(2, (kv_heads, -1))
    scores = torch.einsum("bqhgd,bkhd->bhgqk", grouped_q, k) * logits.scale
    softcap_slope = torch.ones(())
    if logits.softcap is not None:
        tanh = (scores / logits.softcap).tanh()
        scores = tanh * logits.softcap
        softcap_slope = 1 - tanh.square()
    if logits.sigmoid_bias is not None:
        scores = scores + logits.sigmoid_bias

    q_positions = _positions(tile.q_positions, q.device)
    k_positions = _positions(tile.k_positions, q.device)
    visible = tile.pattern.mask(q_positions, k_positions, kv_heads)
    if visible.ndim == 3:
        visible = visible[None]  # [batch or 1, kv_heads or heads, queries, keys]
    visible = visible.unflatten(1, (kv_heads, -1))  # [batch or 1, kv_heads, group or 1, ...]
    return scores.masked_fill(~visible, -torch.inf), softcap_slope


def _positions(ranges: tuple[Blocks, ...], device: torch.device) -> Tensor:
    """Return the positions of all tokens of the ranges, in order."""
    none = np.zeros(0, np.int64)
    positions = np.concatenate([none, *(blocks.positions() for blocks in ranges)])
    return torch.from_numpy(positions).to(device)


def _per_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """Turn ``[batch, queries, heads]`` into ``[batch, kv_heads, group, queries]``."""
    return x.transpose(1, 2).unflatten(1, (kv_heads, -1))


def _finite(lse: Tensor) -> Tensor:
    """Replace minus infinity, of queries that see nothing, by 0: no NaN from inf - inf."""
    return lse.masked_fill(lse == -torch.inf, 0.0)
