"""Softmax attention over the ranks that share a sequence: one autograd node around exchanges and tiles."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import attention
from ..attention.arguments import accumulation_dtype
from ..attention.documents import check_documents
from ..attention.patterns import Causal, ClosedFormPattern, Pattern
from ..attention.patterns.block_lists import BlockLists, select_block_lists
from ..attention.patterns.selection import Selector
from ..attention.softmax.attend import (
    add_sink_logits,
    check_attention,
    check_logit_options,
    check_pattern,
    choose_backend,
    sink_logits_gradient,
)
from ..attention.softmax.backends import tile_backward, tile_forward
from ..attention.softmax.tiles import LogitOptions, Tile, merge_
from .collectives import (
    GradientReturn,
    KVExchange,
    as_columns,
    check_same_plan,
    check_shard,
    gather_sequence,
    new_rows,
)
from .layout import Layout
from .schedules.choose import choose_schedule, key_of, plan_attention
from .schedules.names import Schedule
from .schedules.plan import Plan, PlanStage, TileJob, batch_rows


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
    schedule: str | Schedule = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`longspan.attention.attend` of a sequence that is spread over ``group``; every rank calls it.

    Takes the same keywords, and:

    Args:
        q, k, v: this rank's tokens, as ``layout`` places them: ``[batch, local time, ...]``, possibly none.
        layout: of the sequence over the ranks of ``group``.
        documents: int ``[batch, time]`` of the **whole** sequence, the same on every rank.
        schedule: how keys and values, or heads, move: see :class:`~longspan.parallel.Schedule`; ``auto`` is the one that
            moves the least.

    Returns:
        This rank's tokens of the output (and log-sum-exp). Gradients are those of the sum of all ranks' losses; those of
        ``sinks``, of which every rank has a copy, are this rank's share.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    check_attention(q, k, v, pattern, backend)
    check_shard(layout, group, q.shape[1])
    documents = check_documents(documents, (q.shape[0], layout.length))
    logits = check_logit_options(q, scale, sinks, softcap, sigmoid_bias, return_lse)
    if layout.ranks == 1:
        options = {
            "scale": scale,
            "sinks": sinks,
            "softcap": softcap,
            "sigmoid_bias": sigmoid_bias,
            "return_lse": return_lse,
        }
        return attention.attend(q, k, v, pattern, documents=documents, backend=backend, **options)
    kind = None if isinstance(pattern, BlockLists) else pattern
    chosen = choose_schedule(
        schedule, layout, kind, q.shape[2], k.shape[2], (k.shape[3], v.shape[3])
    )
    rows = batch_rows(documents, q.shape[0], layout.length)
    closed_form = pattern if isinstance(pattern, ClosedFormPattern) else None
    plan = plan_attention(layout, closed_form, q.shape[2], k.shape[2], rows, chosen, group.rank())
    check_same_plan(group, key_of(plan.key, kind, return_lse, q.dtype, k.shape[3], v.shape[3]))
    if isinstance(pattern, Selector):
        pattern = _select(pattern, q, k, documents, layout, group)
    check_pattern(
        pattern,
        k.shape[2],
        q.shape[0],
        max(stop - start for own in rows for start, stop in own.documents),
    )
    backend = choose_backend(backend, q, k, v, pattern, logits)
    if backend == "flash" and max(map(len, layout.segments)) > 2:
        raise ValueError(
            "backend flash takes keys side by side, and this layout has each rank's in many pieces; use torch"
        )
    out, lse = _AttendOverRanks.apply(
        q, k, v, sinks, _DistributedCall(plan, pattern, logits, backend, group), return_lse
    )
    return (out, lse) if return_lse else out


@torch.no_grad()
def _select(
    selector: Selector, q: Tensor, k: Tensor, documents: Tensor | None, layout: Layout, group
) -> Pattern:
    """What the selector chooses from summaries of its blocks, those of the keys gathered from all ranks."""
    block = selector.block
    if any(
        start % block or (stop % block and stop != layout.length)
        for start, stop, _, _ in layout.segments_in_order
    ):
        raise ValueError(
            f"layout must have its edges at multiples of the pattern's block {block}, to choose among blocks"
        )
    blocks = Layout(
        tuple(
            tuple((start // block, -(-stop // block)) for start, stop in own)
            for own in layout.segments
        )
    )
    slots = [
        (slot, slot + stop - start)
        for start, stop, _, slot in layout.segments_of_rank[group.rank()]
    ]
    summaries = [selector.summaries(q[:, start:stop], k[:, start:stop]) for start, stop in slots]
    none = k.new_zeros(k.shape[0], 0, *k.shape[2:], dtype=torch.float32)
    queries, keys = (
        torch.cat(parts, 1)
        for parts in (zip(*summaries, strict=True) if summaries else ((none,), (none,)))
    )
    at = blocks.tokens(group.rank()).to(q.device)
    return select_block_lists(
        selector, queries, gather_sequence(keys, blocks, group), at, documents
    )


@dataclass(frozen=True)
class _DistributedCall:
    """A plan, and what its tiles are beside it."""

    plan: Plan
    pattern: Pattern
    logits: LogitOptions
    backend: str
    group: dist.ProcessGroup

    def tile(self, job: TileJob) -> Tile:
        pattern: Pattern = Causal() if job.dense else self.pattern
        pattern = pattern.in_document(job.batch, *job.document)
        first = self.plan.first_kv_head + job.heads.start
        return Tile(
            pattern.from_head(first) if first else pattern, (job.q_at,), (job.k_at,), self.logits
        )

    def stages(self, k: Tensor, v: Tensor) -> Iterator[tuple[PlanStage, Tensor, Tensor]]:
        """Each stage with its keys and values; while it is computed the next ones are on their way."""
        kv, stages = torch.cat([k, v], -1).contiguous(), self.plan.stages
        parcels = (
            stage.exchange and KVExchange(kv, stage.exchange, self.plan.peers, self.group)
            for stage in stages
        )
        coming = next(parcels)
        for stage in stages:
            parcel, coming = coming, next(parcels, None)
            yield (
                stage,
                *(
                    (k, v)
                    if parcel is None
                    else parcel.buffer().split([k.shape[3], v.shape[3]], -1)
                ),
            )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(q)
        out = q.new_empty(*q.shape[:3], v.shape[3], dtype=dtype)
        lse = q.new_empty(q.shape[:3], dtype=dtype)
        for stage, keys, values in self.stages(k, v):
            for job in stage.jobs:
                rows, columns = self._places(job, q, k)
                new = tile_forward(
                    q[rows], keys[columns], values[columns], self.tile(job), self.backend
                )
                if job.first:
                    out[rows], lse[rows] = new
                else:
                    merge_(out[rows], lse[rows], *new, self.logits)
        return out.to(q.dtype), lse

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, q, k, v, out, lse
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's tokens, summed over all ranks: in fp32 (fp64 for fp64)."""
        dtype = accumulation_dtype(q)
        dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
        total = k.new_zeros(*k.shape[:3], k.shape[3] + v.shape[3], dtype=dtype)
        going = None
        for stage, keys, values in self.stages(k, v):
            rows = None if stage.exchange is None else new_rows(stage.exchange, total, dtype)
            found = total if rows is None else as_columns(rows, stage.exchange, total)
            dk, dv = found.split([k.shape[3], v.shape[3]], -1)
            for job in stage.jobs:
                own, columns = self._places(job, q, k)
                parts = (grad_out[own], q[own], keys[columns], values[columns], out[own], lse[own])
                own_grad_lse = None if grad_lse is None else grad_lse[own]
                gradients = tile_backward(*parts, self.tile(job), self.backend, own_grad_lse)
                for sums, at, gradient in zip(
                    (dq, dk, dv), (own, columns, columns), gradients, strict=True
                ):
                    sums[at] += gradient
            if going is not None:
                going.add_to(total)
            going = (
                None
                if rows is None
                else GradientReturn(rows, stage.exchange, self.plan.peers, self.group, k.dtype)
            )
        if going is not None:
            going.add_to(total)
        return dq, *total.split([k.shape[3], v.shape[3]], -1)

    @staticmethod
    def _places(job: TileJob, q: Tensor, k: Tensor) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where the tile's queries are, and its keys."""
        each = q.shape[2] // k.shape[2]
        heads = slice(job.heads.start * each, job.heads.stop * each)
        return (job.batch, job.queries, heads), (job.batch, job.keys, job.heads)


class _AttendOverRanks(torch.autograd.Function):
    """Exchanges and tiles in one node, so that a rank whose result needs nothing of the others still joins backward's exchange.

    Keeps this rank's own tensors alone; keys and values of others are fetched again for backward.
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, work: _DistributedCall, return_lse: bool):
        ctx.work, ctx.shape, ctx.return_lse = work, q.shape, return_lse
        heads = work.plan.heads
        if heads is not None:
            q = heads.to_heads(q, heads.heads, work.group)
            k, v = (heads.to_heads(x, heads.kv_heads, work.group) for x in (k, v))
            sinks = None if sinks is None else sinks[heads.heads[heads.rank]]
        out, lse = work.forward(q, k, v)
        if sinks is not None:
            out, lse = add_sink_logits(out, lse, sinks)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        if heads is not None:
            out, own_lse = heads.to_tokens(out, heads.heads, work.group).to(q.dtype), None
            if return_lse:
                own_lse = heads.to_tokens(lse[..., None], heads.heads, work.group)[..., 0]
            return out, own_lse
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, sinks, out, lse = ctx.saved_tensors
        work, heads = ctx.work, ctx.work.plan.heads
        grad_out = out.new_zeros(ctx.shape[:3] + v.shape[3:]) if grad_out is None else grad_out
        if heads is not None:
            grad_out = heads.to_heads(grad_out, heads.heads, work.group)
            if ctx.return_lse:  # a collective, also for a rank whose loss has no part of it
                grad_lse = lse.new_zeros(ctx.shape[:3]) if grad_lse is None else grad_lse
                grad_lse = heads.to_heads(grad_lse[..., None], heads.heads, work.group)[..., 0]
        gradients = work.backward(grad_out, grad_lse, q, k, v, out, lse)
        dsinks = (
            None if sinks is None else sink_logits_gradient(sinks, grad_out, grad_lse, out, lse)
        )
        if heads is not None:
            shares = (heads.heads, heads.kv_heads, heads.kv_heads)
            pairs = zip(gradients, shares, strict=True)
            gradients = [
                heads.to_tokens(gradient.to(q.dtype), share, work.group)
                for gradient, share in pairs
            ]
            if sinks is not None:
                own, dsinks = dsinks, dsinks.new_zeros(ctx.shape[2])
                dsinks[heads.heads[heads.rank]] = own
        return *(gradient.to(q.dtype) for gradient in gradients), dsinks, None, None
