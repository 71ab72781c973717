"""Lists of blocks as the kernels read them, made on their device without waiting for it."""

import torch
from torch import Tensor


def lists_by_query(lists: Tensor) -> Tensor:
    """Put before each query block's list how many blocks it sees.

    The lists ascend, so that the blocks ahead of the queries, which it does not see, come last.

    Returns:
        int32 ``[batch or 1, kv_heads, query_blocks, 1 + width]``.
    """
    query_block = torch.arange(lists.shape[2], device=lists.device)[:, None]
    count = ((lists >= 0) & (lists <= query_block)).sum(-1, keepdim=True)
    return torch.cat([count, lists], -1).to(torch.int32).contiguous()


def lists_by_key(lists: Tensor, key_blocks: int) -> tuple[Tensor, Tensor]:
    """Turn lists of key blocks per query block into lists of query blocks per key block.

    Computed on the device of the lists, without waiting for it.

    Returns:
        Where the list of each key block begins, in one row for all batch rows and heads, with the
        end of the last; and the lists, ascending, one after another. Both int32.
    """
    batch, heads, query_blocks, width = lists.shape
    device = lists.device
    query_block = torch.arange(query_blocks, device=device)[:, None]
    head_index = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    none = batch * heads * key_blocks

    visible = (lists >= 0) & (lists <= query_block) & (lists < key_blocks)
    keys = torch.where(visible, head_index * key_blocks + lists, none).flatten()
    keys, order = keys.sort(stable=True)
    begins = torch.searchsorted(keys, torch.arange(none + 1, device=device))
    queries = query_block.expand(batch, heads, -1, width).flatten()[order]
    return begins.to(torch.int32), queries.to(torch.int32)
