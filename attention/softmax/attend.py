"""Softmax attention under a pattern: over documents, and in pieces of a sequence."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..arguments import accumulation_dtype, check_backend, check_dims
from ..documents import check_documents, document_spans
from ..patterns.block_lists import BlockLists, chosen_lists
from ..patterns.patterns import Pattern
from ..patterns.rules import Blocks
from ..patterns.selection import Selector
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
    documents = check_documents(documents, q.shape[:2])
    logits = check_logits(q, scale, sinks, softcap, sigmoid_bias, return_lse)
    if isinstance(pattern, Selector):
        pattern = _select(pattern, q, k, documents)
    whole = [(slice(None), slice(0, q.shape[1]))]
    each = (
        whole
        if documents is None
        else [(slice(row, row + 1), slice(*at)) for row, *at in document_spans(documents)]
    )
    check_pattern(pattern, k.shape[2], q.shape[0], max(at.stop - at.start for _, at in each))
    work = _AttentionCall(pattern, each, logits, choose_backend(backend, q, k, v, pattern, logits))
    out, lse = _Attend.apply(q, k, v, sinks, work)
    return (out, lse) if return_lse else out


@torch.no_grad()
def _select(selector: Selector, q: Tensor, k: Tensor, documents: Tensor | None) -> Pattern:
    queries, keys = selector.summaries(q, k)
    return chosen_lists(
        selector, queries, keys, torch.arange(keys.shape[1], device=q.device), documents
    )


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | Selector, backend: str
) -> None:
    """Refuse arguments that do not fit one another."""
    check_backend(backend, BACKENDS)
    if not isinstance(pattern, Pattern | Selector):
        raise ValueError(f"pattern must be a Pattern, as S2(64, 16, 16), got {pattern!r}")
    check_dims(q=q, k=k, v=v)
    for name, tensor in {"k": k, "v": v}.items():
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but q is {q.dtype} on {q.device}"
            )
    if k.shape[:2] != q.shape[:2] or v.shape[:3] != k.shape[:3] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k has {k.shape[2]} heads, which do not divide the {q.shape[2]} heads of q"
        )


def check_logits(
    q: Tensor,
    scale: float | None,
    sinks: Tensor | None,
    softcap: float | None,
    sigmoid_bias: float | None,
    return_lse: bool,
) -> Logits:
    """How weights come from products, or a refusal of arguments that do not fit."""
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, got {softcap}; None for none")
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise ValueError(
            f"sinks must be one number for each head of q, shape ({q.shape[2]},), got {tuple(sinks.shape)}"
        )
    if sinks is not None and sinks.device != q.device:
        raise ValueError(f"sinks is on {sinks.device}, but q is on {q.device}")
    for name, given in {"sinks": sinks is not None, "return_lse": return_lse}.items():
        if given and sigmoid_bias is not None:
            raise ValueError(
                f"{name} belongs to softmax, but sigmoid_bias is given: its rows have no sum to share"
            )
    return Logits(q.shape[-1] ** -0.5 if scale is None else scale, softcap, sigmoid_bias)


def check_pattern(pattern: Pattern, kv_heads: int, batch: int, longest: int) -> None:
    """Refuse a pattern that says nothing of so many heads, or of documents so long."""
    pattern.check(kv_heads, longest)
    if isinstance(pattern, BlockLists):
        pattern.check_batch(batch)


def choose_backend(
    backend: str, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, logits: Logits
) -> str:
    """The one to use, or a refusal of what it cannot do."""
    if backend != "auto":
        if unsupported_reason := load(backend).unsupported_reason(q, k, v, pattern, logits):
            raise ValueError(f"backend {backend} {unsupported_reason}")
        return backend
    unsupported_reason = (
        load("triton").unsupported_reason(q, k, v, pattern, logits) if q.is_cuda else "needs CUDA"
    )
    if unsupported_reason and q.is_cuda:
        warnings.warn(
            f"backend auto takes torch, which is slower here: triton {unsupported_reason}",
            stacklevel=3,
        )
    return "torch" if unsupported_reason else "triton"


@dataclass(frozen=True)
class _AttentionCall:
    """What to compute of an attention: each document by itself."""

    pattern: Pattern
    documents: list[tuple[slice, slice]]
    """Rows of the batch and tokens of each; a single one where every row is a document."""
    logits: Logits
    backend: str

    def tile(self, rows: slice, at: slice) -> Tile:
        """Where the tokens of a document stand in it."""
        pattern, length = self.pattern, at.stop - at.start
        if isinstance(pattern, BlockLists):
            pattern = pattern.in_document(rows, at.start, at.stop)
        return Tile(pattern, (Blocks(0, 1, length),), (Blocks(0, 1, length),), self.logits)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The output and log-sum-exp of ``q``."""
        if len(self.documents) == 1:
            return tile_forward(q, k, v, self.tile(*self.documents[0]), self.backend)
        out, lse = (
            q.new_empty(*q.shape[:3], v.shape[3]),
            q.new_empty(q.shape[:3], dtype=accumulation_dtype(q)),
        )
        for at in self.documents:
            out[at], lse[at] = tile_forward(q[at], k[at], v[at], self.tile(*at), self.backend)
        return out, lse

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, *saved: Tensor
    ) -> tuple[Tensor, ...]:
        """Gradients of ``q``, ``k`` and ``v`` in fp32 (fp64 for fp64); ``saved`` are those, ``out`` and ``lse``."""
        if len(self.documents) == 1:
            return tile_backward(
                grad_out, *saved, self.tile(*self.documents[0]), self.backend, grad_lse
            )
        dtype = accumulation_dtype(saved[0])
        found = tuple(torch.empty(x.shape, dtype=dtype, device=x.device) for x in saved[:3])
        for at in self.documents:
            own_grad_lse = None if grad_lse is None else grad_lse[at]
            gradients = tile_backward(
                grad_out[at], *(x[at] for x in saved), self.tile(*at), self.backend, own_grad_lse
            )
            for whole, gradient in zip(found, gradients, strict=True):
                whole[at] = gradient
        return found


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The output and log-sum-exp with one more key in each row, whose value is 0: the other weights shrink."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype))
    return out * (lse - total).nan_to_num(0.0).exp()[..., None].to(out.dtype), total


def sinks_gradient(
    sinks: Tensor, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> Tensor:
    """Gradient of the sinks' logits ``[heads]``, from the final output and log-sum-exp."""
    weight = (
        (sinks.to(lse.dtype) - lse).exp().nan_to_num(0.0)
    )  # a sink of minus infinity beside a row that sees nothing
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return (weight * ((0.0 if grad_lse is None else grad_lse) - delta)).sum((0, 1)).to(sinks.dtype)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, work: _AttentionCall):
        out, lse = work.forward(q, k, v)
        if sinks is not None:
            out, lse = with_sinks(out, lse, sinks)
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
