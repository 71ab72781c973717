"""Linear attention over the ranks that share a sequence: only states move."""

import torch
import torch.distributed as dist
from torch import Tensor

from .. import attention
from ..attention.documents import check_documents
from ..attention.linear import added_state, check_linear
from .exchange import AllGather
from .layout import Layout, check_shard


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    group: dist.ProcessGroup,
    *,
    decay: Tensor | None = None,
    scale: float = 1.0,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`longspan.attention.linear_attention` of a sequence that is spread over ``group``; every rank calls it.

    A segment of the layout maps the state before it to the one after it, ``S -> A S + B``, where ``A`` is a power of the decay
    (0 across a document's edge) and ``B`` is what its tokens add (LASP-2, arXiv 2502.07563). The ``B`` of all segments are
    gathered, ``[ranks, segments, batch, heads, key_dim, value_dim]`` in fp32 (fp64 for fp64) whatever the length, and each
    segment starts from their decayed sum; autograd gives the transpose of this for backward.

    Args:
        q, k, v: this rank's tokens, as ``layout`` places them: ``[batch, local time, heads, dim]``, possibly none.
        layout: of the sequence over the ranks of ``group``.
        state: before the sequence's first token, the same on every rank; its gradient is this rank's share.
        documents: int ``[batch, time]`` of the **whole** sequence, the same on every rank.

    Returns:
        This rank's tokens of the output, and where asked for the state after the whole sequence's last token, on every rank.
        Gradients are those of the sum of all ranks' losses.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    check_linear(q, k, v, decay, state, backend)
    check_shard(layout, group, q.shape[1])
    check_documents(documents, (q.shape[0], layout.length))
    options = {"decay": decay, "scale": scale, "backend": backend}
    if layout.ranks == 1:
        return attention.linear_attention(q, k, v, state=state, documents=documents, return_state=return_state, **options)
    segments = layout.segments[group.rank()]
    slots = [slice(slot, slot + stop - start) for start, stop, rank, slot in layout.in_order if rank == group.rank()]
    ids = [None if documents is None else documents[:, start:stop] for start, stop in segments]

    added = [added_state(k[:, at], v[:, at], decay=decay, documents=own) for at, own in zip(slots, ids, strict=True)]
    nothing, most = added_state(k[:, :0], v[:, :0]), max(map(len, layout.segments))
    gathered = AllGather.apply(torch.stack([*added, *[nothing] * (most - len(added))]), group)

    sources = gathered.flatten(0, 1)
    # Where the state of each source stands; a rank's missing segments stand beyond the end, out of everyone's sight.
    after = [stop for own in layout.segments for _, stop in (*own, *[(0, layout.length + 1)] * (most - len(own)))]
    if state is not None:
        sources, after = torch.cat([sources, state[None].to(sources)]), [*after, 0]
    before = [start for start, _ in segments] + [layout.length] * return_state
    states = torch.einsum("tsbh,sbhkv->tbhkv", _carry(after, before, documents, decay, sources), sources)
    outs = [
        attention.linear_attention(q[:, at], k[:, at], v[:, at], state=into, documents=own, **options)
        for at, own, into in zip(slots, ids, states, strict=False)
    ]
    # No tokens, but it ties the exchange to this rank's result: backward is a collective, also for a rank that has none.
    tie = torch.einsum("bthk,bhkv->bthv", q[:, :0].to(gathered.dtype), gathered[0, 0]).to(v.dtype)
    out = torch.cat([tie, *outs], 1)
    return (out, states[-1]) if return_state else out


def _carry(after: list[int], before: list[int], documents: Tensor | None, decay: Tensor | None, like: Tensor) -> Tensor:
    """How much of a state after token ``after[s] - 1`` is left before token ``before[t]``: ``[before, after, batch, heads]``.

    A power of the decay from differences of positions; nothing where a document ends in between, or where it comes later.
    """
    batch, heads = like.shape[1:3]
    last = torch.tensor(after, device=like.device)
    first = torch.tensor(before, device=like.device, dtype=last.dtype)
    lag = first[:, None] - last
    decay = like.new_zeros(heads) if decay is None else decay.to(like.dtype)
    carry = ((lag.clamp(min=0)[..., None] * decay).exp() * (lag >= 0)[..., None])[:, :, None].expand(-1, -1, batch, -1)
    if documents is None:
        return carry
    end = documents.shape[1] - 1
    same = documents[:, first.clamp(max=end), None] == documents[:, None, (last - 1).clamp(0, end)]
    return carry * same.permute(1, 2, 0)[..., None]
