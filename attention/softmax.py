"""Softmax attention under a pattern, on one device."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .documents import check_documents, one_document
from .patterns import Causal, Pattern


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    documents: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of ``q`` over the keys that ``pattern`` shows it, within each document.

    Args:
        q: ``[batch, time, heads, head_dim]``.
        k: ``[batch, time, kv_heads, head_dim]``; ``kv_heads`` divides ``heads``, query head ``h`` reads KV head
            ``h // (heads // kv_heads)``.
        v: ``[batch, time, kv_heads, value_dim]``.
        documents: int ``[batch, time]``, non-decreasing along time; attention never crosses from one id to another, and
            the pattern's positions count from a document's first token.
        scale: of the logits; ``head_dim ** -0.5`` by default.
        backend: ``torch`` (SDPA on the whole triangle, or on the key blocks that a pattern needs), ``reference`` (dense
            mask in fp64) or ``auto``.

    Returns:
        ``[batch, time, heads, value_dim]`` in the dtype of ``q``, differentiable in ``q``, ``k`` and ``v``.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check(q, k, v, documents)
    if backend not in ("auto", *_BACKENDS):
        raise ValueError(f"backend must be auto, {' or '.join(_BACKENDS)}, got {backend!r}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    documents = None if one_document(documents) else documents
    return _BACKENDS["torch" if backend == "auto" else backend](q, k, v, pattern, documents, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> None:
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [batch, time, heads, dim], got shape {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, but q is {q.dtype} on {q.device}")
    if k.shape[:2] != q.shape[:2] or v.shape[:3] != k.shape[:3] or k.shape[3] != q.shape[3]:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads, which do not divide the {q.shape[2]} heads of q")
    check_documents(documents, q)


def _reference(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, documents: Tensor | None, scale: float) -> Tensor:
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64, device=q.device)
    group = q.shape[2] // k.shape[2]
    for row, piece in _pieces(q, documents):
        positions = torch.arange(piece.stop - piece.start, device=q.device)
        visible = pattern.mask(positions, positions, k.shape[2]).repeat_interleave(group, 0)
        queries = q[row, piece].double()
        keys, values = (x[row, piece].double().repeat_interleave(group, -2) for x in (k, v))
        logits = torch.einsum("bqhd,bkhd->bhqk", queries, keys) * scale
        weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
        out[row, piece] = torch.einsum("bhqk,bkhd->bqhd", weights, values)
    return out.to(q.dtype)


def _torch(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, documents: Tensor | None, scale: float) -> Tensor:
    one_piece = _causal_piece if isinstance(pattern, Causal) else _gathered_piece
    outs = [one_piece(q[row, piece], k[row, piece], v[row, piece], pattern, scale) for row, piece in _pieces(q, documents)]
    if documents is None:
        return outs[0]
    return torch.cat([out.flatten(0, 1) for out in outs]).unflatten(0, q.shape[:2])


def _causal_piece(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _gathered_piece(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float) -> Tensor:
    """One document: for each stretch of queries, gather the key blocks that each KV head needs and mask what is left.

    Work grows with the pairs that the pattern shows, memory with the length. The heads need different keys but equally
    many blocks give or take one, so they go through one batched SDPA, padded with hidden keys.
    """
    length, kv_heads, group = q.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    stretch = _QUERY_BLOCKS * pattern.block
    heads = torch.arange(kv_heads, device=q.device)[:, None]
    keys, values = (x.transpose(1, 2) for x in (k, v))
    outs = []
    for start in range(0, length, stretch):
        stop = min(start + stretch, length)
        at = [
            torch.cat([blocks.positions(pattern.block, q.device) for blocks in pattern.need(start, stop, head)])
            for head in range(kv_heads)
        ]
        # A position past the stretch is hidden by causality: it serves as padding, read from the last real key.
        at = torch.nn.utils.rnn.pad_sequence(at, batch_first=True, padding_value=stop)
        queries = torch.arange(start, stop, device=q.device)
        visible = torch.stack([pattern.from_head(head).mask(queries, at[head], 1)[0] for head in range(kv_heads)])
        at = at.clamp(max=length - 1)
        out = F.scaled_dot_product_attention(
            q[:, start:stop].transpose(1, 2),
            keys[:, heads, at].repeat_interleave(group, 1),
            values[:, heads, at].repeat_interleave(group, 1),
            attn_mask=visible.repeat_interleave(group, 0)[None],
            scale=scale,
        )
        outs.append(out.transpose(1, 2))
    return torch.cat(outs, 1)


def _pieces(q: Tensor, documents: Tensor | None) -> Iterator[tuple[slice, slice]]:
    """(batch rows, time range) of each document, in order; the whole batch at once where there is one document."""
    if documents is None:
        yield slice(None), slice(0, q.shape[1])
        return
    for row, ids in enumerate(documents):
        start = 0
        for count in ids.unique_consecutive(return_counts=True)[1].tolist():
            yield slice(row, row + 1), slice(start, start + count)
            start += count


# Query blocks that share one gather of keys: more of them waste work at the band's corner, fewer waste calls.
_QUERY_BLOCKS = 8

_BACKENDS: dict[str, Callable[..., Tensor]] = {"torch": _torch, "reference": _reference}
