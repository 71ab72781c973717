"""The products of one piece of a tile: some queries with some keys, by torch's kernels."""

from typing import Literal

import torch
from torch import Tensor

from ..arguments import accumulation_dtype
from .pieces import Mask
from .tiles import LogitOptions

# torch has a fused kernel that returns the log-sum-exp, and whose backward accepts the final one.
_FUSED_KERNEL_DEVICES = {"cpu"}
_FUSED_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

_MAX_PAIRS = 1 << 21
"""Pairs of one head whose logits are held at a time where there is no fused kernel."""

PieceMask = Mask | Literal["causal"] | None


def finite(lse: Tensor) -> Tensor:
    """Replace minus infinity, of queries that see nothing, by 0: no NaN from inf - inf."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _has_fused_kernel(q: Tensor, logits: LogitOptions) -> bool:
    plain_softmax = logits.softcap is None and logits.is_softmax
    return plain_softmax and q.device.type in _FUSED_KERNEL_DEVICES


def piece_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: PieceMask, logits: LogitOptions
) -> tuple[Tensor, Tensor]:
    """Compute the output and the log-sum-exp of a piece's queries over its keys.

    Args:
        q: ``[batch, heads, queries, dim]``.
        k, v: ``[batch, kv_heads, keys, dim]``, the dim of the queries.

    Returns:
        ``[batch, heads, queries, dim]`` and ``[batch, heads, queries]``.
    """
    if not _has_fused_kernel(q, logits):
        return _formula_forward(q, k, v, mask, logits)
    is_causal, bias = _fused_kernel_mask(mask, q, k)
    out, lse = _FUSED_FORWARD(q, k, v, 0.0, is_causal, attn_mask=bias, scale=logits.scale)
    if isinstance(mask, Mask) and mask.sees_nothing is not None:
        # The kernel gives such queries 0 and a log-sum-exp of 0.
        lse = lse.masked_fill(_per_query_head(mask.sees_nothing, q, k), -torch.inf)
    return out, lse


def piece_backward(
    grad_out: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    mask: PieceMask,
    logits: LogitOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a piece's gradients of ``q``, ``k`` and ``v``, in their shapes.

    Args:
        out, lse: final ones of the queries, over all keys that they see; ``lse`` is finite.
    """
    if not _has_fused_kernel(q, logits):
        return _formula_backward(grad_out, q, out, lse, k, v, mask, logits)
    is_causal, bias = _fused_kernel_mask(mask, q, k)
    return _FUSED_BACKWARD(
        grad_out, q, k, v, out.to(q.dtype), lse, 0.0, is_causal, attn_mask=bias, scale=logits.scale
    )


def _fused_kernel_mask(mask: PieceMask, q: Tensor, k: Tensor) -> tuple[bool, Tensor | None]:
    """Return whether it is causal, and a bias ``[batch or 1, heads or 1, queries, keys]``."""
    if isinstance(mask, Mask):
        return False, _per_query_head(mask.bias, q, k)
    return mask == "causal", None


def _per_query_head(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Repeat the heads of ``x``, ``[batch or 1, kv_heads or 1, ...]``, unless there is only one."""
    if x.shape[1] == 1:
        return x
    return x.repeat_interleave(q.shape[1] // k.shape[1], 1)


def _formula_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: PieceMask, logits: LogitOptions
) -> tuple[Tensor, Tensor]:
    """Compute the piece by its definition, some queries at a time."""
    outs = []
    lses = []
    for queries in _query_chunks(q, k):
        # [batch, kv_heads, group, queries, keys]
        scores, _ = _scores(q[:, :, queries], k, mask, queries, logits)
        if logits.is_softmax:
            lse = scores.logsumexp(-1)
            weights = (scores - finite(lse)[..., None]).exp()
        else:
            lse = scores.new_zeros(scores.shape[:-1])
            weights = scores.sigmoid()
        out = torch.einsum("bhgqk,bhkd->bhgqd", weights, v.to(weights.dtype))
        outs.append(out.flatten(1, 2))
        lses.append(lse.flatten(1, 2))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _formula_backward(
    grad_out: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    mask: PieceMask,
    logits: LogitOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention's backward (arXiv 2205.14135, algorithm 4), some queries at a time."""
    dtype = accumulation_dtype(q)
    dq_chunks = []
    dk = torch.zeros(k.shape, dtype=dtype, device=k.device)
    dv = torch.zeros(v.shape, dtype=dtype, device=v.device)
    for queries in _query_chunks(q, k):
        # [batch, kv_heads, group, queries, ...]
        chunk_grad_out = _grouped(grad_out[:, :, queries].to(dtype), k)
        chunk_q = _grouped(q[:, :, queries].to(dtype), k)
        chunk_out = _grouped(out[:, :, queries].to(dtype), k)
        chunk_lse = _grouped(lse[:, :, queries].to(dtype), k)

        scores, slope = _scores(q[:, :, queries], k, mask, queries, logits)
        if not logits.is_softmax:  # no log-sum-exp tells which queries see nothing
            sees_keys = (scores > -torch.inf).any(-1, keepdim=True)
            chunk_grad_out = chunk_grad_out.where(sees_keys, 0.0)
        grad_weights = torch.einsum("bhgqd,bhkd->bhgqk", chunk_grad_out, v.to(dtype))
        if logits.is_softmax:
            weights = (scores - chunk_lse[..., None]).exp()
            delta = (chunk_grad_out * chunk_out).sum(-1, keepdim=True)
            grad_scores = weights * (grad_weights - delta)
        else:
            weights = scores.sigmoid()
            grad_scores = weights * (1 - weights) * grad_weights
        grad_products = grad_scores * slope

        dq_chunk = torch.einsum("bhgqk,bhkd->bhgqd", grad_products, k.to(dtype))
        dq_chunks.append(dq_chunk.flatten(1, 2))
        dk += torch.einsum("bhgqk,bhgqd->bhkd", grad_products, chunk_q)
        dv += torch.einsum("bhgqk,bhgqd->bhkd", weights, chunk_grad_out)
    return torch.cat(dq_chunks, 2), dk, dv


def _query_chunks(q: Tensor, k: Tensor) -> list[slice]:
    """Cut the queries so that no more than ``_MAX_PAIRS`` pairs of a head are held at a time."""
    num_queries = q.shape[2]
    size = max(1, _MAX_PAIRS // max(1, k.shape[2]))
    return [slice(start, min(num_queries, start + size)) for start in range(0, num_queries, size)]


def _scores(
    q: Tensor, k: Tensor, mask: PieceMask, queries: slice, logits: LogitOptions
) -> tuple[Tensor, Tensor | float]:
    """Compute the logits of some queries, minus infinity for hidden pairs.

    Args:
        q: the queries, which are ``queries`` of the piece.

    Returns:
        Logits ``[batch, kv_heads, group, queries, keys]``, and their derivative by the products.
    """
    dtype = accumulation_dtype(q)
    products = torch.einsum("bhgqd,bhkd->bhgqk", _grouped(q.to(dtype), k), k.to(dtype))
    scores = products * logits.scale
    slope: Tensor | float = logits.scale
    if logits.softcap is not None:
        tanh = (scores / logits.softcap).tanh()
        scores = tanh * logits.softcap
        slope = (1 - tanh.square()) * logits.scale
    if logits.sigmoid_bias is not None:
        scores = scores + logits.sigmoid_bias

    if isinstance(mask, Mask):
        scores = scores + mask.bias[:, :, None, queries]
    elif mask == "causal":
        positions = torch.arange(k.shape[2], device=q.device)
        scores = scores.masked_fill(positions[queries, None] < positions, -torch.inf)
    return scores, slope


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """View ``[batch, heads, ...]`` as ``[batch, kv_heads, heads per KV head, ...]``."""
    return x.unflatten(1, (k.shape[1], -1))
