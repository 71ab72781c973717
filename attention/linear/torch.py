"""Linear attention in plain torch, any family on any device: matrix products within chunks of tokens, a state between them.

With ``G`` the sum of the log-decays within a chunk of ``C`` tokens (arXiv 2312.06635 sec. 4, 2406.06484 sec. 3, 2412.06464)::

    D_ij = exp(G_i - G_j) for i >= j, else 0       scores = (Q K^T) D       reading = Q exp(G)       writing = K exp(G_C - G)
    O = scores V' + reading S                      S' = exp(G_C) S + writing^T V'

where ``V' = V``, and with the delta rule ``V' = T diag(beta) (V - (K exp(G)) S)`` with the inverse
``T = (I + tril(diag(beta) (K K^T) D, -1))^-1``.
Every exponent is a sum of log-decays between two tokens, so at most 0: no decay is too strong. A document's edge is a factor of
0, never a decay of minus infinity, which would turn differences of decays into NaN.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..arguments import accumulation_dtype
from .decays import after

_CHUNK = 64
_STRONGEST = -800.0
_SEGMENT = 512
"""Tokens whose intermediate results exist at one time: those of a longer sequence are made again for backward."""


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None
) -> None:
    """It can do everything."""


def run(q, k, v, decay, beta, scale, state, documents) -> tuple[Tensor, Tensor]:
    """See :func:`~longspan.attention.linear.attention.linear_attention`."""
    dtype, length = accumulation_dtype(q), q.shape[1]
    # Whole chunks first; what is left of the length is one short chunk.
    edges = sorted(
        {*range(0, length - length % _CHUNK, _SEGMENT), length - length % _CHUNK, length}
    )
    parts = [stop - start for start, stop in pairwise(edges)]
    per_token = [q, k, v, beta, decay if decay is not None and decay.ndim > 1 else None]
    # One split: slices would each fill a gradient of the whole length.
    pieces = zip(
        *([None] * len(parts) if x is None else x.split(parts, 1) for x in per_token), strict=True
    )
    outs = []
    state = state.to(dtype).unflatten(1, (q.shape[2], -1))
    for start, (*tokens, gates) in zip(edges, pieces, strict=False):
        arguments = (*tokens, decay if gates is None else gates, scale, state, documents, start)
        if len(parts) > 1 and torch.is_grad_enabled():
            out, state = _RecomputedSegment.apply(*arguments)
        else:
            out, state = _segment(*arguments)
        outs.append(out)
    out = torch.cat(outs, 1) if outs else v.to(dtype)
    return out, state.flatten(1, 2)


class _RecomputedSegment(torch.autograd.Function):
    """:func:`_segment`, whose intermediate results are made again for backward.

    What `torch.utils.checkpoint` does, without its second of imports and a fifth of the forward time that its hooks take.
    """

    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*(x for x in arguments if isinstance(x, Tensor)))
        ctx.others = [None if isinstance(x, Tensor) else (x,) for x in arguments]
        return _segment(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        saved = iter(ctx.saved_tensors)
        arguments = [next(saved).detach() if other is None else other[0] for other in ctx.others]
        wanted = [
            x.requires_grad_()
            for x, needed in zip(arguments, ctx.needs_input_grad, strict=True)
            if needed
        ]
        with torch.autocast(wanted[0].device.type, enabled=False):
            with torch.enable_grad():
                results = _segment(*arguments)
            # The last state does not depend on the queries.
            used = [pair for pair in zip(results, gradients, strict=True) if pair[0].requires_grad]
            outputs, upstream = zip(*used, strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, upstream))
        return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


class _SameDocument(NamedTuple):
    """Which tokens and states of a segment share a document, each broadcast over heads."""

    pairs: Tensor
    """``[batch, 1, 1, chunks, tokens, tokens]``."""
    before: Tensor
    """Tokens and the state before their chunk, ``[batch, 1, 1, chunks, tokens, 1]``."""
    after: Tensor
    """Tokens and the state after their chunk, the same shape."""
    through: Tensor
    """The states before and after a chunk, ``[batch, 1, 1, chunks, 1, 1]``."""

    @classmethod
    def of(cls, documents: Tensor, start: int, stop: int) -> "_SameDocument":
        chunks = documents[:, start:stop].unflatten(1, (-1, min(_CHUNK, stop - start)))
        ends = torch.cat([documents[:, max(0, start - 1), None], chunks[:, :, -1]], 1)
        before, after = ends[:, :-1, None], ends[:, 1:, None]
        found = (
            chunks[:, :, :, None] == chunks[:, :, None],
            chunks == before,
            chunks == after,
            before == after,
        )
        return cls(found[0][:, None, None], *(x[:, None, None, ..., None] for x in found[1:]))


def _segment(
    q, k, v, beta, decay, scale, state, documents: Tensor | None, start: int
) -> tuple[Tensor, Tensor]:
    """Tokens ``[batch, time, heads, dim]`` from ``start`` on, the state ``[batch, key heads, group, key_dim, value_dim]``.

    Inside, tensors are ``[batch, key heads, group, chunks, tokens, dim]``; those of keys have a group of one.
    """
    dtype, key_heads, size = state.dtype, q.shape[2], min(_CHUNK, q.shape[1])
    same = None if documents is None else _SameDocument.of(documents, start, start + q.shape[1])

    def chunked(x: Tensor) -> Tensor:
        x = x.to(dtype).unflatten(2, (key_heads, -1)).unflatten(1, (-1, size))
        return x.permute(0, 3, 4, 1, 2, *range(5, x.ndim)).contiguous()

    q, k, v = chunked(q) * scale, chunked(k), chunked(v)
    log = _log_decay(decay, chunked, key_heads, size, dtype)
    rows = q[None] if beta is None else torch.stack([q, k])
    if log is None:
        scores, decayed, writing, carry = (rows @ k.mT).tril(), rows, k, None
    elif log.shape[-1] > 1:
        scores, decayed, writing, through = _pairs_by_key(rows, k, log)
        carry = through.mT
    else:
        scores, from_start = (rows @ k.mT) * _pair_decays(log), log.cumsum(-2)
        decayed, writing, carry = (
            rows * from_start.exp(),
            k * after(log, -2).exp(),
            from_start[..., -1:, :].exp().mT,
        )
    reading, recalling = decayed[0], None if beta is None else decayed[1]
    if same is not None:
        scores, reading, writing = scores * same.pairs, reading * same.before, writing * same.after
        carry = same.through.to(dtype) if carry is None else carry * same.through
        recalling = None if recalling is None else recalling * same.before
    if beta is None:
        states, state = _states(state, writing.mT @ v, carry)
    else:
        beta = chunked(beta)[..., None]
        solved = _inverse((beta * scores[1]).tril(-1)) * beta.mT
        states, v, state = _delta_states(state, solved @ v, solved @ recalling, writing, carry)
    out = scores[0] @ v + reading @ states
    return out.permute(0, 3, 4, 1, 2, 5).flatten(1, 2).flatten(2, 3), state


def _log_decay(
    decay: Tensor | None, chunked, key_heads: int, size: int, dtype: torch.dtype
) -> Tensor | None:
    """``[batch, key heads, group, chunks, tokens, key_dim]``, with ones where it does not depend on batch, chunk or key."""
    if decay is None:
        return None
    if decay.ndim == 1:
        return (
            decay.to(dtype)
            .unflatten(0, (key_heads, -1))[None, :, :, None, None, None]
            .expand(-1, -1, -1, -1, size, -1)
        )
    return chunked(decay) if decay.ndim == 4 else chunked(decay)[..., None]


def _pair_decays(log: Tensor) -> Tensor:
    """``D`` ``[..., tokens, tokens]`` of one decay per token; 1 on the diagonal, 0 above."""
    # Differences of large sums: in fp64, and without more than makes exp() 0 there.
    total = log.double().clamp(min=_STRONGEST).cumsum(-2)
    return (total - total.mT).to(log.dtype).tril(-1).exp().tril()


def _pairs_by_key(rows: Tensor, k: Tensor, log: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a chunk with a decay for each key dim ``c``, for ``[..., tokens, key_dim]``: the scores
    ``sum_c rows_ic k_jc exp(G_ic - G_jc)`` for ``i >= j``, ``rows exp(G)``, ``k exp(G_C - G)`` and ``exp(G_C)``.

    Chunks are put together from halves: a later row and an earlier key meet where the half of one ends and that of the other
    begins, so that each is decayed by what lies between it and there, and their product is a matrix product. Rows are always
    decayed from the start of their half, keys to the end of theirs.
    """
    size = k.shape[-2]
    whole = 1 << (size - 1).bit_length()
    rows, k, log = (torch.nn.functional.pad(x, (0, 0, 0, whole - size)) for x in (rows, k, log))
    scores = (rows * k).sum(-1).expand(torch.broadcast_shapes(rows.shape[:-1], log.shape[:-1]))
    # [..., blocks, half, half], [..., blocks, half, key_dim], [..., blocks, 1, key_dim]
    scores, through = scores[..., None, None], log.exp()[..., None, :]
    rows, k = rows[..., None, :] * through, k[..., None, :].expand_as(through)
    while scores.shape[-3] > 1:
        (upper, lower), (early, late), (first, second), (before, since) = (
            x.unflatten(-3, (-1, 2)).unbind(-3) for x in (scores, rows, k, through)
        )
        between = late @ first.mT
        scores = torch.cat(
            [torch.cat([upper, torch.zeros_like(upper)], -1), torch.cat([between, lower], -1)], -2
        )
        rows, k = torch.cat([early, late * before], -2), torch.cat([first * since, second], -2)
        through = before * since
    return (
        scores[..., 0, :size, :size],
        rows[..., 0, :size, :],
        k[..., 0, :size, :],
        through[..., 0, :, :],
    )


def _inverse(below: Tensor) -> Tensor:
    """``(I + below)^-1`` of a strictly lower triangular matrix."""
    return _Inverse.apply(below)


class _Inverse(torch.autograd.Function):
    """Its gradient is two products, not another solution."""

    @staticmethod
    def forward(ctx, below: Tensor) -> Tensor:
        eye = torch.eye(below.shape[-1], dtype=below.dtype, device=below.device)
        found = torch.linalg.solve_triangular(
            below, eye.expand_as(below), upper=False, unitriangular=True
        )
        ctx.save_for_backward(found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        (found,) = ctx.saved_tensors
        with torch.autocast(found.device.type, enabled=False):
            return -(found.mT @ gradient @ found.mT)


def _states(state: Tensor, added: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """The states before all chunks, and the last."""
    before = []
    for new, kept in zip(added.unbind(3), _by_chunk(carry, added), strict=True):
        before.append(state)
        state = new + (state if kept is None else kept * state)
    return torch.stack(before, 3), state


def _delta_states(state, u, w, writing, carry) -> tuple[Tensor, Tensor, Tensor]:
    """The states before all chunks, what their tokens write instead of ``v``, and the last state."""
    before, values = [], []
    chunks = zip(u.unbind(3), w.unbind(3), writing.mT.unbind(3), _by_chunk(carry, u), strict=True)
    for u_n, w_n, write, kept in chunks:
        before.append(state)
        values.append(u_n - w_n @ state)
        state = write @ values[-1] + (state if kept is None else kept * state)
    return torch.stack(before, 3), torch.stack(values, 3), state


def _by_chunk(carry: Tensor | None, like: Tensor) -> list[Tensor | None]:
    """Of each chunk, where all may share one."""
    chunks = like.shape[3]
    return (
        [None] * chunks
        if carry is None
        else list(carry.expand(-1, -1, -1, chunks, -1, -1).unbind(3))
    )
