"""Linear attention by its recurrence, token by token: what other backends are measured against, and a single token's step."""

import torch
from torch import Tensor

from ..arguments import accumulation_dtype


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None
) -> None:
    """It can do everything."""


def run(q, k, v, decay, beta, scale, state, documents) -> tuple[Tensor, Tensor]:
    """See :func:`~longspan.attention.linear.attention.linear_attention`."""
    dtype, group = accumulation_dtype(q), v.shape[2] // q.shape[2]
    q, k, v, decay, beta, state = (
        x if x is None else x.to(dtype) for x in (q, k, v, decay, beta, state)
    )
    q = q * scale
    q, k = q.repeat_interleave(group, 2), k.repeat_interleave(group, 2)
    outs = []
    for t in range(q.shape[1]):
        if t and documents is not None:
            same = (documents[:, t] == documents[:, t - 1])[:, None, None, None]
            state = torch.where(same, state, torch.zeros_like(state))
        if decay is not None:
            state = _of_token(decay, t) * state
        value = v[:, t]
        if beta is not None:
            value = beta[:, t, :, None] * (value - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + k[:, t, :, :, None] * value[:, :, None]
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outs, 1) if outs else v[:, :0], state


def _of_token(decay: Tensor, t: int) -> Tensor:
    """The factor of the state, ``[batch or 1, heads, key_dim or 1, 1]``."""
    here = decay[None] if decay.ndim == 1 else decay[:, t]
    return here.exp()[..., None] if here.ndim == 3 else here.exp()[..., None, None]
