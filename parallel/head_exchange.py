"""Moves heads for tokens and back, between the ranks that share the heads of an attention.

Which heads go where is said by :class:`~longspan.parallel.schedules.heads.HeadSplit`.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention.arguments import accumulation_dtype
from .collectives import start_all_to_all
from .schedules.heads import HeadSplit


def gather_tokens(
    x: Tensor, split: HeadSplit, heads: list[slice], group: dist.ProcessGroup
) -> Tensor:
    """Give up the other ranks' heads for all tokens of this rank's own heads.

    Args:
        x: this rank's tokens, ``[batch, local time, all heads, dim]``.
        heads: the heads of each rank, :attr:`HeadSplit.query_heads` or :attr:`HeadSplit.kv_heads`.

    Returns:
        The tokens of all ranks in the order of the sequence, ``[batch, time, own heads, dim]``.
    """
    batch, _, _, dim = x.shape
    own_heads = heads[split.rank].stop - heads[split.rank].start
    sizes = [batch * length * own_heads * dim for length in split.lengths]

    to_ranks = [x[:, :, of_rank].flatten() for of_rank in heads]
    from_ranks = _exchange(to_ranks, sizes, split, group).split(sizes)
    tokens = [
        received.view(batch, length, own_heads, dim)
        for received, length in zip(from_ranks, split.lengths, strict=True)
    ]
    return torch.cat(tokens, 1).index_select(1, split.token_order(x.device).by_position)


def scatter_tokens(
    x: Tensor, split: HeadSplit, heads: list[slice], group: dist.ProcessGroup
) -> Tensor:
    """Give the tokens back to their ranks, for all heads of this rank's own: the inverse.

    Args:
        x: ``[batch, time, own heads, dim]``, in the order of the sequence.
        heads: the heads of each rank, as in :func:`gather_tokens`.

    Returns:
        ``[batch, local time, all heads, dim]``. If several ranks have a head, the sum of theirs, in
        rank order, in fp32 (fp64 for fp64).
    """
    batch, _, _, dim = x.shape
    own_length = split.lengths[split.rank]
    counts = [of_rank.stop - of_rank.start for of_rank in heads]
    sizes = [batch * own_length * count * dim for count in counts]

    in_rank_order = x.index_select(1, split.token_order(x.device).by_rank)
    to_ranks = [tokens.flatten() for tokens in in_rank_order.split(split.lengths, 1)]
    from_ranks = _exchange(to_ranks, sizes, split, group).split(sizes)
    parts = [
        received.view(batch, own_length, count, dim)
        for received, count in zip(from_ranks, counts, strict=True)
    ]

    num_heads = heads[-1].stop
    if sum(counts) == num_heads:
        return torch.cat(parts, 2)
    total = x.new_zeros(batch, own_length, num_heads, dim, dtype=accumulation_dtype(x))
    for part, of_rank in zip(parts, heads, strict=True):
        total[:, :, of_rank] += part
    return total


def _exchange(
    to_ranks: list[Tensor], receive_sizes: list[int], split: HeadSplit, group: dist.ProcessGroup
) -> Tensor:
    sent = torch.cat(to_ranks)
    received = sent.new_empty(sum(receive_sizes))
    send_sizes = [len(part) for part in to_ranks]
    start_all_to_all(received, sent, receive_sizes, send_sizes, split.ranks, group).wait()
    return received
