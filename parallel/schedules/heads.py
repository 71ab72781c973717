"""Heads for tokens: the all-to-all of DeepSpeed-Ulysses (arXiv 2309.14509)."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ...attention.arguments import accumulation_dtype
from ..all_to_all import start_all_to_all
from ..layout import Layout


class HeadExchange:
    """Between ``ranks`` that each have some tokens of all heads, and the same ranks with some heads of all their tokens.

    Where there are fewer KV heads than ranks, a KV head goes to all ranks whose query heads read it.

    Args:
        layout: of the sequence over all ranks.
        ranks: those that exchange, ascending.
        rank: this one, among them.
        heads, kv_heads: of the whole attention; see :func:`~longspan.parallel.schedules.names.heads_refusal`.
    """

    def __init__(self, layout: Layout, ranks: range, rank: int, heads: int, kv_heads: int):
        self.lengths = [layout.lengths[n] for n in ranks]
        self.ranks, self.rank, self.size = ranks, rank, len(ranks)
        self._segments = [segment for n in ranks for segment in layout.segments[n]]
        self._orders: dict[torch.device, tuple[Tensor, Tensor]] = {}
        per_rank, copies = heads // self.size, max(1, self.size // kv_heads)
        self.heads = [slice(n * per_rank, (n + 1) * per_rank) for n in range(self.size)]
        """Query heads of each of the ranks."""
        kv_per_rank = max(1, kv_heads // self.size)
        self.kv_heads = [
            slice(n // copies * kv_per_rank, (n // copies + 1) * kv_per_rank)
            for n in range(self.size)
        ]

    def heads_moved(self, heads: list[slice]) -> tuple[int, int]:
        """Of one row of the batch, how many heads of tokens go to other ranks, and come from them, before the attention."""
        counts = [part.stop - part.start for part in heads]
        own = self.lengths[self.rank]
        return own * (sum(counts) - counts[self.rank]), counts[self.rank] * (
            sum(self.lengths) - own
        )

    def _order(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The tokens of one rank after another as the sequence has them, and the way back."""
        if device not in self._orders:
            positions = np.concatenate(
                [np.zeros(0, np.int64), *(np.arange(*segment) for segment in self._segments)]
            )
            order = torch.from_numpy(np.argsort(positions, kind="stable")).to(device)
            self._orders[device] = order, order.argsort()
        return self._orders[device]

    def to_heads(self, x: Tensor, heads: list[slice], group: dist.ProcessGroup) -> Tensor:
        """From ``[batch, local time, all heads, dim]`` to ``[batch, time of all, own heads, dim]``, in the sequence's order."""
        batch, _, _, dim = x.shape
        own = heads[self.rank].stop - heads[self.rank].start
        sizes = [batch * length * own * dim for length in self.lengths]
        received = self._exchange([x[:, :, part].flatten() for part in heads], sizes, group).split(
            sizes
        )
        pieces = [
            part.view(batch, length, own, dim)
            for part, length in zip(received, self.lengths, strict=True)
        ]
        return torch.cat(pieces, 1).index_select(1, self._order(x.device)[0])

    def to_tokens(self, x: Tensor, heads: list[slice], group: dist.ProcessGroup) -> Tensor:
        """The way back, to ``[batch, local time, all heads, dim]``; where ranks share a head, the sum in rank order, in fp32
        (fp64 for fp64).
        """
        batch, _, _, dim = x.shape
        parts = [
            part.flatten()
            for part in x.index_select(1, self._order(x.device)[1]).split(self.lengths, 1)
        ]
        own, counts = self.lengths[self.rank], [part.stop - part.start for part in heads]
        sizes = [batch * own * count * dim for count in counts]
        received = self._exchange(parts, sizes, group).split(sizes)
        pieces = [
            part.view(batch, own, count, dim) for part, count in zip(received, counts, strict=True)
        ]
        if sum(counts) == heads[-1].stop:
            return torch.cat(pieces, 2)
        total = x.new_zeros(batch, own, heads[-1].stop, dim, dtype=accumulation_dtype(x))
        for part, mine in zip(pieces, heads, strict=True):
            total[:, :, mine] += part
        return total

    def _exchange(
        self, parts: list[Tensor], receive: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        """Among the ranks that share heads."""
        sent = torch.cat(parts)
        received = sent.new_empty(sum(receive))
        start_all_to_all(
            received, sent, receive, [len(part) for part in parts], self.ranks, group
        ).wait()
        return received
