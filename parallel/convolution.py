"""Short convolutions over ranks: a segment gets the tokens just before it from other ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention.documents import ids_of_tokens
from ..attention.linear import convolution
from ..attention.operation import operation
from .collectives import AllGather, check_shard
from .layout import Layout, Segment


@operation
def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    group: dist.ProcessGroup,
    *,
    documents: Tensor | None = None,
) -> Tensor:
    """Compute :func:`longspan.attention.short_convolution` of a sequence spread over ``group``.

    Every rank of the group must call it.

    Args:
        x: this rank's tokens, as ``layout`` places them: ``[batch, local time, channels]``,
            possibly none.
        weight: ``[channels, width]``, the same on every rank.
        bias: ``[channels]``, the same on every rank.
        documents: int ``[batch, time]`` of the **whole** sequence, the same on every rank.

    Returns:
        This rank's tokens of the output, ``[batch, local time, channels]``. Gradients are those of
        the sum of all ranks' losses.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    check_shard(layout, group, x.shape[1])
    if layout.ranks == 1:
        return convolution.short_convolution(x, weight, bias, documents=documents)

    rank = group.rank()
    reach = weight.shape[1] - 1  # how many earlier tokens an output depends on
    tails = _gather_tails(x, reach, layout, group)

    # The first, of no tokens, ties the exchange to this rank's output: backward is a collective,
    # also for a rank that has no tokens.
    outs = [x[:, :0] + tails[:0].sum()]
    before = x.new_zeros(x.shape[0], reach, x.shape[2])  # the tokens before the segment
    segments_passed = [0] * layout.ranks
    for segment in layout.segments_in_order:
        if segment.rank == rank:
            outs.append(_convolve_segment(x, weight, bias, before, segment, documents))

        tail = tails[segment.rank, segments_passed[segment.rank]]
        tail = tail[:, reach - min(reach, segment.length) :]  # without padding
        before = torch.cat([before, tail], 1)[:, tail.shape[1] :]
        segments_passed[segment.rank] += 1
    return torch.cat(outs, 1)


def _gather_tails(x: Tensor, reach: int, layout: Layout, group: dist.ProcessGroup) -> Tensor:
    """Return the last tokens of all segments.

    ``[ranks, most segments of a rank, batch, reach, channels]``.
    They are all that later segments can see. Shorter segments are padded at the front, and ranks
    with fewer segments at the end: an all-gather takes the same size of every rank.
    """
    tails = []
    for segment in layout.segments_of_rank[group.rank()]:
        slots = segment.slots
        tails.append(_pad_front(x[:, max(slots.start, slots.stop - reach) : slots.stop], reach))

    most_segments = max(len(segments) for segments in layout.segments)
    tails += [x.new_zeros(x.shape[0], reach, x.shape[2])] * (most_segments - len(tails))
    # The sum, of nothing, makes the exchange a part of the graph of a rank without tokens.
    return AllGather.apply(torch.stack(tails) + x[:, :0].sum(), group)


def _pad_front(x: Tensor, length: int) -> Tensor:
    """Return ``x`` ``[batch, time, channels]`` with zeros before it, so that time is ``length``."""
    return torch.nn.functional.pad(x, (0, 0, length - x.shape[1], 0))


def _convolve_segment(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor,
    segment: Segment,
    documents: Tensor | None,
) -> Tensor:
    """Convolve a segment, of which the tokens of other documents ``before`` it are hidden."""
    reach = before.shape[1]
    ids = None
    if documents is not None:
        ids = ids_of_tokens(documents, segment.tokens)
        earlier = documents[:, max(0, segment.start - reach) : segment.start]
        # Before the sequence's first token there is none: what is there is 0.
        num_missing = reach - earlier.shape[1]
        earlier = torch.cat([documents[:, :1].expand(-1, num_missing), earlier], 1)
        is_same_document = earlier == ids[:, :1]  # [batch, reach]
        before = before.where(is_same_document[..., None], 0.0)
    return convolution.short_convolution(
        x[:, segment.slots], weight, bias, state=before, documents=ids
    )
