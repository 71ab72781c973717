"""Softmax attention under a pattern: over documents, and in pieces of a sequence."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import accumulation_dtype, check_backend, check_dims
from .blocklists import BlockLists, chosen_lists
from .documents import check_documents, document_spans
from .patterns import Pattern
from .rules import Blocks
from .selection import Selector
from .tiles import BACKENDS, Logits, Tile, load, tile_backward, tile_forward


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Selector,
    *,
    documents: Tensor | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    sigmoid_bias: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of ``q`` over the keys that ``pattern`` shows it, within each document.

    Args:
        q: ``[batch, time, heads, head_dim]``.
        k: ``[batch, time, kv_heads, head_dim]``; ``kv_heads`` divides ``heads``, query head ``h`` reads KV head
            ``h // (heads // kv_heads)``.
        v: ``[batch, time, kv_heads, value_dim]``.
        pattern: what each KV head sees, or a :class:`~longspan.attention.Selector`, which chooses it from the content.
        documents: int ``[batch, time]``, non-decreasing along time; attention never crosses from one id to another, and
            the pattern's positions count from a document's first token.
        scale: of the logits; ``head_dim ** -0.5`` by default.
        sinks: ``[heads]``, for each head the logit of one more key, whose value is 0 (gpt-oss).
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
        sigmoid_bias: weights are ``sigmoid(logits + sigmoid_bias)`` of each key instead of the softmax over all
            (arXiv 2409.04431, which takes ``-log(time)``).
        return_lse: also return the log-sum-exp of each row's logits, with the sink's; minus infinity where a row sees nothing.
        backend: ``torch`` (torch's kernels on the keys that the pattern needs), ``triton`` (our kernels, CUDA), ``flash``
            (flash-attn, CUDA, causal and windows), ``reference`` (dense mask in fp64), or ``auto``: ``triton`` on CUDA where
            it can, else ``torch``.

    Returns:
        ``[batch, time, heads, value_dim]`` in the dtype of ``q``, and the log-sum-exp ``[batch, time, heads]`` in fp32 (fp64
        for fp64) where asked for. Differentiable in ``q``, ``k``, ``v`` and ``sinks``, through both. A row that sees nothing
        gives 0.

    Raises:
        ValueError: naming the argument that does not fit, and what would.
    """
    check_attention(q, k, v, pattern, backend)
    check_documents(documents, q.shape[:2])
    logits = check_logits(q, scale, sinks, softcap, sigmoid_bias, return_lse)
    if isinstance(pattern, Selector):
        pattern = _select(pattern, q, k, documents)
    work = Work.of(pattern, documents, [(0, q.shape[1])], q, k, v, logits, backend)
    out, lse = _Attend.apply(q, k, v, sinks, work)
    return (out, lse) if return_lse else out


@torch.no_grad()
def _select(selector: Selector, q: Tensor, k: Tensor, documents: Tensor | None) -> Pattern:
    queries, keys = selector.summaries(q, k)
    return chosen_lists(selector, queries, keys, torch.arange(keys.shape[1], device=q.device), documents)


def check_attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | Selector, backend: str) -> None:
    """Refuse arguments that do not fit one another."""
    check_backend(backend, BACKENDS)
    if not isinstance(pattern, Pattern | Selector):
        raise ValueError(f"pattern must be a Pattern, as S2(64, 16, 16), got {pattern!r}")
    check_dims(q=q, k=k, v=v)
    for name, tensor in {"k": k, "v": v}.items():
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, but q is {q.dtype} on {q.device}")
    if k.shape[:2] != q.shape[:2] or v.shape[:3] != k.shape[:3] or k.shape[3] != q.shape[3]:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads, which do not divide the {q.shape[2]} heads of q")


def check_logits(
    q: Tensor, scale: float | None, sinks: Tensor | None, softcap: float | None, sigmoid_bias: float | None, return_lse: bool
) -> Logits:
    """How weights come from products, or a refusal of arguments that do not fit."""
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, got {softcap}; None for none")
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise ValueError(f"sinks must be one number for each head of q, shape ({q.shape[2]},), got {tuple(sinks.shape)}")
    if sinks is not None and sinks.device != q.device:
        raise ValueError(f"sinks is on {sinks.device}, but q is on {q.device}")
    for name, given in {"sinks": sinks is not None, "return_lse": return_lse}.items():
        if given and sigmoid_bias is not None:
            raise ValueError(f"{name} belongs to softmax, but sigmoid_bias is given: its rows have no sum to share")
    return Logits(q.shape[-1] ** -0.5 if scale is None else scale, softcap, sigmoid_bias)


@dataclass(frozen=True)
class Work:
    """What to compute of an attention: stretches of queries, each with the keys of its document up to them."""

    pattern: Pattern
    stretches: list["Stretch"]
    logits: Logits
    backend: str

    @classmethod
    def of(
        cls,
        pattern: Pattern,
        documents: Tensor | None,
        segments: Iterable[tuple[int, int]],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        logits: Logits,
        backend: str,
    ) -> "Work":
        """For queries that are the tokens of ``segments`` of a sequence, with ``documents`` ``[batch, time]`` of the whole."""
        stretches = list(_stretches([] if documents is None else document_spans(documents), q.shape[0], segments))
        pattern.check(k.shape[2], max((stretch.keys.stop - stretch.keys.start for stretch in stretches), default=0))
        if isinstance(pattern, BlockLists):
            pattern.check_batch(q.shape[0])
        if backend == "auto":
            refusal = load("triton").refusal(q, k, v, pattern, logits) if q.is_cuda else "needs CUDA"
            backend = "torch" if refusal else "triton"
            if refusal and q.is_cuda:
                warnings.warn(f"backend auto takes torch, which is slower here: triton {refusal}", stacklevel=3)
        elif refusal := load(backend).refusal(q, k, v, pattern, logits):
            raise ValueError(f"backend {backend} {refusal}")
        return cls(pattern, stretches, logits, backend)

    def tile(self, stretch: "Stretch") -> Tile:
        """Where the rows of a stretch stand in their document."""
        pattern = self.pattern
        keys = stretch.keys.stop - stretch.keys.start
        queries = stretch.queries.stop - stretch.queries.start
        if isinstance(pattern, BlockLists):
            pattern = pattern.in_document(stretch.rows, stretch.keys.start, stretch.keys.stop)
        return Tile(pattern, (Blocks(keys - queries, 1, queries),), (Blocks(0, 1, keys),), self.logits)

    def _is_one_tile(self, q: Tensor, k: Tensor) -> bool:
        """Whether nothing needs to be cut out of the tensors, nor put together."""
        return self.stretches == [Stretch(slice(None), slice(0, q.shape[1]), slice(0, k.shape[1]))]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """``q`` holds the segments' tokens, ``k`` and ``v`` the whole sequence; gives the output and log-sum-exp of ``q``."""
        if self._is_one_tile(q, k):
            (stretch,) = self.stretches
            out, lse = tile_forward(q, k, v, self.tile(stretch), self.backend)
        else:
            out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q))
            for stretch in self.stretches:
                rows, queries, keys = stretch
                parts = (q[rows, queries], k[rows, keys], v[rows, keys])
                out[rows, queries], lse[rows, queries] = tile_forward(*parts, self.tile(stretch), self.backend)
        if sinks is not None:
            # One more key with value 0: the other weights shrink.
            total = torch.logaddexp(lse, sinks.to(lse.dtype))
            out, lse = out * (lse - total).nan_to_num(0.0).exp()[..., None].to(out.dtype), total
        return out, lse

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> list[Tensor]:
        """Gradients of ``q``, and of the whole ``k`` and ``v`` as these queries see them, in fp32 (fp64 for fp64)."""
        if self._is_one_tile(q, k):
            (stretch,) = self.stretches
            return list(tile_backward(grad_out, q, k, v, out, lse, self.tile(stretch), self.backend, grad_lse))
        dq, dk, dv = (torch.zeros(x.shape, dtype=accumulation_dtype(q), device=q.device) for x in (q, k, v))
        for stretch in self.stretches:
            rows, queries, keys = stretch
            parts = (grad_out[rows, queries], q[rows, queries], k[rows, keys], v[rows, keys], out[rows, queries])
            own_grad_lse = None if grad_lse is None else grad_lse[rows, queries]
            gradients = tile_backward(*parts, lse[rows, queries], self.tile(stretch), self.backend, own_grad_lse)
            for total, at, gradient in zip((dq, dk, dv), (queries, keys, keys), gradients, strict=True):
                total[rows, at] += gradient
        return [dq, dk, dv]


def sinks_gradient(sinks: Tensor, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> Tensor:
    """Gradient of the sinks' logits ``[heads]``, from the final output and log-sum-exp."""
    weight = (sinks.to(lse.dtype) - lse).exp().nan_to_num(0.0)  # a sink of minus infinity beside a row that sees nothing
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return (weight * ((0.0 if grad_lse is None else grad_lse) - delta)).sum((0, 1)).to(sinks.dtype)


class Stretch(NamedTuple):
    """A stretch of queries in one document and the document's keys up to it."""

    rows: slice
    """Of the batch."""
    queries: slice
    """Among the tokens of all segments."""
    keys: slice
    """In the whole sequence: from the document's first token to the last query."""


def _stretches(spans: list[tuple[int, int, int]], batch: int, segments: Iterable[tuple[int, int]]) -> Iterator[Stretch]:
    if len(spans) <= batch:  # a document to each row: all rows at once
        spans = [(None, 0, max((stop for _, stop in segments), default=0))]
    for row, first, last in spans:
        slot = 0
        for start, stop in segments:
            begin, end = max(first, start), min(last, stop)
            if begin < end:
                yield Stretch(
                    slice(None) if row is None else slice(row, row + 1),
                    slice(slot + begin - start, slot + end - start),
                    slice(first, end),
                )
            slot += stop - start


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, work: Work):
        out, lse = work.forward(q, k, v, sinks)
        ctx.work = work
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, sinks, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        gradients = ctx.work.backward(grad_out, grad_lse, q, k, v, out, lse)
        dsinks = None if sinks is None else sinks_gradient(sinks, grad_out, grad_lse, out, lse)
        return *(gradient.to(q.dtype) for gradient in gradients), dsinks, None
