"""The collectives of sequence parallelism: all-gather, and all-to-all with ordered sums.

Ranks without tokens take part in all of them.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import Layout


def start_all_to_all(
    received: Tensor,
    sent: Tensor,
    receive_counts: Sequence[int],
    send_counts: Sequence[int],
    peers: Sequence[int],
    group: dist.ProcessGroup,
) -> dist.Work:
    """Start an all-to-all among ``peers``; wait for the returned work before reading ``received``.

    Args:
        received: rows from each of the peers, one after another: ``[sum(receive_counts), ...]``.
        sent: rows for each of the peers, one after another: ``[sum(send_counts), ...]``.
        peers: ranks of ``group``. Its other ranks take part with nothing, so that the peers need no
            group of their own.
    """
    receive_splits = [0] * group.size()
    send_splits = [0] * group.size()
    for rank, receive_count, send_count in zip(peers, receive_counts, send_counts, strict=True):
        receive_splits[rank] = receive_count
        send_splits[rank] = send_count
    work = dist.all_to_all_single(
        received,
        sent,
        output_split_sizes=receive_splits,
        input_split_sizes=send_splits,
        group=group,
        async_op=True,
    )
    assert work is not None  # this rank is a member of the group
    return work


def check_shard(layout: Layout, group: dist.ProcessGroup, tokens: int) -> None:
    """Raise ValueError if ``layout`` does not fit the ranks of ``group`` or this rank's tokens.

    Args:
        tokens: number of tokens that this rank has.
    """
    if layout.ranks != group.size():
        raise ValueError(f"layout is over {layout.ranks} ranks, but group has {group.size()}")
    expected = layout.lengths[group.rank()]
    if tokens != expected:
        raise ValueError(f"layout gives rank {group.rank()} {expected} tokens, but it has {tokens}")


_COMPARED = "the layout, the pattern, the documents, the heads or the schedule"
_MOST_KEYS = 1024
_compared_keys: WeakKeyDictionary[dist.ProcessGroup, OrderedDict[int, None]] = WeakKeyDictionary()
"""Keys that were the same on all ranks of a group, the oldest first."""


def check_same_plan(group: dist.ProcessGroup, key: int) -> None:
    """Raise RuntimeError, on all ranks, if they are about to do different things.

    They would hang, or worse. On GPUs a look at the answer waits for all that was launched before,
    so there only keys that are new to this rank are compared.

    Args:
        key: a number of all that must be the same.
    """
    on_gpu = "nccl" in dist.get_backend(group)
    known_keys = _compared_keys.setdefault(group, OrderedDict())
    if on_gpu and key in known_keys:
        return

    keys = torch.empty(group.size(), dtype=torch.int64, device="cuda" if on_gpu else "cpu")
    dist.all_gather_into_tensor(keys, torch.tensor([key], device=keys.device), group=group)
    if len(keys.unique()) > 1:
        other = next(rank for rank, of_rank in enumerate(keys.tolist()) if of_rank != keys[0])
        raise RuntimeError(
            f"rank {other} of the group is about to do something else than rank 0: "
            f"{_COMPARED} differ"
        )
    if on_gpu:
        known_keys[key] = None
        while len(known_keys) > _MOST_KEYS:
            known_keys.popitem(last=False)


def gather_sequence(x: Tensor, layout: Layout, group: dist.ProcessGroup) -> Tensor:
    """Return the whole ``[batch, time, ...]`` on every rank.

    Args:
        x: this rank's tokens, ``[batch, local time, ...]``.
    """
    missing = max(layout.lengths) - x.shape[1]
    if missing:  # every rank contributes the same to an all-gather
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1)
    return layout.unshard(list(_all_gather(x, group)))


class AllGather(torch.autograd.Function):
    """Give ``[ranks, *x.shape]`` to every rank.

    Gradients of all ranks return to the rank of their ``x`` and are summed there in rank order: the
    loss is the sum of all ranks' losses. Backward is a collective, so the result must be part of
    every rank's graph.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        received = torch.empty_like(gradient)
        dist.all_to_all_single(received, gradient, group=ctx.group)
        return sum_in_rank_order(received, gradient.dtype), None


class AllToAll(torch.autograd.Function):
    """Send parts of ``x`` to all ranks, and give the parts that all ranks send to this one.

    From ``[sum(send_counts), ...]`` to ``[sum(receive_counts), ...]``, both in rank order.
    Gradients go the other way. Backward is a collective, so the result must be part of every rank's
    graph.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        send_counts: list[int],
        receive_counts: list[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.send_counts = send_counts
        ctx.receive_counts = receive_counts
        ctx.group = group
        return _all_to_all(x, send_counts, receive_counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        grad_x = _all_to_all(gradient, ctx.receive_counts, ctx.send_counts, ctx.group)
        return grad_x, None, None, None


def _all_to_all(
    x: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup
) -> Tensor:
    received = x.new_empty(sum(receive_counts), *x.shape[1:])
    work = start_all_to_all(
        received, x.contiguous(), receive_counts, send_counts, range(group.size()), group
    )
    work.wait()
    return received


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    gathered = x.new_empty(group.size(), *x.shape)
    dist.all_gather_into_tensor(gathered.flatten(0, 1), x.contiguous(), group=group)
    return gathered


def sum_in_rank_order(of_ranks: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the sum of the ranks' tensors, added in ``dtype`` and in rank order: deterministic."""
    first, *others = of_ranks
    total = first.to(dtype)
    for tensor in others:
        total = total + tensor
    return total
