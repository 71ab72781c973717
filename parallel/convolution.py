"""Short convolutions over the ranks that share a sequence: a segment takes the tokens just before it from its neighbours."""

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention.linear import convolution
from .collectives import AllGather, check_shard
from .layout import Layout


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    group: dist.ProcessGroup,
    *,
    documents: Tensor | None = None,
) -> Tensor:
    """:func:`longspan.attention.short_convolution` of a sequence that is spread over ``group``; every rank calls it.

    Args:
        x: this rank's tokens, as ``layout`` places them: ``[batch, local time, channels]``, possibly none.
        documents: int ``[batch, time]`` of the **whole** sequence, the same on every rank.

    Returns:
        This rank's tokens of the output. Gradients are those of the sum of all ranks' losses.
    """
    check_shard(layout, group, x.shape[1])
    if layout.ranks == 1:
        return convolution.short_convolution(x, weight, bias, documents=documents)
    reach = weight.shape[1] - 1
    own = [
        slice(slot, slot + stop - start)
        for start, stop, rank, slot in layout.segments_in_order
        if rank == group.rank()
    ]
    # Of each segment the last tokens, all that later ones can see of it; the same number of rows for every rank.
    most = max(map(len, layout.segments))
    tails = [_padded(x[:, max(at.start, at.stop - reach) : at.stop], reach) for at in own]
    tails += [x.new_zeros(x.shape[0], reach, x.shape[2])] * (most - len(tails))
    gathered = AllGather.apply(torch.stack(tails) + x[:, :0].sum(), group)
    # It ties the exchange to this rank's result, without a token: backward is a collective, also for a rank that has none.
    outs, taken = [x[:, :0] + gathered[:0].sum()], [0] * layout.ranks
    before = x.new_zeros(x.shape[0], reach, x.shape[2])
    for start, stop, rank, slot in layout.segments_in_order:
        if rank == group.rank():
            ids, halo = None, before
            if documents is not None:
                ids = documents[:, start:stop]
                earlier = documents[:, [max(0, start - reach + i) for i in range(reach)]]
                halo = before * (earlier == ids[:, :1])[..., None]
            outs.append(
                convolution.short_convolution(
                    x[:, slot : slot + stop - start], weight, bias, state=halo, documents=ids
                )
            )
        tail = gathered[rank, taken[rank]][:, reach - min(reach, stop - start) :]
        before = torch.cat([before, tail], 1)[:, tail.shape[1] :]
        taken[rank] += 1
    return torch.cat(outs, 1)


def _padded(x: Tensor, rows: int) -> Tensor:
    """With zeros before it, ``rows`` along time."""
    return torch.nn.functional.pad(x, (0, 0, rows - x.shape[1], 0))
