"""Softmax attention over the ranks that share a sequence."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import attention
from ..attention.blocklists import chosen_lists
from ..attention.documents import check_documents
from ..attention.patterns import Pattern
from ..attention.selection import Selector
from ..attention.softmax import Work, check_attention, check_logits, sinks_gradient
from .exchange import gather_sequence, sum_home
from .layout import Layout, check_shard


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Selector,
    layout: Layout,
    group: dist.ProcessGroup,
    *,
    documents: Tensor | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    sigmoid_bias: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    schedule: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`longspan.attention.attend` of a sequence that is spread over ``group``; every rank calls it.

    Takes the same keywords, and:

    Args:
        q, k, v: this rank's tokens, as ``layout`` places them: ``[batch, local time, ...]``, possibly none.
        layout: of the sequence over the ranks of ``group``.
        documents: int ``[batch, time]`` of the **whole** sequence, the same on every rank.
        schedule: ``gather`` (all keys and values on every rank, their gradients sent home) or ``auto``.

    Returns:
        This rank's tokens of the output (and log-sum-exp). Gradients are those of the sum of all ranks' losses; those of
        ``sinks``, of which every rank has a copy, are this rank's share.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    check_attention(q, k, v, pattern, backend)
    check_shard(layout, group, q.shape[1])
    check_documents(documents, (q.shape[0], layout.length))
    logits = check_logits(q, scale, sinks, softcap, sigmoid_bias, return_lse)
    if schedule not in ("auto", "gather"):
        raise ValueError(f"schedule must be auto or gather, got {schedule!r}")
    if layout.ranks == 1:
        options = {"scale": scale, "sinks": sinks, "softcap": softcap, "sigmoid_bias": sigmoid_bias, "return_lse": return_lse}
        return attention.attend(q, k, v, pattern, documents=documents, backend=backend, **options)
    if isinstance(pattern, Selector):
        pattern = _select(pattern, q, k, documents, layout, group)
    work = Work.of(pattern, documents, layout.segments[group.rank()], q, k, v, logits, backend)
    out, lse = _GatherAttend.apply(q, k, v, sinks, work, layout, group)
    return (out, lse) if return_lse else out


@torch.no_grad()
def _select(selector: Selector, q: Tensor, k: Tensor, documents: Tensor | None, layout: Layout, group) -> Pattern:
    """What the selector chooses from summaries of its blocks, those of the keys gathered from all ranks."""
    block = selector.block
    if any(start % block or (stop % block and stop != layout.length) for start, stop, _, _ in layout.in_order):
        raise ValueError(f"layout must have its edges at multiples of the pattern's block {block}, to choose among blocks")
    blocks = Layout(tuple(tuple((start // block, -(-stop // block)) for start, stop in own) for own in layout.segments))
    slots = [(slot, slot + stop - start) for start, stop, rank, slot in layout.in_order if rank == group.rank()]
    summaries = [selector.summaries(q[:, start:stop], k[:, start:stop]) for start, stop in slots]
    none = k.new_zeros(k.shape[0], 0, *k.shape[2:], dtype=torch.float32)
    queries, keys = (torch.cat(parts, 1) for parts in (zip(*summaries, strict=True) if summaries else ((none,), (none,))))
    at = blocks.tokens(group.rank()).to(q.device)
    return chosen_lists(selector, queries, gather_sequence(keys, blocks, group), at, documents)


class _GatherAttend(torch.autograd.Function):
    """Exchange and tiles in one node, so that a rank whose result needs nothing of the others still joins backward's exchange.

    Keeps this rank's keys and values, and gathers them again for backward.
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, work: Work, layout: Layout, group: dist.ProcessGroup):
        out, lse = work.forward(q, *_gather(k, v, layout, group), sinks)
        ctx.work, ctx.layout, ctx.group = work, layout, group
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, sinks, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        dq, dk, dv = ctx.work.backward(grad_out, grad_lse, q, *_gather(k, v, ctx.layout, ctx.group), out, lse)
        home = sum_home(torch.cat([dk, dv], -1), ctx.layout, ctx.group, wire=k.dtype).to(k.dtype)
        dsinks = None if sinks is None else sinks_gradient(sinks, grad_out, grad_lse, out, lse)
        return dq.to(q.dtype), *home.split([k.shape[-1], v.shape[-1]], -1), dsinks, None, None, None


def _gather(k: Tensor, v: Tensor, layout: Layout, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    return gather_sequence(torch.cat([k, v], -1), layout, group).split([k.shape[-1], v.shape[-1]], -1)
