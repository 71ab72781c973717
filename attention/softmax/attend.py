"""Softmax attention under a pattern, over documents: the operation ``attend``."""

import warnings
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..arguments import accumulation_dtype, check_backend, check_dims, check_number
from ..backend_choice import BackendChoice, choices
from ..documents import check_documents, document_spans, kept_for
from ..operation import operation, without_autocast
from ..patterns import Pattern, Selector
from ..patterns.token_lists import select_token_lists
from .backends import BACKENDS, TILE_BACKENDS, backward_, forward_, new_lse, place_tile
from .tile_batch import TileBatch
from .tiles import Gradients, LogitOptions, Tile


@operation
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
    """Compute the attention of ``q`` over the keys that ``pattern`` shows, within each document.

    Args:
        q: ``[batch, time, heads, head_dim]``.
        k: ``[batch, time, kv_heads, head_dim]``; ``kv_heads`` divides ``heads``, and query head
            ``h`` reads KV head ``h // (heads // kv_heads)``.
        v: ``[batch, time, kv_heads, value_dim]``.
        pattern: what each KV head sees, or a :class:`~longspan.attention.Selector`, which chooses
            it from the content.
        documents: int ``[batch, time]``, non-decreasing along time. Attention never crosses from
            one id to another, and the pattern's positions count from a document's first token.
        scale: factor of the logits; ``head_dim ** -0.5`` by default.
        sinks: ``[heads]``, for each head the logit of one more key, whose value is 0 (gpt-oss).
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
        sigmoid_bias: weights are ``sigmoid(logits + sigmoid_bias)`` of each key instead of the
            softmax over all keys (arXiv 2409.04431, which sets it to ``-log(time)``).
        return_lse: also return the log-sum-exp of each query's logits, including the sink's; minus
            infinity for a query that sees nothing.
        backend: ``torch`` (torch's kernels on the keys that the pattern needs), ``triton`` (our
            kernels, CUDA), ``flash`` (flash-attn, CUDA, causal and windows), ``reference`` (dense
            mask in fp64), or ``auto``: ``triton`` on CUDA if it supports the call, else ``torch``.

    Returns:
        ``[batch, time, heads, value_dim]`` in the dtype of ``q``; with ``return_lse`` also the
        log-sum-exp ``[batch, time, heads]`` in fp32 (fp64 for fp64). Both are differentiable in
        ``q``, ``k``, ``v`` and ``sinks``. The output of a query that sees nothing is 0.

    Raises:
        ValueError: naming the argument that does not fit, and what would.
    """
    check_attention(q, k, v, pattern, backend)
    batch, length = q.shape[:2]
    documents = check_documents(documents, (batch, length))
    logits = check_logit_options(q, scale, sinks, softcap, sigmoid_bias, return_lse)
    if isinstance(pattern, Selector):
        pattern = _select(pattern, q, k, documents)

    tiles = _tiles_of_documents(documents, batch, length)
    check_pattern(pattern, k.shape[2], batch, tiles.longest_document)

    backend = choose_backend(backend, q, k, v, pattern, logits)
    out, lse = _Attend.apply(q, k, v, sinks, _AttentionCall(pattern, logits, tiles, backend))
    return (out, lse) if return_lse else out


@torch.no_grad()
def _select(selector: Selector, q: Tensor, k: Tensor, documents: Tensor | None) -> Pattern:
    all_tokens = ((0, q.shape[1]),)
    return select_token_lists(selector, q, selector.summaries(k), all_tokens, documents)


def _tiles_of_documents(documents: Tensor | None, batch_size: int, length: int) -> TileBatch:
    if documents is None:
        return _tiles_of_rows(batch_size, length)
    return kept_for(
        documents,
        "tiles",
        lambda: TileBatch.of_documents(batch_size, length, document_spans(documents)),
    )


@lru_cache(maxsize=16)
def _tiles_of_rows(batch_size: int, length: int) -> TileBatch:
    return TileBatch.of_documents(batch_size, length, ())


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | Selector, backend: str
) -> None:
    """Raise ValueError for arguments that do not fit together."""
    check_backend(backend, BACKENDS)
    if not isinstance(pattern, Pattern | Selector):
        raise ValueError(f"pattern must be a Pattern such as S2(64, 16, 16), got {pattern!r}")
    check_dims(q=q, k=k, v=v)
    for name, tensor in {"k": k, "v": v}.items():
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but q is {q.dtype} on {q.device}"
            )
    if k.shape[:2] != q.shape[:2] or v.shape[:3] != k.shape[:3] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"shapes do not fit together: q {tuple(q.shape)}, k {tuple(k.shape)}, "
            f"v {tuple(v.shape)}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k has {k.shape[2]} heads, which do not divide the {q.shape[2]} heads of q"
        )


def check_logit_options(
    q: Tensor,
    scale: float | None,
    sinks: Tensor | None,
    softcap: float | None,
    sigmoid_bias: float | None,
    return_lse: bool,
) -> LogitOptions:
    """Return the options of the logits, or raise ValueError for those that do not fit together."""
    num_heads = q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else check_number("scale", scale)
    if softcap is not None:
        softcap = check_number("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap must be positive, or None for no softcap, got {softcap:g}")
    if sigmoid_bias is not None:
        sigmoid_bias = check_number("sigmoid_bias", sigmoid_bias)
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(
            f"sinks must be one number for each head of q, shape ({num_heads},), "
            f"got {tuple(sinks.shape)}"
        )
    if sinks is not None and sinks.device != q.device:
        raise ValueError(f"sinks is on {sinks.device}, but q is on {q.device}")
    if sigmoid_bias is not None:
        for name, is_given in {"sinks": sinks is not None, "return_lse": return_lse}.items():
            if is_given:
                raise ValueError(
                    f"{name} needs the softmax, but sigmoid_bias is given: "
                    "sigmoid weights of a query have no common sum"
                )
    return LogitOptions(scale, softcap, sigmoid_bias)


def check_pattern(pattern: Pattern, kv_heads: int, batch_size: int, longest: int) -> None:
    """Raise ValueError if the pattern does not fit the heads, the batch or the longest document."""
    pattern.check(kv_heads, longest)
    pattern.check_batch(batch_size)


def choose_backend(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    logits: LogitOptions,
    keys_side_by_side: bool = True,
) -> str:
    """Return the backend to use; raise ValueError if the given one does not support the call.

    ``auto`` prefers on CUDA our kernels, then flash-attn's, then torch; elsewhere torch.

    Args:
        keys_side_by_side: whether the keys of a tile are at consecutive positions.
    """
    if backend != "auto":
        if reason := BACKENDS[backend]().unsupported_reason(q, k, v, pattern, logits):
            raise ValueError(f"backend {backend} {reason}")
        return backend
    if not q.is_cuda:
        return "torch"
    choice = fastest_backend(q, k, v, pattern, logits, keys_side_by_side)
    choices[choice] += 1
    if choice.is_slow:
        warnings.warn(
            f"backend auto falls back to torch, which is slower here: {choice.reasons}",
            stacklevel=5,
        )
    return choice.backend


def fastest_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    logits: LogitOptions,
    keys_side_by_side: bool = True,
) -> BackendChoice:
    """Return the fastest backend on CUDA that supports the call, and what kept others from it.

    Of the tensors only shapes, dtypes and devices are read: they may be fake.
    """
    chosen = "torch"
    refusals = []
    for name in ("triton", "flash") if keys_side_by_side else ("triton",):
        reason = BACKENDS[name]().unsupported_reason(q, k, v, pattern, logits)
        if reason is None:
            chosen = name
            break
        refusals.append((name, reason))
    call = f"{type(pattern).__name__}, head dim {max(q.shape[3], v.shape[3])}, {q.dtype}"
    return BackendChoice("softmax", call, chosen, tuple(refusals))


@dataclass(frozen=True)
class _AttentionCall:
    """An attention over whole sequences, of which every document is a tile."""

    pattern: Pattern
    logits: LogitOptions
    documents: TileBatch
    backend: str

    @property
    def only_tile(self) -> Tile | None:
        """The tile of all tokens, for a backend whose results for it need not be copied."""
        if len(self.documents.places) > 1 or self.backend not in TILE_BACKENDS:
            return None
        return place_tile(self.documents.places[0], self.pattern, self.logits)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and log-sum-exp of ``q``, without sinks."""
        if tile := self.only_tile:
            return TILE_BACKENDS[self.backend]().forward(q, k, v, tile)
        out = q.new_empty(*q.shape[:3], v.shape[3])
        lse = new_lse(q, self.backend)
        forward_(q, k, v, self.pattern, self.logits, self.documents, self.backend, out, lse)
        return out, lse

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of ``q``, ``k`` and ``v`` in fp32 (fp64 for fp64)."""
        if tile := self.only_tile:
            backend = TILE_BACKENDS[self.backend]()
            return backend.backward(grad_out, q, k, v, out, lse, tile, grad_lse)

        dtype = accumulation_dtype(q)
        dq, dk, dv = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
        backward_(
            grad_out, q, k, v, out, lse, grad_lse, self.pattern, self.logits, self.documents,
            self.backend, Gradients(dq, dk, dv, accumulate=False),
        )  # fmt: skip
        return dq, dk, dv


def add_sink_logits(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp with one more key per head, whose logit is ``sinks``.

    Its value is 0, so the output only shrinks by the weight that the other keys lose.
    """
    total = torch.logaddexp(lse, sinks.to(lse.dtype))
    kept_weight = (lse - total).nan_to_num(0.0).exp()  # inf - inf: no key, and a sink of -inf
    return out * kept_weight[..., None].to(out.dtype), total


def sink_logits_gradient(
    sinks: Tensor, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> Tensor:
    """Return the gradient of the sinks' logits ``[heads]``, from the final ``out`` and ``lse``."""
    weight = (sinks.to(lse.dtype) - lse).exp()  # [batch, time, heads]
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    grad_logits = weight * ((0.0 if grad_lse is None else grad_lse) - delta)
    # A sink of minus infinity for a query that sees nothing: inf - inf, and upstream maybe NaN.
    return grad_logits.masked_fill(lse == -torch.inf, 0.0).sum((0, 1)).to(sinks.dtype)


def queries_without_keys(lse: Tensor, pattern: Pattern, kv_heads: int) -> Tensor | None:
    """Return which queries see no key, from their log-sum-exp without sinks.

    bool ``[batch, time, heads]``; None if the pattern leaves none without keys.
    """
    return None if pattern.every_query_sees_keys(kv_heads) else lse == -torch.inf


def drop_gradients(
    without_keys: Tensor | None, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the upstream gradients with zeros for queries without keys, which pass nothing on.

    There they may well be NaN: that of ``logaddexp`` of two log-sum-exps of minus infinity is. A
    product with weights of 0 would keep the NaN.

    Args:
        without_keys: bool ``[batch, time, heads]``; None if there are none.
    """
    if without_keys is None:
        return grad_out, grad_lse
    grad_out = grad_out.masked_fill(without_keys[..., None], 0.0)
    if grad_lse is not None:
        grad_lse = grad_lse.masked_fill(without_keys, 0.0)
    return grad_out, grad_lse


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, call: _AttentionCall):
        out, lse = call.forward(q, k, v)
        without_keys = queries_without_keys(lse, call.pattern, k.shape[2])
        if sinks is not None:
            out, lse = add_sink_logits(out, lse, sinks)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, sinks, out, lse, without_keys)
        return out, lse

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad_out, grad_lse):
        q, k, v, sinks, out, lse, without_keys = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grad_out, grad_key_lse = drop_gradients(without_keys, grad_out, grad_lse)
        dq, dk, dv = ctx.call.backward(grad_out, grad_key_lse, q, k, v, out, lse)
        dsinks = None
        if sinks is not None:
            dsinks = sink_logits_gradient(sinks, grad_out, grad_lse, out, lse)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dsinks, None
