"""Linear attention with a scalar decay per head: lightning attention, RetNet's retention, plain linear attention."""

from itertools import pairwise

import torch
from torch import Tensor

from .arguments import accumulation_dtype, check_backend, check_dims
from .documents import check_documents, one_document


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    scale: float = 1.0,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``S_t = exp(decay) S_{t-1} + k_t v_t^T``, ``o_t = scale * q_t S_t``, with ``S = 0`` before each document.

    The convention of the papers: the state is the one after its last token (arXiv 2405.17381 eq. 9; OpenNLPLab's code
    keeps it multiplied by one more decay).

    Args:
        q, k: ``[batch, time, heads, key_dim]``.
        v: ``[batch, time, heads, value_dim]``.
        decay: natural log of each head's decay, fp32 ``[heads]``, at most 0; None is no decay.
        state: ``[batch, heads, key_dim, value_dim]``, the state before the first token, of the first token's document.
        documents: int ``[batch, time]``, non-decreasing: the state starts again at each new id.
        return_state: also return the state after the last token, fp32 (fp64 for fp64).
        backend: ``torch`` (chunks of 64 tokens), ``reference`` (the recurrence, token by token) or ``auto``.

    Returns:
        ``[batch, time, heads, value_dim]`` in the dtype of ``v``, and the last state where asked for. Differentiable in
        ``q``, ``k``, ``v`` and ``state``. Accumulates in fp32, fp64 for fp64 inputs.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    check_linear(q, k, v, decay, state, backend)
    check_documents(documents, q.shape[:2])
    dtype = accumulation_dtype(q)
    batch, _, heads, key_dim = q.shape
    decay = q.new_zeros(heads, dtype=dtype) if decay is None else decay.to(dtype)
    if state is None:
        state = q.new_zeros(batch, heads, key_dim, v.shape[-1], dtype=dtype)
    documents = None if one_document(documents) else documents
    run = _BACKENDS["torch" if backend == "auto" else backend]
    out, state = run(q.to(dtype) * scale, k.to(dtype), v.to(dtype), decay, state.to(dtype), documents)
    out = out.to(v.dtype)
    return (out, state) if return_state else out


def added_state(k: Tensor, v: Tensor, *, decay: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
    """The state after the last token where nothing came before the first: ``[batch, heads, key_dim, value_dim]``.

    In fp32 (fp64 for fp64) and differentiable; arguments as of :func:`linear_attention`, of which it is the last state.
    """
    dtype = accumulation_dtype(k)
    k, v = k.to(dtype), v.to(dtype)
    if decay is not None:
        steps = torch.arange(k.shape[1] - 1, -1, -1, device=k.device, dtype=dtype)
        k = k * (steps[:, None] * decay.to(dtype)).exp()[..., None]
    if documents is not None:
        k = k * (documents == documents[:, -1:])[..., None, None]
    return torch.einsum("bthk,bthv->bhkv", k, v)


def check_linear(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, backend: str) -> None:
    """Refuse arguments that do not fit one another."""
    check_backend(backend, _BACKENDS)
    check_dims(q=q, k=k, v=v)
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if decay is not None and decay.shape != (q.shape[2],):
        raise ValueError(f"decay must be one number per head, shape ({q.shape[2]},), got {tuple(decay.shape)}")
    if decay is not None and decay.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"decay must be float32 or float64, got {decay.dtype}: bf16 would change the model's memory")
    expected = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    if state is not None and state.shape != expected:
        raise ValueError(f"state must be {expected}, got {tuple(state.shape)}")


def _reference(q, k, v, decay, state, documents):
    outs = []
    for t in range(q.shape[1]):
        if t and documents is not None:
            same = (documents[:, t] == documents[:, t - 1])[:, None, None, None]
            state = torch.where(same, state, torch.zeros_like(state))
        state = decay.exp()[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outs, 1), state


def _torch(q, k, v, decay, state, documents):
    """Segments one after another: each of whole chunks, the last of what is left of the length as one short chunk."""
    length, outs = q.shape[1], []
    whole = length - length % _CHUNK
    starts = [*range(0, whole, _SEGMENT), whole]
    for start, stop in pairwise([*starts, length]):
        if stop > start:
            size = _CHUNK if stop <= whole else stop - start
            same = None if documents is None else _SameDocument(documents, start, stop, size)
            chunks = (x[:, start:stop].unflatten(1, (-1, size)) for x in (q, k, v))
            out, state = _segment(*chunks, decay, state, same)
            outs.append(out)
    return torch.cat(outs, 1), state


class _SameDocument:
    """Which tokens and states of a segment share a document: factors of 1 or 0.

    A document's edge is a factor, never a decay of minus infinity, which would turn differences of decays into NaN.
    """

    def __init__(self, documents: Tensor, start: int, stop: int, size: int):
        chunks = documents[:, start:stop].unflatten(1, (-1, size))
        # The document of the state before each chunk and after the last.
        ends = torch.cat([documents[:, max(0, start - 1), None], chunks[:, :, -1]], 1)
        self.states = (ends[:, :, None] == ends[:, None, :])[:, None]  # [batch, 1, chunks + 1, chunks + 1]
        self.pairs = (chunks[:, :, :, None] == chunks[:, :, None, :])[:, :, None]  # [batch, chunks, 1, size, size]
        self.before = (chunks == ends[:, :-1, None])[..., None, None]  # [batch, chunks, size, 1, 1]
        self.after = (chunks == ends[:, 1:, None])[..., None, None]


def _segment(q, k, v, decay, state, same):
    """``q``, ``k``, ``v`` are [batch, chunks, size, heads, dim]; the output is [batch, time, heads, dim].

    All decays come from differences of positions, never from a ratio of exponentials, which overflows.
    """
    chunks, size = q.shape[1:3]
    steps = torch.arange(1, size + 1, device=q.device, dtype=decay.dtype)
    scores = torch.einsum("bnihk,bnjhk->bnhij", q, k) * _decays(decay, size)
    reading = q * (steps[:, None] * decay).exp()[:, :, None]
    writing = k * ((size - steps)[:, None] * decay).exp()[:, :, None]
    carry = _decays(decay * size, chunks + 1)
    if same is not None:
        scores, reading, writing, carry = (
            scores * same.pairs,
            reading * same.before,
            writing * same.after,
            carry * same.states,
        )
    added = torch.einsum("bnjhk,bnjhv->bnhkv", writing, v)
    # State i is the sum of what came in and what each chunk before it added, decayed once per chunk in between.
    states = torch.einsum("bhij,bjhkv->bihkv", carry.expand(q.shape[0], -1, -1, -1), torch.cat([state[:, None], added], 1))
    within = torch.einsum("bnhij,bnjhv->bnihv", scores, v)
    return (within + torch.einsum("bnihk,bnhkv->bnihv", reading, states[:, :-1])).flatten(1, 2), states[:, -1]


def _decays(decay: Tensor, size: int) -> Tensor:
    """``exp(decay * (i - j))`` where ``i >= j``, else 0: ``[heads, size, size]``."""
    steps = torch.arange(size, device=decay.device, dtype=decay.dtype)
    lag = steps[:, None] - steps
    return torch.where(lag >= 0, (decay[:, None, None] * lag.clamp(min=0)).exp(), 0.0)


_CHUNK = 64
_SEGMENT = 2048  # longer ones would spend more on carrying states from chunk to chunk than on anything else
_BACKENDS = {"torch": _torch, "reference": _reference}
