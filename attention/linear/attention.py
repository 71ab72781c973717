"""Linear attention: one operation for the scalar, the vector and the delta family.

======  ======================  ====  =========================================================
family  decay                   beta  instances
======  ======================  ====  =========================================================
scalar  None, [H] or [B, T, H]  None  linear attention, lightning, RetNet, Mamba-2, simple GLA
vector  [B, T, H, K]            None  GLA
delta   any of these            yes   DeltaNet (no decay), Gated DeltaNet (scalar), Kimi Delta
                                      Attention (vector)
======  ======================  ====  =========================================================
"""

import torch
from torch import Tensor

from ..arguments import accumulation_dtype, check_backend, check_dims, check_number
from ..backend_choice import BackendChoice, choices
from ..documents import check_documents
from ..operation import operation, recomputed, without_autocast
from .backends import BACKENDS, Backend
from .decays import decay_to_end


@operation
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
    """Compute ``o_t = scale * q_t S_t`` for a state ``S`` that every token changes.

    ``S = 0`` before each document, and then::

        S_t = a_t S_{t-1} + k_t v_t^T                                      a_t = exp(decay_t)
        S_t = a_t S_{t-1} + beta_t k_t (v_t - k_t^T (a_t S_{t-1}))^T       with beta: the delta rule

    The state is the one after its last token, as in the papers (arXiv 2405.17381 eq. 9, 2312.06635
    eq. 4, 2412.06464 eq. 10); OpenNLPLab's code for lightning attention keeps it multiplied by one
    more decay. ``K^-0.5`` is not implied: see ``scale``.

    Args:
        q, k: ``[batch, time, key heads, key_dim]``.
        v: ``[batch, time, heads, value_dim]``; successive value heads may share one key head.
        decay: natural log, at most 0, fp32 or fp64: ``[heads]`` for the same at every token,
            ``[batch, time, heads]``, or ``[batch, time, heads, key_dim]``. None is no decay.
        beta: ``[batch, time, heads]``, how much of what a key recalls is replaced. None to add
            without recalling.
        scale: factor of the output.
        state: ``[batch, heads, key_dim, value_dim]``, the state before the first token, of the
            first token's document.
        documents: int ``[batch, time]``, non-decreasing: the state starts again at each new id.
        return_state: also return the state after the last token, fp32 (fp64 for fp64). Given as
            ``state`` with later tokens, it continues the sequence; a single token is a step of the
            recurrence.
        backend: ``torch`` (chunks; any device), ``triton`` (our kernels: every family on CUDA, key
            dims up to 256), ``fla`` (flash-linear-attention's kernels, CUDA), ``reference`` (token
            by token) or ``auto``.

    Returns:
        ``[batch, time, heads, value_dim]`` in the dtype of ``v``, and the last state with
        ``return_state``. Differentiable in all tensors. Accumulates in fp32, fp64 for fp64 inputs.

    Raises:
        ValueError: naming the argument that does not fit, or what a backend does not support and
            which backend does.
    """
    check_linear(q, k, v, decay, beta, state, backend)
    scale = check_number("scale", scale)
    batch, length, heads, value_dim = v.shape
    documents = check_documents(documents, (batch, length))
    if state is None:
        state = v.new_zeros(batch, heads, k.shape[3], value_dim, dtype=accumulation_dtype(q))

    chosen = _choose_backend(backend, q, k, v, decay, beta)
    out, last_state = chosen.forward(q, k, v, decay, beta, scale, state, documents)
    out = out.to(v.dtype)
    return (out, last_state) if return_state else out


def normalized(out: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide an output by the sum of its weights (arXiv 2006.16236 eq. 9).

    Args:
        out: ``[batch, time, heads, value_dim + 1]``. If the last column of ``v`` was ones, the last
            one of ``out`` is the sum of the weights.

    Returns:
        ``[batch, time, heads, value_dim]``.
    """
    return out[..., :-1] / (out[..., -1:] + eps)


@without_autocast
def state_map(
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    documents: Tensor | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return ``(A, B)`` such that these tokens take the state from ``S`` to ``A S + B``.

    Both are in fp32 (fp64 for fp64) and differentiable in all tensors.

    Returns:
        ``A``: ``[batch, heads, key_dim, 1]``, a factor of each row of the state; with ``beta`` the
        matrix ``[batch, heads, key_dim, key_dim]``.
        ``B``: ``[batch, heads, key_dim, value_dim]``.
    """
    if beta is not None:
        return _delta_state_map(k, v, decay, beta, documents, backend)
    return recomputed(_additive_state_map, k, v, decay, documents)


def _delta_state_map(
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor,
    documents: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the map of the delta rule, from one run of the operation.

    The state is linear in what it was. So more columns that start as the identity, and to which
    nothing is written, end as ``A``.
    """
    batch, length, heads, value_dim = v.shape
    key_dim = k.shape[3]
    dtype = accumulation_dtype(k)

    # [batch, heads, key_dim, value_dim + key_dim]
    identity = torch.eye(key_dim, dtype=dtype, device=k.device).expand(batch, heads, -1, -1)
    no_value = identity.new_zeros(batch, heads, key_dim, value_dim)
    state = torch.cat([no_value, identity], -1)
    if length:
        wide_v = torch.cat([v, v.new_zeros(batch, length, heads, key_dim)], -1)
        result = linear_attention(
            k, k, wide_v, decay=decay, beta=beta, state=state, documents=documents,
            return_state=True, backend=backend,
        )  # fmt: skip
        state = result[1]
    return state[..., value_dim:], state[..., :value_dim]


def _additive_state_map(
    k: Tensor, v: Tensor, decay: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the map without the delta rule: the product of the decays, and the decayed sum."""
    batch, length, heads, _ = v.shape
    dtype = accumulation_dtype(k)
    log_decay = None
    if decay is not None:
        log_decay = _per_token(decay).to(dtype).expand(batch, length, heads, -1)
    k = k.to(dtype).repeat_interleave(heads // k.shape[2], 2)
    v = v.to(dtype)
    if length and documents is not None:
        # Choices, not factors of 0: what other documents hold may be NaN.
        is_last_document = (documents == documents[:, -1:])[..., None, None]  # [batch, time, 1, 1]
        k = k.where(is_last_document, 0.0)
        v = v.where(is_last_document, 0.0)
        if log_decay is not None:
            log_decay = log_decay.where(is_last_document, 0.0)

    kept = k.new_ones(batch, heads, k.shape[3], 1)
    if log_decay is not None:
        k = k * decay_to_end(log_decay, 1).exp()
        kept = kept * log_decay.sum(1)[..., None].exp()
    if length and documents is not None:
        is_one_document = (documents[:, 0] == documents[:, -1])[:, None, None, None]
        kept = kept.where(is_one_document, 0.0)
    added = torch.einsum("bthk,bthv->bhkv", k, v)
    return kept, added


def _per_token(decay: Tensor) -> Tensor:
    """Return any decay so that it expands to ``[batch, time, heads, key_dim or 1]``."""
    if decay.ndim == 1:
        return decay[:, None]
    return decay if decay.ndim == 4 else decay[..., None]


def check_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    backend: str,
) -> None:
    """Raise ValueError for arguments that do not fit together."""
    check_backend(backend, BACKENDS)
    check_dims(q=q, k=k, v=v)
    if k.shape != q.shape or v.shape[:2] != q.shape[:2]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(
            f"shapes do not fit: k must have the shape of q, and v its batch and time, got {shapes}"
        )

    heads = v.shape[2]
    key_heads, key_dim = q.shape[2:]
    if key_heads == 0 or heads % key_heads:
        raise ValueError(
            f"v has {heads} heads, which must be a multiple of the {key_heads} of q and k"
        )

    per_token = (*v.shape[:2], heads)
    per_key = (*per_token, key_dim)
    if decay is not None and decay.shape not in ((heads,), per_token, per_key):
        raise ValueError(
            f"decay must have shape ({heads},), {per_token} or {per_key}, got {tuple(decay.shape)}"
        )
    if decay is not None and decay.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"decay must be float32 or float64, got {decay.dtype}: "
            "bf16 would change the model's memory"
        )
    if beta is not None and beta.shape != per_token:
        raise ValueError(f"beta must have shape {per_token}, got {tuple(beta.shape)}")

    expected = (v.shape[0], heads, key_dim, v.shape[3])
    if state is not None and state.shape != expected:
        raise ValueError(f"state must have shape {expected}, got {tuple(state.shape)}")


def _choose_backend(
    backend: str, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None
) -> Backend:
    """Return the backend to use; raise ValueError if the given one does not support the call.

    ``auto`` prefers the recurrence for a single token; on CUDA our kernels, then fla's, then torch;
    elsewhere torch.
    """
    if backend == "auto":
        if q.shape[1] == 1:
            backend = "reference"
        elif q.is_cuda:
            choice = fastest_backend(q, k, v, decay, beta)
            choices[choice] += 1
            return BACKENDS[choice.backend]()
        else:
            backend = "torch"
    if reason := _unsupported_reason(backend, q, k, v, decay, beta):
        raise ValueError(f"backend {backend} {reason}")
    return BACKENDS[backend]()


def fastest_backend(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None
) -> BackendChoice:
    """Return the fastest backend on CUDA that supports the call, and what kept others from it.

    Of the tensors only shapes, dtypes and devices are read: they may be fake.

    Raises:
        ValueError: none supports it.
    """
    call = _description(q, v, decay, beta)
    refusals: list[tuple[str, str]] = []
    for name in ("triton", "fla", "torch"):
        reason = _unsupported_reason(name, q, k, v, decay, beta)
        if not reason:
            return BackendChoice("linear", call, name, tuple(refusals))
        refusals.append((name, reason))
    raise ValueError("backend {} {}".format(*refusals[-1]))


def _unsupported_reason(
    name: str, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None
) -> str | None:
    try:
        return BACKENDS[name]().unsupported_reason(q, k, v, decay, beta)
    except ModuleNotFoundError as error:
        return f"needs the package {error.name}; install it, or use torch"


def _description(q: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None) -> str:
    """Return what of a call decides about its backend."""
    decays = {None: "no decay", 1: "a decay per head", 3: "a decay per token", 4: "vector decays"}
    rule = "" if beta is None else ", delta rule"
    dims = f"key dim {q.shape[3]}, value dim {v.shape[3]}"
    return f"{decays[None if decay is None else decay.ndim]}{rule}, {dims}, {q.dtype}"
