"""Keys and values on their way to other ranks, and their gradients on the way back.

What moves is said by :class:`~longspan.parallel.schedules.plan.Exchange`. Here ``kv`` is a rank's
keys and values side by side, ``[batch, time, kv_heads, key_dim + value_dim]``. As a matrix of KV
rows it is ``[batch * time * rows_per_token, heads_per_row * dim]``.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import start_all_to_all, sum_in_rank_order
from .schedules.plan import Exchange


class KVExchange:
    """Keys and values of other ranks, on their way to a buffer of this rank.

    Args:
        kv: this rank's keys and values, ``[batch, local time, kv_heads, dim]``, contiguous.
        peers: the ranks that exchange, by their numbers in ``group``; other ranks of the group take
            part with nothing.
    """

    def __init__(self, kv: Tensor, exchange: Exchange, peers: range, group: dist.ProcessGroup):
        self.exchange = exchange
        self._kv = kv
        sent = _as_rows(kv, exchange).index_select(0, exchange.index_on(kv.device).sent_rows)
        if exchange.is_all_gather:
            padding = exchange.receive_counts[peers.index(group.rank())] - len(sent)
            sent = torch.cat([sent, sent.new_zeros(padding, sent.shape[1])])

        self._received = sent.new_empty(exchange.received_rows, sent.shape[1])
        if exchange.is_all_gather and exchange.is_even and len(peers) == group.size():
            work = dist.all_gather_into_tensor(self._received, sent, group=group, async_op=True)
            assert work is not None  # this rank is a member of the group
            self._work = work
            return
        if exchange.is_all_gather:
            sent = sent.repeat(len(peers), 1)
        self._work = start_all_to_all(
            self._received, sent, exchange.receive_counts, exchange.send_counts, peers, group
        )

    def wait(self) -> Tensor:
        """Return the buffer ``[batch, columns, kv_heads, dim]``; unfilled columns are zeros."""
        self._work.wait()
        rows = self._received
        del self._received  # unless it is the buffer, it is free as soon as that is filled
        index = self.exchange.index_on(self._kv.device)
        is_buffer = index.is_in_order and len(rows) == _buffer_rows(self.exchange, self._kv)
        if not is_buffer:
            buffer = new_buffer_rows(self.exchange, self._kv, rows.dtype)
            rows = buffer.index_copy_(0, index.columns, rows.index_select(0, index.received_rows))
        return as_buffer(rows, self.exchange, self._kv)


def new_buffer_rows(exchange: Exchange, kv: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros for a buffer of KV rows: ``[batch * rows_per_token * columns, heads * dim]``."""
    return kv.new_zeros(
        _buffer_rows(exchange, kv), exchange.heads_per_row * kv.shape[3], dtype=dtype
    )


def as_buffer(rows: Tensor, exchange: Exchange, kv: Tensor) -> Tensor:
    """Return the KV rows of a buffer as ``[batch, columns, kv_heads, dim]``: the same memory."""
    lines = rows.view(
        kv.shape[0],
        exchange.rows_per_token,
        exchange.num_columns,
        exchange.heads_per_row,
        kv.shape[3],
    )
    return lines.transpose(1, 2).flatten(2, 3)


class GradientReturn:
    """Gradients of a buffer's KV rows, on their way to the ranks that own the keys and values.

    Args:
        rows: gradients, as :func:`new_buffer_rows` shapes them.
        wire_dtype: the dtype in which they move.
    """

    def __init__(
        self,
        rows: Tensor,
        exchange: Exchange,
        peers: range,
        group: dist.ProcessGroup,
        wire_dtype: torch.dtype,
    ):
        self.exchange = exchange
        index = exchange.index_on(rows.device)
        returned = rows.to(wire_dtype)
        if not (index.is_in_order and len(rows) == exchange.received_rows):
            returned = rows.new_zeros(exchange.received_rows, rows.shape[1], dtype=wire_dtype)
            filled = rows.index_select(0, index.columns).to(wire_dtype)
            returned.index_copy_(0, index.received_rows, filled)

        # What was received in forward is sent now, and the other way round.
        self._arrived = returned.new_empty(sum(exchange.send_counts), returned.shape[1])
        self._work = start_all_to_all(
            self._arrived, returned, exchange.send_counts, exchange.receive_counts, peers, group
        )

    def add_to(self, grad_kv: Tensor) -> None:
        """Add the arrived gradients to ``grad_kv``, in its dtype.

        ``grad_kv`` is ``[batch, local time, kv_heads, dim]``.
        They are added in the order of their ranks: deterministic, and the error does not grow with
        the number of ranks.
        """
        self._work.wait()
        exchange = self.exchange
        grad_rows = _as_rows(grad_kv, exchange)
        sent_rows = exchange.index_on(grad_kv.device).sent_rows

        if exchange.is_all_gather:  # every rank returns the same rows, which are summed first
            of_ranks = self._arrived.view(
                len(exchange.send_counts), exchange.send_counts[0], self._arrived.shape[1]
            )
            summed = sum_in_rank_order(of_ranks, grad_kv.dtype)
            grad_rows.index_add_(0, sent_rows, summed[: len(sent_rows)])
            return

        # index_add_ is deterministic only for rows that are different from each other.
        counts = list(exchange.distinct_counts or exchange.send_counts)
        for rows, arrived in zip(sent_rows.split(counts), self._arrived.split(counts), strict=True):
            if len(rows):
                grad_rows.index_add_(0, rows, arrived.to(grad_kv.dtype))


def _as_rows(kv: Tensor, exchange: Exchange) -> Tensor:
    return kv.view(-1, exchange.heads_per_row * kv.shape[3])


def _buffer_rows(exchange: Exchange, kv: Tensor) -> int:
    return kv.shape[0] * exchange.buffer_rows
