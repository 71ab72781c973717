"""RMSNorm (arXiv 1910.07467) whose width or tokens may be spread over tensor-parallel ranks."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..megatron_core import (
    TransformerConfig,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)


class RMSNorm(nn.Module):
    """Compute ``x / rms(x) * weight`` over the last dim, which every rank holds whole.

    torch's own norm refuses Megatron's sequence parallelism, where each tensor-parallel rank norms
    other tokens and the weight's gradients must be summed: the mark on the weight asks Megatron for
    that sum.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        weight: Any = _ones(config, hidden_size)
        weight.sequence_parallel = config.sequence_parallel
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class HeadsRMSNorm(nn.Module):
    """RMSNorm of what a mixer's heads give, of which each tensor-parallel rank holds some.

    Args:
        over: what one mean square covers: each ``head`` (then all heads share the weight), the
            heads of each ``key_head``, or ``all`` heads of every rank.
        num_heads: of all ranks together.
        heads_per_key_head: adjacent heads that belong to one key head.
        has_weight: whether the output is multiplied by a learned weight.
    """

    def __init__(
        self,
        config: TransformerConfig,
        tp_group: torch.distributed.ProcessGroup,
        over: Literal["head", "key_head", "all"],
        num_heads: int,
        head_dim: int,
        heads_per_key_head: int = 1,
        has_weight: bool = True,
    ):
        super().__init__()
        self.over = over
        self.eps = config.layernorm_epsilon
        self.tp_group = tp_group
        self.width = num_heads * head_dim
        self.heads_per_norm = heads_per_key_head if over == "key_head" else 1
        self.weight = None
        if has_weight and over == "head":
            self.weight = _ones(config, head_dim)
        elif has_weight:
            self.weight = _ones(config, self.width // tp_group.size())
            set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Norm ``[batch, time, local heads, head_dim]``.

        Returns:
            ``[batch, time, local heads * head_dim]``.
        """
        if self.over == "head":
            return self._over_each_head(x)
        normed = self._over_all_heads(x) if self.over == "all" else self._over_key_heads(x)
        return normed if self.weight is None else normed * self.weight

    def _over_each_head(self, x: Tensor) -> Tensor:
        weight = self.weight
        if weight is not None:
            # All heads share it, so its gradient is the sum over those of every rank.
            weight = copy_to_tensor_model_parallel_region(weight, self.tp_group)
        return F.rms_norm(x, x.shape[-1:], weight, self.eps).flatten(2)

    def _over_key_heads(self, x: Tensor) -> Tensor:
        x = x.unflatten(2, (-1, self.heads_per_norm)).flatten(3)  # [batch, time, key heads, dims]
        return F.rms_norm(x, x.shape[-1:], None, self.eps).flatten(2)

    def _over_all_heads(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        if self.tp_group.size() == 1:
            return F.rms_norm(x, x.shape[-1:], None, self.eps)
        squares = x.float().square().sum(-1, keepdim=True)
        # Every rank's output depends on every rank's part: the sum runs over ranks on the way
        # forward and, for its gradient, on the way back.
        squares = reduce_from_tensor_model_parallel_region(squares, self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, self.tp_group)
        return (x.float() * torch.rsqrt(squares / self.width + self.eps)).to(x.dtype)


def _ones(config: TransformerConfig, size: int) -> nn.Parameter:
    device = "cpu" if config.use_cpu_initialization else "cuda"
    return nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=device))
