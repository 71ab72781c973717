"""The collectives of sequence parallelism, all of them regular: all-gather, and all-to-all with ordered sums.

A rank without tokens takes part like any other.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import Layout


def gather_sequence(x: Tensor, layout: Layout, group: dist.ProcessGroup) -> Tensor:
    """The whole ``[batch, time, ...]`` on every rank, from each rank's own tokens ``[batch, local time, ...]``."""
    missing = max(layout.lengths) - x.shape[1]
    if missing:  # an all-gather takes equally much of each rank
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1)
    return layout.unshard(list(_all_gather(x, group)))


def sum_home(x: Tensor, layout: Layout, group: dist.ProcessGroup, wire: torch.dtype) -> Tensor:
    """Each rank's own tokens of the sum over ranks of ``x`` ``[batch, time, ...]``, in the dtype of ``x``.

    Travels as ``wire`` and is summed at home in rank order: deterministic, and its error does not grow with the ranks.
    """
    parts = [layout.shard(x, rank).to(wire) for rank in range(layout.ranks)]
    own = parts[group.rank()].shape
    received = x.new_empty(group.size(), *own, dtype=wire)
    dist.all_to_all_single(
        received.view(-1),
        torch.cat([part.flatten() for part in parts]),
        output_split_sizes=[own.numel()] * group.size(),
        input_split_sizes=[part.numel() for part in parts],
        group=group,
    )
    return _sum_in_order(received, x.dtype)


class AllGather(torch.autograd.Function):
    """``[ranks, *x.shape]`` on every rank; the gradients of all ranks return home and are summed there in rank order.

    The loss is the sum of all ranks' losses. Backward is a collective: the result must be part of every rank's graph.
    """

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        received = torch.empty_like(gradient)
        dist.all_to_all_single(received, gradient, group=ctx.group)
        return _sum_in_order(received, gradient.dtype), None


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    gathered = x.new_empty(group.size(), *x.shape)
    dist.all_gather_into_tensor(gathered.flatten(0, 1), x.contiguous(), group=group)
    return gathered


def _sum_in_order(parts: Tensor, dtype: torch.dtype) -> Tensor:
    total = parts[0].to(dtype)
    for part in parts[1:]:
        total = total + part
    return total
