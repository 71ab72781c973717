"""The backend: which calls the kernels support, and which of them compute a call."""

import torch
from torch import Tensor

from ...triton_device import device_unsupported_reason
from .scalar import ScalarLinearAttention


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None
) -> str | None:
    """Return why the kernels cannot compute the call, and what can, or None if they can."""
    if reason := device_unsupported_reason(q):
        return reason
    return None


def forward(q, k, v, decay, beta, scale, state, documents):
    if decay is None:
        decay = torch.zeros(v.shape[2], dtype=torch.float32, device=v.device)
    return ScalarLinearAttention.apply(q, k, v, decay, state, scale, documents)
