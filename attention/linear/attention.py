"""Linear attention: one operation for the scalar, the vector and the delta family.

==========  ======================  ======  ==================================================================
family      decay                   beta    instances
==========  ======================  ======  ==================================================================
scalar      None, [H] or [B, T, H]  None    linear attention, lightning, RetNet, Mamba-2 and simple GLA
vector      [B, T, H, K]            None    GLA
delta       any of these            yes     DeltaNet (no decay), Gated DeltaNet (scalar), Kimi Delta Attention (vector)
==========  ======================  ======  ==================================================================
"""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from ..arguments import accumulation_dtype, check_backend, check_dims
from ..documents import check_documents
from .decays import after

BACKENDS = {
    "torch": ".torch",
    "triton": ".triton",
    "fla": ".fla",
    "reference": ".reference",
}
"""Module of each backend: ``unsupported_reason(q, k, v, decay, beta)`` says what it cannot do, ``run(q, k, v, decay, beta, scale, state,
documents)`` gives the output and the last state."""


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float = 1.0,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``o_t = scale * q_t S_t``, where ``S = 0`` before each document and a token changes the state by::

        S_t = a_t S_{t-1} + k_t v_t^T                                      a_t = exp(decay_t)
        S_t = a_t S_{t-1} + beta_t k_t (v_t - k_t^T (a_t S_{t-1}))^T       with beta: the delta rule

    The state is the one after its last token, as in the papers (arXiv 2405.17381 eq. 9, 2312.06635 eq. 4, 2412.06464 eq. 10);
    OpenNLPLab's code for lightning attention keeps it multiplied by one more decay. ``K^-0.5`` is not implied: see ``scale``.

    Args:
        q, k: ``[batch, time, key heads, key_dim]``.
        v: ``[batch, time, heads, value_dim]``; several value heads in a row may share one key head.
        decay: natural log, at most 0, fp32 or fp64: ``[heads]`` for the same at every token, ``[batch, time, heads]``, or
            ``[batch, time, heads, key_dim]``. None is no decay.
        beta: ``[batch, time, heads]``, how much of what a key recalls is replaced. None to add without recalling.
        state: ``[batch, heads, key_dim, value_dim]``, the state before the first token, of the first token's document.
        documents: int ``[batch, time]``, non-decreasing: the state starts again at each new id.
        return_state: also return the state after the last token, fp32 (fp64 for fp64). A token that is fed with it goes on
            where the sequence ended: a single one is a step of the recurrence.
        backend: ``torch`` (chunks; any device), ``triton`` (our kernels: the scalar family on CUDA), ``fla``
            (flash-linear-attention's kernels, CUDA), ``reference`` (token by token) or ``auto``.

    Returns:
        ``[batch, time, heads, value_dim]`` in the dtype of ``v``, and the last state where asked for. Differentiable in all
        tensors. Accumulates in fp32, fp64 for fp64 inputs.

    Raises:
        ValueError: naming the argument that does not fit, or what a backend cannot do and which one can.
    """
    check_linear(q, k, v, decay, beta, state, backend)
    documents = check_documents(documents, q.shape[:2])
    if state is None:
        state = v.new_zeros(
            v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=accumulation_dtype(q)
        )
    with torch.autocast(q.device.type, enabled=False):  # a state in bf16 forgets
        out, last = _choose(backend, q, k, v, decay, beta).run(
            q, k, v, decay, beta, scale, state, documents
        )
    return (out.to(v.dtype), last) if return_state else out.to(v.dtype)


def normalized(out: Tensor, eps: float = 1e-6) -> Tensor:
    """Linear attention's weights made to sum to one (arXiv 2006.16236 eq. 9): where ``v`` ended with a column of ones, so does
    ``out`` ``[batch, time, heads, value_dim + 1]`` with the sum of the weights, by which the others are divided.
    """
    return out[..., :-1] / (out[..., -1:] + eps)


def state_map(
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    documents: Tensor | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``(A, B)`` such that these tokens take the state before them from ``S`` to ``A S + B``, in fp32 (fp64 for fp64).

    Returns:
        ``A``: ``[batch, heads, key_dim, 1]``, a factor of each row, or with ``beta`` ``[batch, heads, key_dim, key_dim]``.
        ``B``: ``[batch, heads, key_dim, value_dim]``. Both differentiable in all tensors.
    """
    batch, length, heads, width = v.shape
    dtype, key_dim = accumulation_dtype(k), k.shape[3]
    through = k.new_ones(batch, dtype=dtype)
    if length and documents is not None:
        through = (documents[:, 0] == documents[:, -1]).to(dtype)
    if beta is not None:
        # The state is linear in what it was: columns that start as the identity, with nothing written to them, end as A.
        wide = torch.cat([v, v.new_zeros(*v.shape[:3], key_dim)], -1)
        eye = torch.eye(key_dim, dtype=dtype, device=k.device).expand(batch, heads, -1, -1)
        state = torch.cat([eye.new_zeros(batch, heads, key_dim, width), eye], -1)
        options = {"decay": decay, "beta": beta, "documents": documents, "backend": backend}
        last = (
            linear_attention(k, k, wide, state=state, return_state=True, **options)[1]
            if length
            else state
        )
        return last[..., width:], last[..., :width]
    k, v = k.to(dtype).repeat_interleave(heads // k.shape[2], 2), v.to(dtype)
    kept = k.new_ones(batch, heads, key_dim, 1)
    if decay is not None:
        per_token = (
            decay[:, None] if decay.ndim == 1 else decay if decay.ndim == 4 else decay[..., None]
        ).to(dtype)
        per_token = per_token.expand(batch, length, heads, -1)
        k = k * after(per_token, 1).exp()
        kept = kept * per_token.sum(1)[..., None].exp()
    if length and documents is not None:
        k = k * (documents == documents[:, -1:])[..., None, None]
    return kept * through[:, None, None, None], torch.einsum("bthk,bthv->bhkv", k, v)


def check_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    backend: str,
) -> None:
    """Refuse arguments that do not fit one another."""
    check_backend(backend, BACKENDS)
    check_dims(q=q, k=k, v=v)
    if k.shape != q.shape or v.shape[:2] != q.shape[:2]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(
            f"shapes do not fit: k must have that of q, and v their batch and time, got {shapes}"
        )
    heads, key_heads, key_dim = v.shape[2], q.shape[2], q.shape[3]
    if key_heads == 0 or heads % key_heads:
        raise ValueError(
            f"v has {heads} heads, which must be a multiple of the {key_heads} of q and k"
        )
    per_token = (*v.shape[:2], heads)
    if decay is not None and decay.shape not in ((heads,), per_token, (*per_token, key_dim)):
        shapes = f"({heads},), {per_token} or {(*per_token, key_dim)}"
        raise ValueError(f"decay must have shape {shapes}, got {tuple(decay.shape)}")
    if decay is not None and decay.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"decay must be float32 or float64, got {decay.dtype}: bf16 would change the model's memory"
        )
    if beta is not None and beta.shape != per_token:
        raise ValueError(f"beta must have shape {per_token}, got {tuple(beta.shape)}")
    expected = (v.shape[0], heads, key_dim, v.shape[3])
    if state is not None and state.shape != expected:
        raise ValueError(f"state must have shape {expected}, got {tuple(state.shape)}")


def _choose(
    backend: str, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None
) -> ModuleType:
    """The backend's module. ``auto`` takes the recurrence for a single token, on CUDA ours and then fla's, else torch's."""
    if backend != "auto":
        names = (backend,)
    elif q.shape[1] == 1:
        names = ("reference",)
    else:
        names = ("triton", "fla", "torch") if q.is_cuda else ("torch",)
    for name in names:
        try:
            module = import_module(BACKENDS[name], __package__)
            reason = module.unsupported_reason(q, k, v, decay, beta)
        except ModuleNotFoundError as error:
            reason = f"needs the package {error.name}; install it, or use torch"
        if not reason:
            return module
    raise ValueError(f"backend {name} {reason}")
