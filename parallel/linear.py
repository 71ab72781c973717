"""Linear attention over the ranks that share a sequence: only states move."""

import torch
import torch.distributed as dist
from torch import Tensor

from .. import attention
from ..attention.documents import check_documents
from ..attention.linear import check_linear, state_map
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
    beta: Tensor | None = None,
    scale: float = 1.0,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`longspan.attention.linear_attention` of a sequence that is spread over ``group``; every rank calls it.

    A segment of the layout maps the state before it to the one after it, ``S -> A S + B``, where ``A`` is a factor per head or
    key, with the delta rule a matrix, and 0 across a document's edge (LASP-2, arXiv 2502.07563). The maps of all segments are
    gathered in fp32 (fp64 for fp64), each as large as a state or two whatever the length, and each rank applies them in order;
    autograd gives the transpose of this for backward.

    Args:
        q, k, v, beta: this rank's tokens, as ``layout`` places them: ``[batch, local time, heads, dim]``, possibly none.
        decay: ``[heads]``, or of this rank's tokens.
        layout: of the sequence over the ranks of ``group``.
        state: before the sequence's first token, the same on every rank; its gradient is this rank's share.
        documents: int ``[batch, time]`` of the **whole** sequence, the same on every rank.

    Returns:
        This rank's tokens of the output, and where asked for the state after the whole sequence's last token, on every rank.
        Gradients are those of the sum of all ranks' losses.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    check_linear(q, k, v, decay, beta, state, backend)
    check_shard(layout, group, q.shape[1])
    check_documents(documents, (q.shape[0], layout.length))
    if layout.ranks == 1:
        return attention.linear_attention(
            q, k, v, decay=decay, beta=beta, scale=scale, state=state, documents=documents, return_state=return_state,
            backend=backend,
        )  # fmt: skip
    rank = group.rank()

    def piece(x: Tensor | None, at: slice) -> Tensor | None:
        return x if x is None or x.ndim == 1 else x[:, at]

    own, maps = [], []
    for start, stop, holder, slot in layout.in_order:
        if holder == rank:
            at, ids = slice(slot, slot + stop - start), None if documents is None else documents[:, start:stop]
            own.append((q[:, at], k[:, at], v[:, at], piece(decay, at), piece(beta, at), ids))
            maps.append(state_map(*own[-1][1:], backend=backend))
    most = max(map(len, layout.segments))
    nothing = piece(decay, slice(0, 0)), piece(beta, slice(0, 0)), None
    maps += [state_map(k[:, :0], v[:, :0], *nothing, backend=backend)] * (most - len(maps))
    # One message: what is kept beside what is added, column by column. Backward is a collective, so that a rank without tokens
    # has its part in the exchange too: what it sends depends on its inputs, and its output on what it receives.
    width, per_token = v.shape[-1], [x for x in (q, k, v, beta, decay) if x is not None and x.ndim > 1]
    message = torch.stack([torch.cat([added, kept], -1) for kept, added in maps]) + sum(x[:, :0].sum() for x in per_token)
    gathered = AllGather.apply(message, group)

    current = torch.zeros_like(gathered[0, 0, ..., :width]) if state is None else state.to(gathered.dtype)
    outs, taken = [], [0] * layout.ranks
    for start, _, holder, _ in layout.in_order:
        if documents is not None and start:
            current = current * (documents[:, start] == documents[:, start - 1])[:, None, None, None]
        if holder == rank:
            q_s, k_s, v_s, decay_s, beta_s, ids = own[taken[rank]]
            outs.append(
                attention.linear_attention(
                    q_s, k_s, v_s, decay=decay_s, beta=beta_s, scale=scale, state=current, documents=ids, backend=backend
                )
            )
        added, kept = gathered[holder, taken[holder]].split([width, gathered.shape[-1] - width], -1)
        current = added + (kept * current if beta is None else kept @ current)
        taken[holder] += 1
    out = torch.cat([v[:, :0] + gathered[:0].sum().to(v.dtype), *outs], 1)
    return (out, current) if return_state else out
