"""Softmax attention over the ranks that share a sequence: one autograd node around everything."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import attention
from ..attention.arguments import accumulation_dtype
from ..attention.documents import check_documents
from ..attention.operation import operation, without_autocast
from ..attention.patterns import Causal, ClosedFormPattern, Pattern, Selector
from ..attention.patterns.block_lists import BlockLists
from ..attention.patterns.token_lists import select_token_lists
from ..attention.softmax.attend import (
    add_sink_logits,
    check_attention,
    check_logit_options,
    check_pattern,
    choose_backend,
    drop_gradients,
    queries_without_keys,
    sink_logits_gradient,
)
from ..attention.softmax.backends import backward_, forward_, new_lse
from ..attention.softmax.tiles import Gradients, LogitOptions
from .collectives import check_same_plan, check_shard, gather_sequence
from .head_exchange import gather_tokens, scatter_tokens
from .kv_exchange import GradientReturn, KVExchange, as_buffer, new_buffer_rows
from .layout import Layout
from .schedules.choose import choose_schedule, key_of, plan_attention
from .schedules.names import Schedule
from .schedules.plan import Plan, PlanStage, TileGroup, batch_rows

_MOST_FLASH_SEGMENTS = 2
"""Of a rank: flash-attn computes keys side by side, one call for each pair of segments."""


@operation
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
    """Compute :func:`longspan.attention.attend` of a sequence spread over ``group``.

    Every rank of the group must call it. Keywords are those of :func:`longspan.attention.attend`,
    and:

    Args:
        q, k, v: this rank's tokens, as ``layout`` places them: ``[batch, local time, ...]``,
            possibly none.
        layout: of the sequence over the ranks of ``group``.
        documents: int ``[batch, time]`` of the **whole** sequence, the same on every rank.
        schedule: how keys and values, or heads, move: see :class:`~longspan.parallel.Schedule`;
            ``auto`` is the one that moves the least among those that spread the work evenly.

    Returns:
        This rank's tokens of the output (and log-sum-exp). Gradients are those of the sum of all
        ranks' losses; those of ``sinks``, of which every rank has a copy, are this rank's share.

    Raises:
        ValueError: naming the argument that does not fit.
        RuntimeError: on every rank, if the ranks are about to do different things.
    """
    check_attention(q, k, v, pattern, backend)
    check_shard(layout, group, q.shape[1])
    documents = check_documents(documents, (q.shape[0], layout.length))
    logits = check_logit_options(q, scale, sinks, softcap, sigmoid_bias, return_lse)
    if layout.ranks == 1:
        return attention.attend(
            q, k, v, pattern, documents=documents, scale=scale, sinks=sinks, softcap=softcap,
            sigmoid_bias=sigmoid_bias, return_lse=return_lse, backend=backend,
        )  # fmt: skip

    rows = batch_rows(documents, q.shape[0], layout.length)
    planned_pattern = None if isinstance(pattern, BlockLists) else pattern
    dims = (k.shape[3], v.shape[3])
    chosen = choose_schedule(schedule, layout, planned_pattern, q.shape[2], k.shape[2], dims)
    closed_form = pattern if isinstance(pattern, ClosedFormPattern) else None
    plan = plan_attention(layout, closed_form, q.shape[2], k.shape[2], rows, chosen, group.rank())
    check_same_plan(group, key_of(plan.key, planned_pattern, return_lse, q.dtype, *dims))

    if isinstance(pattern, Selector):
        pattern = _select(pattern, q, k, documents, layout, group)
    longest = max(document.stop - document.start for part in rows for document in part.documents)
    check_pattern(pattern, k.shape[2], q.shape[0], longest)

    most_segments = max(len(segments) for segments in layout.segments)
    has_few_segments = most_segments <= _MOST_FLASH_SEGMENTS
    backend = choose_backend(backend, q, k, v, pattern, logits, has_few_segments)
    if backend == "flash" and not has_few_segments:
        raise ValueError(
            "backend flash needs keys side by side, but this layout gives ranks many segments; "
            "use torch"
        )
    call = _DistributedCall(plan, pattern, logits, backend, group)
    out, lse = _AttendOverRanks.apply(q, k, v, sinks, call, return_lse)
    return (out, lse) if return_lse else out


@torch.no_grad()
def _select(
    selector: Selector,
    q: Tensor,
    k: Tensor,
    documents: Tensor | None,
    layout: Layout,
    group: dist.ProcessGroup,
) -> Pattern:
    """Return the blocks that the selector chooses for this rank's queries, from all ranks' keys.

    Every rank summarizes its own blocks of keys, and all summaries are gathered.
    """
    block = selector.block
    for segment in layout.segments_in_order:
        is_last = segment.stop == layout.length
        if segment.start % block or (segment.stop % block and not is_last):
            raise ValueError(
                "layout must have its edges at multiples of the pattern's "
                f"block {block}, to choose among blocks"
            )
    block_layout = Layout(
        tuple(
            tuple((start // block, -(-stop // block)) for start, stop in of_rank)
            for of_rank in layout.segments
        )
    )

    # [batch, blocks, kv_heads, dim]; the first, of no keys, is for a rank without tokens.
    own_segments = layout.segments_of_rank[group.rank()]
    summaries = [selector.summaries(k[:, :0])]
    summaries += [selector.summaries(k[:, segment.slots]) for segment in own_segments]
    all_summaries = gather_sequence(torch.cat(summaries, 1), block_layout, group)
    own_tokens = tuple((segment.start, segment.stop) for segment in own_segments)
    return select_token_lists(selector, q, all_summaries, own_tokens, documents)


class _StageKV(NamedTuple):
    """A stage with the keys and values of its buffer: ``[batch, columns, kv_heads, dim]``."""

    stage: PlanStage
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class _DistributedCall:
    """A plan and what its tiles need besides, for tensors of the heads that this rank computes."""

    plan: Plan
    pattern: Pattern
    logits: LogitOptions
    backend: str
    group: dist.ProcessGroup

    def pattern_of(self, group: TileGroup) -> Pattern:
        """Return the pattern of a group's heads."""
        pattern: Pattern = Causal() if group.sees_all else self.pattern
        first_head = self.plan.first_kv_head + group.kv_heads.start
        return pattern.from_head(first_head) if first_head else pattern

    def stages(self, k: Tensor, v: Tensor) -> Iterator[_StageKV]:
        """Yield each stage with its keys and values; the next ones are on their way meanwhile."""
        kv = torch.cat([k, v], -1).contiguous()
        dims = [k.shape[3], v.shape[3]]

        def start_exchange(stage: PlanStage) -> KVExchange | None:
            if stage.exchange is None:
                return None
            return KVExchange(kv, stage.exchange, self.plan.peers, self.group)

        exchanges = map(start_exchange, self.plan.stages)
        coming = next(exchanges)
        for stage in self.plan.stages:
            current = coming
            coming = next(exchanges, None)  # started before the current one is waited for
            if current is None:
                yield _StageKV(stage, k, v)
            else:
                yield _StageKV(stage, *current.wait().split(dims, -1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and log-sum-exp of this rank's queries, without sinks.

        Partial results of a query are merged in the order of the stages.
        """
        dtype = accumulation_dtype(q)
        out = q.new_empty(*q.shape[:3], v.shape[3], dtype=dtype)
        lse = new_lse(q, self.backend)
        for stage, keys, values in self.stages(k, v):
            for group in stage.groups:
                heads, kv_heads = _head_indices(group, q, k)
                forward_(
                    q[heads], keys[kv_heads], values[kv_heads], self.pattern_of(group), self.logits,
                    group.tiles, self.backend, out[heads], lse[heads],
                )  # fmt: skip
        return out.to(q.dtype), lse

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of this rank's tokens, of the sum of all ranks' losses.

        In fp32 (fp64 for fp64). Keys and values of other ranks are fetched again, in the order of
        forward. The gradients of a stage's buffer return to the ranks that own its keys while the
        next stage is computed.
        """
        dtype = accumulation_dtype(q)
        dims = [k.shape[3], v.shape[3]]
        dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
        # Of this rank's keys and values, from all ranks' queries: [batch, local time, kv_heads,
        # dim].
        local_grad_kv = k.new_zeros(*k.shape[:3], sum(dims), dtype=dtype)

        returning: GradientReturn | None = None  # the gradients of the previous stage
        for stage, keys, values in self.stages(k, v):
            exchange = stage.exchange
            if exchange is None:
                grad_rows = None
                grad_kv = local_grad_kv
            else:
                grad_rows = new_buffer_rows(exchange, local_grad_kv, dtype)
                grad_kv = as_buffer(grad_rows, exchange, local_grad_kv)  # the same memory
            dk, dv = grad_kv.split(dims, -1)

            for group in stage.groups:
                heads, kv_heads = _head_indices(group, q, k)
                backward_(
                    grad_out[heads], q[heads], keys[kv_heads], values[kv_heads], out[heads],
                    lse[heads], None if grad_lse is None else grad_lse[heads],
                    self.pattern_of(group), self.logits, group.tiles, self.backend,
                    Gradients(dq[heads], dk[kv_heads], dv[kv_heads], accumulate=True),
                )  # fmt: skip

            # The previous stage's gradients are added only now, when this stage had time to hide
            # them, and always in the order of the stages: sums are the same in every run.
            if returning is not None:
                returning.add_to(local_grad_kv)
            returning = None
            if exchange is not None and grad_rows is not None:
                returning = GradientReturn(
                    grad_rows, exchange, self.plan.peers, self.group, k.dtype
                )
        if returning is not None:
            returning.add_to(local_grad_kv)

        local_dk, local_dv = local_grad_kv.split(dims, -1)
        return dq, local_dk, local_dv


_Index = tuple[slice, slice, slice]


def _head_indices(group: TileGroup, q: Tensor, k: Tensor) -> tuple[_Index, _Index]:
    """Return where a group's query heads and KV heads are in ``[batch, time, heads, dim]``."""
    queries_per_head = q.shape[2] // k.shape[2]  # query heads that read the same KV head
    first, stop = group.kv_heads.start, group.kv_heads.stop
    heads = slice(first * queries_per_head, stop * queries_per_head)
    everything = slice(None)
    return (everything, everything, heads), (everything, everything, slice(first, stop))


class _AttendOverRanks(torch.autograd.Function):
    """Exchanges and tiles in one node.

    So a rank whose result needs nothing of the others still joins backward's exchanges. Only this
    rank's own tensors are saved; keys and values of others are fetched again for backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        call: _DistributedCall,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        split = call.plan.head_split
        kv_heads = k.shape[2]
        ctx.call = call
        ctx.shape = q.shape
        ctx.return_lse = return_lse
        if split is not None:
            q = gather_tokens(q, split, split.query_heads, call.group)
            k = gather_tokens(k, split, split.kv_heads, call.group)
            v = gather_tokens(v, split, split.kv_heads, call.group)
            sinks = None if sinks is None else sinks[split.own_query_heads]

        out, lse = call.forward(q, k, v)
        without_keys = queries_without_keys(lse, call.pattern, kv_heads)
        if sinks is not None:
            out, lse = add_sink_logits(out, lse, sinks)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, sinks, out, lse, without_keys)
        if split is None:
            return out, lse

        local_out = scatter_tokens(out, split, split.query_heads, call.group).to(q.dtype)
        if not return_lse:
            return local_out, None
        local_lse = scatter_tokens(lse[..., None], split, split.query_heads, call.group)
        return local_out, local_lse[..., 0]

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse, without_keys = ctx.saved_tensors
        call: _DistributedCall = ctx.call
        split = call.plan.head_split
        if grad_out is None:  # the loss depends on the log-sum-exp alone
            grad_out = out.new_zeros(ctx.shape[:3] + v.shape[3:])

        if split is not None:
            grad_out = gather_tokens(grad_out, split, split.query_heads, call.group)
            if ctx.return_lse:
                # A collective: also for a rank whose loss does not depend on it.
                if grad_lse is None:
                    grad_lse = lse.new_zeros(ctx.shape[:3])
                grad_lse = grad_lse[..., None]
                grad_lse = gather_tokens(grad_lse, split, split.query_heads, call.group)[..., 0]

        grad_out, grad_key_lse = drop_gradients(without_keys, grad_out, grad_lse)
        dq, dk, dv = call.backward(grad_out, grad_key_lse, q, k, v, out, lse)
        dsinks = None
        if sinks is not None:
            dsinks = sink_logits_gradient(sinks, grad_out, grad_lse, out, lse)

        if split is not None:
            dq = scatter_tokens(dq.to(q.dtype), split, split.query_heads, call.group)
            dk = scatter_tokens(dk.to(q.dtype), split, split.kv_heads, call.group)
            dv = scatter_tokens(dv.to(q.dtype), split, split.kv_heads, call.group)
            if dsinks is not None:
                of_all_heads = dsinks.new_zeros(ctx.shape[2])
                of_all_heads[split.own_query_heads] = dsinks
                dsinks = of_all_heads
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dsinks, None, None
