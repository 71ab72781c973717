"""The one message that most of sequence parallelism is made of."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor


def start_all_to_all(
    received: Tensor,
    sent: Tensor,
    receive: Sequence[int],
    send: Sequence[int],
    peers: Sequence[int],
    group: dist.ProcessGroup,
) -> dist.Work:
    """So many rows of ``sent`` for each of ``peers``, and as many of ``received`` from each, one after another.

    Args:
        peers: ranks of ``group``; its others take part with nothing, so that no group of their own is needed.
    """
    splits = [[0] * group.size(), [0] * group.size()]
    for part, counts in zip(splits, (receive, send), strict=True):
        for rank, count in zip(peers, counts, strict=True):
            part[rank] = count
    return dist.all_to_all_single(
        received,
        sent,
        output_split_sizes=splits[0],
        input_split_sizes=splits[1],
        group=group,
        async_op=True,
    )
