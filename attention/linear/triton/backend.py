"""The backend: which calls the kernels support, and which of them compute a call."""

import torch
from torch import Tensor

from ...triton_device import device_unsupported_reason
from .launch_config import MAX_KEY_DIM, max_scan_dim
from .scalar import ScalarLinearAttention
from .stages import StagedLinearAttention


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None
) -> str | None:
    """Return why the kernels cannot compute the call, and what can, or None if they can."""
    if reason := device_unsupported_reason(q):
        return reason
    if {q.dtype, k.dtype, v.dtype} not in ({torch.float32}, {torch.float16}, {torch.bfloat16}):
        return (
            f"needs q, k and v all in bf16, fp16 or fp32, not in {q.dtype}, {k.dtype} "
            f"and {v.dtype}; use torch"
        )
    if q.shape[3] > MAX_KEY_DIM:
        return f"supports key dims up to {MAX_KEY_DIM}, not {q.shape[3]}; use torch"
    return None


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
    """Return ``out`` ``[batch, time, heads, value_dim]`` in the dtype of ``v``, and the last state.

    The state is fp32. Both are differentiable in all tensors but ``documents``. The arguments are
    those of :class:`~longspan.attention.linear.backends.Backend`; any strides are read, heads of
    ``q``, ``k`` and ``v`` whose numbers are not side by side are copied.
    """
    if not v.numel():
        return v, state.float()
    if decay is None:
        decay = torch.zeros(v.shape[2], dtype=torch.float32, device=v.device)
    is_scalar = beta is None and decay.ndim < 4
    if is_scalar and max(q.shape[3], v.shape[3]) <= max_scan_dim(v.element_size()):
        return ScalarLinearAttention.apply(q, k, v, decay, state, scale, documents)
    return StagedLinearAttention.apply(q, k, v, decay, beta, state, scale, documents)
