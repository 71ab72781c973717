"""RMSNorm (arXiv 1910.07467) that knows how its width and its tokens are spread over tensor-parallel ranks."""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dim, which every rank holds whole.

    torch's own norm refuses Megatron's sequence parallelism, where each tensor-parallel rank norms other tokens and the
    weight's gradient must be summed: the mark on the weight asks Megatron for that sum.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=_device(config))
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class HeadsRMSNorm(nn.Module):
    """RMSNorm of what a mixer's heads give, where each tensor-parallel rank holds some of the heads.

    Args:
        over: the mean square is over each ``head`` (and the weight the same for all of them), over the heads of each
            ``key_head``, or over ``all`` heads, of every rank.
        weight: whether it has one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        over: str,
        heads: int,
        head_dim: int,
        group: int,
        eps: float,
        tp_group: torch.distributed.ProcessGroup,
        weight: bool = True,
    ):
        super().__init__()
        self.over, self.eps, self.tp_group, self.width = over, eps, tp_group, heads * head_dim
        self.group = group if over == "key_head" else 1
        self.weight = None
        if weight:
            size = head_dim if over == "head" else self.width // tp_group.size()
            self.weight = nn.Parameter(
                torch.ones(size, dtype=config.params_dtype, device=_device(config))
            )
            if over != "head":
                set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, time, local heads, head_dim]`` in, ``[batch, time, local heads * head_dim]`` out."""
        if self.over == "all":
            normed = self._over_all(x.flatten(2))
        else:
            rows = x.unflatten(2, (-1, self.group)).flatten(3)
            weight = self.weight if self.over == "head" else None
            if (
                weight is not None
            ):  # the same for all heads: the sum of its gradients is over those of every rank
                weight = copy_to_tensor_model_parallel_region(weight, self.tp_group)
            normed = F.rms_norm(rows, rows.shape[-1:], weight, self.eps).flatten(2)
        return normed if self.weight is None or self.over == "head" else normed * self.weight

    def _over_all(self, x: Tensor) -> Tensor:
        if self.tp_group.size() == 1:
            return F.rms_norm(x, x.shape[-1:], None, self.eps)
        squares = x.float().square().sum(-1, keepdim=True)
        # Every rank's output depends on every rank's part: summed on the way forward and on the way back.
        squares = reduce_from_tensor_model_parallel_region(squares, self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, self.tp_group)
        return (x.float() * torch.rsqrt(squares / self.width + self.eps)).to(x.dtype)


def _device(config: TransformerConfig) -> torch.device | str:
    return "cpu" if config.use_cpu_initialization else "cuda"
