"""Softmax attention under a pattern: over documents, and in pieces of a sequence."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import accumulation_dtype, check_backend, check_dims
from .documents import check_documents, one_document
from .patterns import Pattern
from .tiles import BACKENDS, tile_backward, tile_forward


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
        backend: ``torch`` (the keys that a pattern needs, through torch's kernels), ``reference`` (dense mask in fp64) or
            ``auto``.

    Returns:
        ``[batch, time, heads, value_dim]`` in the dtype of ``q``, differentiable in ``q``, ``k`` and ``v``.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    check_attention(q, k, v, backend)
    check_documents(documents, q.shape[:2])
    return _Attend.apply(q, k, v, Work.of(pattern, documents, [(0, q.shape[1])], q, scale, backend))


def check_attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> None:
    """Refuse arguments that do not fit one another."""
    check_backend(backend, BACKENDS)
    check_dims(q=q, k=k, v=v)
    for name, tensor in {"k": k, "v": v}.items():
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, but q is {q.dtype} on {q.device}")
    if k.shape[:2] != q.shape[:2] or v.shape[:3] != k.shape[:3] or k.shape[3] != q.shape[3]:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads, which do not divide the {q.shape[2]} heads of q")


class Work(NamedTuple):
    """What to compute of an attention, as tiles."""

    pattern: Pattern
    tiles: list["Tile"]
    scale: float
    backend: str

    @classmethod
    def of(
        cls,
        pattern: Pattern,
        documents: Tensor | None,
        segments: Iterable[tuple[int, int]],
        q: Tensor,
        scale: float | None,
        backend: str,
    ) -> "Work":
        """For queries that are the tokens of ``segments`` of a sequence, with ``documents`` ``[batch, time]`` of the whole."""
        tiles = list(_tiles(None if one_document(documents) else documents, segments))
        return cls(pattern, tiles, q.shape[-1] ** -0.5 if scale is None else scale, "torch" if backend == "auto" else backend)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``q`` holds the segments' tokens, ``k`` and ``v`` the whole sequence; gives the output and log-sum-exp of ``q``."""
        out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q))
        for tile in self.tiles:
            rows, queries, keys = tile
            parts = (q[rows, queries], k[rows, keys], v[rows, keys])
            out[rows, queries], lse[rows, queries] = tile_forward(*parts, self.pattern, tile.q_at, self.scale, self.backend)
        return out, lse

    def backward(self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
        """Gradients of ``q``, and of the whole ``k`` and ``v`` as these queries see them, in fp32 (fp64 for fp64)."""
        dq, dk, dv = (torch.zeros(x.shape, dtype=accumulation_dtype(q), device=q.device) for x in (q, k, v))
        for tile in self.tiles:
            rows, queries, keys = tile
            parts = (grad_out[rows, queries], q[rows, queries], k[rows, keys], v[rows, keys], out[rows, queries])
            gradients = tile_backward(*parts, lse[rows, queries], self.pattern, tile.q_at, self.scale, self.backend)
            for total, at, gradient in zip((dq, dk, dv), (queries, keys, keys), gradients, strict=True):
                total[rows, at] += gradient
        return [dq, dk, dv]


class Tile(NamedTuple):
    """A stretch of queries in one document and the document's keys up to it."""

    rows: slice
    """Of the batch."""
    queries: slice
    """Among the tokens of all segments."""
    keys: slice
    """In the whole sequence: from the document's first token to the last query."""

    @property
    def q_at(self) -> int:
        """Where the first query stands in its document."""
        return (self.keys.stop - self.keys.start) - (self.queries.stop - self.queries.start)


def _tiles(documents: Tensor | None, segments: Iterable[tuple[int, int]]) -> Iterator[Tile]:
    everything = [(slice(None), 0, max((stop for _, stop in segments), default=0))]
    for rows, first, last in everything if documents is None else _documents(documents):
        slot = 0
        for start, stop in segments:
            begin, end = max(first, start), min(last, stop)
            if begin < end:
                yield Tile(rows, slice(slot + begin - start, slot + end - start), slice(first, end))
            slot += stop - start


def _documents(documents: Tensor) -> Iterator[tuple[slice, int, int]]:
    """(batch row, start, stop) of each document, in order."""
    for row, ids in enumerate(documents):
        start = 0
        for count in ids.unique_consecutive(return_counts=True)[1].tolist():
            yield slice(row, row + 1), start, start + count
            start += count


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, work: Work):
        out, lse = work.forward(q, k, v)
        ctx.work = work
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        gradients = ctx.work.backward(grad_out, *ctx.saved_tensors)
        return *(gradient.to(grad_out.dtype) for gradient in gradients), None
