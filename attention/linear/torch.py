"""Linear attention in plain torch, any family on any device.

Matrix products within chunks of tokens, a state between them. With ``G`` the sum of the log-decays
within a chunk of ``C`` tokens (arXiv 2312.06635 sec. 4, 2406.06484 sec. 3, 2412.06464)::

    D_ij = exp(G_i - G_j) for i >= j, else 0       scores = (Q K^T) D
    reading = Q exp(G)                             writing = K exp(G_C - G)
    O = scores V' + reading S                      S' = exp(G_C) S + writing^T V'

where ``V' = V``, and with the delta rule ``V' = T diag(beta) (V - (K exp(G)) S)`` with the inverse
``T = (I + tril(diag(beta) (K K^T) D, -1))^-1``.

Every exponent is a sum of log-decays between two tokens, so at most 0: no decay is too strong. A
document's edge is a factor of 0, never a decay of minus infinity, which would turn differences of
decays into NaN.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..arguments import accumulation_dtype
from ..operation import recomputed
from .decays import decay_to_end
from .isolation import forward_by_document

_CHUNK = 64
"""Tokens of a chunk."""
_STRONGEST = -800.0
"""A log-decay whose exp() is 0 in fp64: stronger ones change nothing."""
_SEGMENT = 512
"""Tokens whose intermediate results exist at one time.

They are computed again in backward.
"""


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None
) -> None:
    """Return None: it supports every call."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute what :class:`~longspan.attention.linear.backends.Backend` asks for."""
    arguments = (q, k, v, decay, beta, scale, state)
    if documents is None:
        return _forward(*arguments, documents)
    return forward_by_document(_forward, *arguments, documents)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the output of all tokens and the state after the last, segment by segment."""
    dtype = accumulation_dtype(q)
    length = q.shape[1]

    # Segments of whole chunks first; what is left of the length is one short chunk.
    whole_chunks = length - length % _CHUNK
    edges = sorted({*range(0, whole_chunks, _SEGMENT), whole_chunks, length})
    sizes = [stop - start for start, stop in pairwise(edges)]

    # One split each: slices would each fill a gradient of the whole length.
    decay_of_tokens = decay if decay is not None and decay.ndim > 1 else None
    parts = zip(
        *(
            [None] * len(sizes) if x is None else x.split(sizes, 1)
            for x in (q, k, v, beta, decay_of_tokens)
        ),
        strict=True,
    )

    outs = []
    # [batch, key heads, group, key_dim, value_dim]
    state = state.to(dtype).unflatten(1, (q.shape[2], -1))
    for start, (*tokens, part_decay) in zip(edges, parts, strict=False):
        segment_decay = decay if part_decay is None else part_decay
        arguments = (*tokens, segment_decay, scale, state, documents, start)
        out, state = recomputed(_segment, *arguments)
        outs.append(out)
    out = torch.cat(outs, 1) if outs else v.to(dtype)
    return out, state.flatten(1, 2)


class _SameDocument(NamedTuple):
    """Which tokens and states of a segment share a document; broadcasts over heads."""

    pairs: Tensor
    """Tokens of a chunk, ``[batch, 1, 1, chunks, tokens, tokens]``."""
    before: Tensor
    """Tokens and the state before their chunk, ``[batch, 1, 1, chunks, tokens, 1]``."""
    after: Tensor
    """Tokens and the state after their chunk, the same shape."""
    through: Tensor
    """The states before and after a chunk, ``[batch, 1, 1, chunks, 1, 1]``."""

    @classmethod
    def of_segment(cls, documents: Tensor, start: int, stop: int) -> "_SameDocument":
        """Compare the ids ``[batch, time]`` of the tokens from ``start`` to ``stop - 1``."""
        # [batch, chunks, tokens]
        chunks = documents[:, start:stop].unflatten(1, (-1, min(_CHUNK, stop - start)))
        ids_of_states = torch.cat([documents[:, max(0, start - 1), None], chunks[:, :, -1]], 1)
        before = ids_of_states[:, :-1, None]  # [batch, chunks, 1]
        after = ids_of_states[:, 1:, None]

        pairs = chunks[:, :, :, None] == chunks[:, :, None]
        return cls(
            pairs[:, None, None],
            (chunks == before)[:, None, None, ..., None],
            (chunks == after)[:, None, None, ..., None],
            (before == after)[:, None, None, ..., None],
        )


def _segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    decay: Tensor | None,
    scale: float,
    state: Tensor,
    documents: Tensor | None,
    start: int,
) -> tuple[Tensor, Tensor]:
    """Return the output of a segment's tokens and the state after them.

    Inside, tensors are ``[batch, key heads, group, chunks, tokens, dim]``; those of keys have a
    group of one.

    Args:
        q, k, v, beta, decay: of the segment's tokens, ``[batch, time, heads, ...]``.
        state: before the segment, ``[batch, key heads, group, key_dim, value_dim]``.
        documents: ids of the whole sequence.
        start: the segment's first token in it.
    """
    dtype = state.dtype
    length, key_heads = q.shape[1:3]
    chunk = min(_CHUNK, length)
    same = None
    if documents is not None:
        same = _SameDocument.of_segment(documents, start, start + length)

    def chunked(x: Tensor) -> Tensor:
        x = x.to(dtype).unflatten(2, (key_heads, -1)).unflatten(1, (-1, chunk))
        return x.permute(0, 3, 4, 1, 2, *range(5, x.ndim)).contiguous()

    q = chunked(q) * scale
    k = chunked(k)
    v = chunked(v)

    # Products of pairs of tokens. Rows read: queries read outputs and, with the delta rule, keys
    # recall values: [readers, batch, key heads, group, chunks, tokens, key_dim].
    readers = q[None] if beta is None else torch.stack([q, k])
    log_decay = _log_decay(decay, chunked, key_heads, chunk, dtype)
    carry: Tensor | None  # the factor of the state over a chunk
    if log_decay is None:
        scores = (readers @ k.mT).tril()
        decayed = readers
        writing = k
        carry = None
    elif log_decay.shape[-1] > 1:
        scores, decayed, writing, through = _pairs_by_key(readers, k, log_decay)
        carry = through.mT
    else:
        scores = (readers @ k.mT) * _pair_decays(log_decay)
        from_start = log_decay.cumsum(-2)
        decayed = readers * from_start.exp()
        writing = k * decay_to_end(log_decay, -2).exp()
        carry = from_start[..., -1:, :].exp().mT

    # Document edges.
    reading = decayed[0]
    recalling = None if beta is None else decayed[1]
    if same is not None:
        scores = scores * same.pairs
        reading = reading * same.before
        writing = writing * same.after
        carry = same.through.to(dtype) if carry is None else carry * same.through
        if recalling is not None:
            recalling = recalling * same.before

    # The states before all chunks, and the output.
    if beta is None or recalling is None:
        states, state = _states(state, writing.mT @ v, carry)
    else:
        beta = chunked(beta)[..., None]
        solved = _inverse((beta * scores[1]).tril(-1)) * beta.mT
        states, v, state = _delta_states(state, solved @ v, solved @ recalling, writing, carry)
    out = scores[0] @ v + reading @ states
    # [batch, time, heads, value_dim]
    return out.permute(0, 3, 4, 1, 2, 5).flatten(1, 2).flatten(2, 3), state


def _log_decay(
    decay: Tensor | None,
    chunked: Callable[[Tensor], Tensor],
    key_heads: int,
    chunk: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Return the log-decay as ``[batch, key heads, group, chunks, tokens, key_dim]``.

    A dim is 1 if the decay does not depend on it, except that of the tokens.
    """
    if decay is None:
        return None
    if decay.ndim == 1:
        by_head = decay.to(dtype).unflatten(0, (key_heads, -1))
        return by_head[None, :, :, None, None, None].expand(-1, -1, -1, -1, chunk, -1)
    return chunked(decay) if decay.ndim == 4 else chunked(decay)[..., None]


def _pair_decays(log_decay: Tensor) -> Tensor:
    """Return ``D`` of one decay per token: 1 on the diagonal, 0 above.

    From ``[..., tokens, 1]`` to ``[..., tokens, tokens]``.
    """
    # Differences of large sums: in fp64, and without what is beyond the range of exp() there.
    total = log_decay.double().clamp(min=_STRONGEST).cumsum(-2)
    return (total - total.mT).to(log_decay.dtype).tril(-1).exp().tril()


class _ChunkPairs(NamedTuple):
    """A chunk with a decay for each key dim ``c``."""

    scores: Tensor
    """``sum_c rows_ic k_jc exp(G_ic - G_jc)`` for ``i >= j``: ``[..., tokens, tokens]``."""
    decayed: Tensor
    """``rows exp(G)``: ``[..., tokens, key_dim]``."""
    writing: Tensor
    """``k exp(G_C - G)``: ``[..., tokens, key_dim]``."""
    through: Tensor
    """``exp(G_C)``: ``[..., 1, key_dim]``."""


def _pairs_by_key(rows: Tensor, k: Tensor, log_decay: Tensor) -> _ChunkPairs:
    """Return the products of a chunk's tokens, for a decay of each key dim.

    Chunks are put together from halves. A later row and an earlier key meet at the edge between the
    half of one and that of the other: each is decayed by what lies between it and the edge, and
    their product is a matrix product. Rows are always decayed from the start of their half, keys to
    the end of theirs.
    """
    size = k.shape[-2]
    power_of_two = 1 << (size - 1).bit_length()
    padding = (0, 0, 0, power_of_two - size)
    rows, k, log_decay = (torch.nn.functional.pad(x, padding) for x in (rows, k, log_decay))

    # Blocks of one token at first: scores [..., blocks, size, size], rows and k [..., blocks, size,
    # dim], through [..., blocks, 1, dim]
    scores = (
        (rows * k).sum(-1).expand(torch.broadcast_shapes(rows.shape[:-1], log_decay.shape[:-1]))
    )
    scores = scores[..., None, None]
    through = log_decay.exp()[..., None, :]
    rows = rows[..., None, :] * through
    k = k[..., None, :].expand_as(through)

    # Then join pairs of blocks, an earlier and a later one, until there is one.
    while scores.shape[-3] > 1:
        early_scores, late_scores = _pairs_of_blocks(scores)
        early_rows, late_rows = _pairs_of_blocks(rows)
        early_k, late_k = _pairs_of_blocks(k)
        early_through, late_through = _pairs_of_blocks(through)

        upper = torch.cat([early_scores, torch.zeros_like(early_scores)], -1)
        lower = torch.cat([late_rows @ early_k.mT, late_scores], -1)
        scores = torch.cat([upper, lower], -2)
        rows = torch.cat([early_rows, late_rows * early_through], -2)
        k = torch.cat([early_k * late_through, late_k], -2)
        through = early_through * late_through
    return _ChunkPairs(
        scores[..., 0, :size, :size],
        rows[..., 0, :size, :],
        k[..., 0, :size, :],
        through[..., 0, :, :],
    )


def _pairs_of_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split ``[..., blocks, rows, columns]`` into the even and the odd blocks."""
    even, odd = x.unflatten(-3, (-1, 2)).unbind(-3)
    return even, odd


def _inverse(below: Tensor) -> Tensor:
    """Return ``(I + below)^-1`` of a strictly lower triangular matrix ``[..., tokens, tokens]``."""
    return _Inverse.apply(below)


class _Inverse(torch.autograd.Function):
    """The inverse, whose gradient is two products instead of another solution."""

    @staticmethod
    def forward(ctx: Any, below: Tensor) -> Tensor:
        eye = torch.eye(below.shape[-1], dtype=below.dtype, device=below.device)
        inverse = torch.linalg.solve_triangular(
            below, eye.expand_as(below), upper=False, unitriangular=True
        )
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ gradient @ inverse.mT)


def _states(state: Tensor, added: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the states before all chunks, and the last state.

    Args:
        state: before the first chunk.
        added: what each chunk adds, ``[batch, key heads, group, chunks, key_dim, value_dim]``.
        carry: factor of the state over each chunk, or None for 1.
    """
    before = []
    for added_by_chunk, kept in zip(added.unbind(3), _carry_of_chunks(carry, added), strict=True):
        before.append(state)
        state = added_by_chunk + (state if kept is None else kept * state)
    return torch.stack(before, 3), state


def _delta_states(
    state: Tensor, u: Tensor, w: Tensor, writing: Tensor, carry: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states before all chunks, what tokens write instead of ``v``, and the last state.

    Args:
        u: ``T diag(beta) V``.
        w: ``T diag(beta) (K exp(G))``.
    """
    before = []
    values = []
    chunks = zip(
        u.unbind(3), w.unbind(3), writing.mT.unbind(3), _carry_of_chunks(carry, u), strict=True
    )
    for chunk_u, chunk_w, chunk_writing, kept in chunks:
        before.append(state)
        value = chunk_u - chunk_w @ state
        values.append(value)
        state = chunk_writing @ value + (state if kept is None else kept * state)
    return torch.stack(before, 3), torch.stack(values, 3), state


def _carry_of_chunks(carry: Tensor | None, like: Tensor) -> list[Tensor | None]:
    """Return the factor of each of the chunks of ``like``; chunks may share one."""
    chunks = like.shape[3]
    if carry is None:
        return [None] * chunks
    return list(carry.expand(-1, -1, -1, chunks, -1, -1).unbind(3))
