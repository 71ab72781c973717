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
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=_device(config)))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class ShardedRMSNorm(nn.Module):
    """The same where each tensor-parallel rank holds its heads' part of the last dim: the mean square is over all parts."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, tp_group: torch.distributed.ProcessGroup):
        super().__init__()
        self.eps, self.tp_group, self.hidden_size = eps, tp_group, hidden_size
        local = hidden_size // tp_group.size()
        self.weight = nn.Parameter(torch.ones(local, dtype=config.params_dtype, device=_device(config)))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.tp_group.size() == 1:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        squares = x.float().square().sum(-1, keepdim=True)
        # Every rank's output depends on every rank's part: summed on the way forward and on the way back.
        squares = reduce_from_tensor_model_parallel_region(squares, self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, self.tp_group)
        return (x.float() * torch.rsqrt(squares / self.hidden_size + self.eps)).to(x.dtype) * self.weight


def _device(config: TransformerConfig) -> torch.device | str:
    return "cpu" if config.use_cpu_initialization else "cuda"
