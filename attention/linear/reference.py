"""Linear attention by its recurrence, token by token.

It is what other backends are measured against, and the step of a single token.
"""

import torch
from torch import Tensor

from ..arguments import accumulation_dtype
from ..operation import recomputed


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
    return recomputed(_recurrence, q, k, v, decay, beta, scale, state, documents)


def _recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the output of all tokens and the state after the last."""
    dtype = accumulation_dtype(q)
    group_size = v.shape[2] // q.shape[2]  # value heads that share a key head
    q = (q.to(dtype) * scale).repeat_interleave(group_size, 2)
    k = k.to(dtype).repeat_interleave(group_size, 2)
    v = v.to(dtype)
    state = state.to(dtype)  # [batch, heads, key_dim, value_dim]
    decay = None if decay is None else decay.to(dtype)
    beta = None if beta is None else beta.to(dtype)

    outs = []
    for t in range(q.shape[1]):
        if t and documents is not None:
            same = (documents[:, t] == documents[:, t - 1])[:, None, None, None]
            state = torch.where(same, state, torch.zeros_like(state))
        if decay is not None:
            state = _decay_factor(decay, t) * state
        value = v[:, t]
        if beta is not None:
            recalled = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
            value = beta[:, t, :, None] * (value - recalled)
        state = state + k[:, t, :, :, None] * value[:, :, None]
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    out = torch.stack(outs, 1) if outs else v[:, :0]
    return out, state


def _decay_factor(decay: Tensor, t: int) -> Tensor:
    """Return the factor of the state at token ``t``: ``[batch or 1, heads, key_dim or 1, 1]``."""
    log_decay = decay[None] if decay.ndim == 1 else decay[:, t]
    factor = log_decay.exp()
    return factor[..., None] if factor.ndim == 3 else factor[..., None, None]
