"""The collectives of sequence parallelism: all-gather, and all-to-all with ordered sums. Ranks without tokens take part."""

from collections import OrderedDict
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .all_to_all import start_all_to_all
from .layout import Layout
from .schedules.plan import Exchange


class KVExchange:
    """An exchange under way: rows of other ranks, for a buffer of this one.

    Args:
        x: this rank's keys and values, ``[batch, local time, kv_heads, dim]``, contiguous.
        peers: the exchange's ranks, by their numbers in ``group``; others of the group take part with nothing.
    """

    def __init__(self, x: Tensor, exchange: Exchange, peers: range, group: dist.ProcessGroup):
        self.exchange, self.like = exchange, x
        sent = _as_rows(x, exchange).index_select(0, exchange.on(x.device).sent)
        if exchange.everyone:
            padding = exchange.receive[peers.index(group.rank())] - len(sent)
            sent = torch.cat([sent, sent.new_zeros(padding, sent.shape[1])])
        self.received = sent.new_empty(exchange.received, sent.shape[1])
        if exchange.everyone and exchange.regular and len(peers) == group.size():
            self.work = dist.all_gather_into_tensor(self.received, sent, group=group, async_op=True)
        else:
            sent = sent.repeat(len(peers), 1) if exchange.everyone else sent
            self.work = start_all_to_all(
                self.received, sent, exchange.receive, exchange.send, peers, group
            )

    def buffer(self) -> Tensor:
        """``[batch, columns, kv_heads, dim]``; where no row belongs it holds zeros."""
        self.work.wait()
        rows, self.received, at = self.received, None, self.exchange.on(self.like.device)
        if not (at.in_order and len(rows) == _capacity(self.exchange, self.like)):
            placed = new_rows(self.exchange, self.like, rows.dtype)
            rows = placed.index_copy_(0, at.column, rows.index_select(0, at.row))
        return as_columns(rows, self.exchange, self.like)


def new_rows(exchange: Exchange, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros for the rows of a buffer of ``like``'s heads: ``[batch * (kv_heads / heads) * columns, heads * dim]``."""
    return like.new_zeros(_capacity(exchange, like), exchange.heads * like.shape[3], dtype=dtype)


def as_columns(rows: Tensor, exchange: Exchange, like: Tensor) -> Tensor:
    """The same memory as ``[batch, columns, kv_heads, dim]``."""
    lines = rows.view(
        like.shape[0], exchange.per_token, exchange.columns, exchange.heads, like.shape[3]
    )
    return lines.transpose(1, 2).flatten(2, 3)


class GradientReturn:
    """Gradients of a buffer's rows (:func:`new_rows`) on their way to the ranks whose rows they are, as ``wire``."""

    def __init__(
        self,
        rows: Tensor,
        exchange: Exchange,
        peers: range,
        group: dist.ProcessGroup,
        wire: torch.dtype,
    ):
        self.exchange, at = exchange, exchange.on(rows.device)
        leaving = rows.to(wire)
        if not (at.in_order and len(rows) == exchange.received):
            leaving = rows.new_zeros(exchange.received, rows.shape[1], dtype=wire)
            leaving.index_copy_(0, at.row, rows.index_select(0, at.column).to(wire))
        self.arrived = leaving.new_empty(sum(exchange.send), leaving.shape[1])
        self.work = start_all_to_all(
            self.arrived, leaving, exchange.send, exchange.receive, peers, group
        )

    def add_to(self, total: Tensor) -> None:
        """Add them to ``total`` ``[batch, local time, kv_heads, dim]``, in its dtype and in the order of their ranks:
        deterministic, and the error does not grow with the ranks.
        """
        self.work.wait()
        exchange, home, sent = (
            self.exchange,
            _as_rows(total, self.exchange),
            self.exchange.on(total.device).sent,
        )
        if exchange.everyone:
            summed = _sum_in_order(
                self.arrived.view(len(exchange.send), exchange.send[0], self.arrived.shape[1]),
                total.dtype,
            )
            home.index_add_(0, sent, summed[: len(sent)])
            return
        parts = list(exchange.unique or exchange.send)
        for rows, part in zip(sent.split(parts), self.arrived.split(parts), strict=True):
            if len(rows):
                home.index_add_(0, rows, part.to(total.dtype))


def check_same_plan(group: dist.ProcessGroup, key: int) -> None:
    """Refuse, on all ranks, where they are about to do different things: that would hang, or worse.

    On GPUs, where to look at the answer is to wait for all that was launched, only keys that are new to this rank are compared.
    """
    on_gpu = "nccl" in dist.get_backend(group)
    seen = _agreed.setdefault(group, OrderedDict())
    if on_gpu and key in seen:
        return
    keys = torch.empty(group.size(), dtype=torch.int64, device="cuda" if on_gpu else "cpu")
    dist.all_gather_into_tensor(keys, torch.tensor([key], device=keys.device), group=group)
    if len(keys.unique()) > 1:
        other = next(rank for rank, its in enumerate(keys.tolist()) if its != keys[0])
        raise RuntimeError(
            f"rank {other} of the group is about to do something else than rank 0: {WHAT_MUST_AGREE} differ"
        )
    if on_gpu:
        seen[key] = None
        while len(seen) > _REMEMBERED:
            seen.popitem(last=False)


WHAT_MUST_AGREE = "the layout, the pattern, the documents, the heads or the schedule"
_agreed: WeakKeyDictionary = WeakKeyDictionary()
_REMEMBERED = 1024


def _capacity(exchange: Exchange, like: Tensor) -> int:
    return like.shape[0] * exchange.per_token * exchange.columns


def _as_rows(x: Tensor, exchange: Exchange) -> Tensor:
    return x.view(-1, exchange.heads * x.shape[3])


def check_shard(layout: Layout, group: dist.ProcessGroup, tokens: int) -> None:
    """Raise ValueError unless ``layout`` is over the ranks of ``group`` and gives this one ``tokens`` tokens."""
    if layout.ranks != group.size():
        raise ValueError(f"layout is over {layout.ranks} ranks, but group has {group.size()}")
    if tokens != layout.lengths[group.rank()]:
        raise ValueError(
            f"layout gives rank {group.rank()} {layout.lengths[group.rank()]} tokens, but it has {tokens}"
        )


def gather_sequence(x: Tensor, layout: Layout, group: dist.ProcessGroup) -> Tensor:
    """The whole ``[batch, time, ...]`` on every rank, from each rank's own tokens ``[batch, local time, ...]``."""
    missing = max(layout.lengths) - x.shape[1]
    if missing:  # an all-gather takes equally much of each rank
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1)
    return layout.unshard(list(_all_gather(x, group)))


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


class AllToAll(torch.autograd.Function):
    """Of ``x`` ``[sum(send), ...]`` so many for each rank, in rank order; gives ``[sum(receive), ...]``.

    Gradients take the way back. Backward is a collective: the result must be part of every rank's graph.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(x, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradient, ctx.receive, ctx.send, ctx.group), None, None, None


def _all_to_all(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    received = x.new_empty(sum(receive), *x.shape[1:])
    start_all_to_all(received, x.contiguous(), receive, send, range(group.size()), group).wait()
    return received


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    gathered = x.new_empty(group.size(), *x.shape)
    dist.all_gather_into_tensor(gathered.flatten(0, 1), x.contiguous(), group=group)
    return gathered


def _sum_in_order(parts: Tensor, dtype: torch.dtype) -> Tensor:
    total = parts[0].to(dtype)
    for part in parts[1:]:
        total = total + part
    return total
