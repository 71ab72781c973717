"""Softmax attention by our Triton kernels, which read the pattern as a small table of rules.

One launch for the queries of all tiles of a batch, whatever their number, and a few for their keys:
one for the bands, and one for each far rule.
"""

import torch
import triton
from torch import Tensor

from ...arguments import with_dense_heads
from ...patterns import Pattern
from ...patterns.token_lists import TokenLists
from ...triton_device import (
    INTERPRETED,
    allocate_workspace,
    compute_capability,
    device_unsupported_reason,
    fits_bulk_copies,
    has_bulk_copies,
    on_device_of_first_argument,
)
from ..backends import Gradients
from ..tile_batch import TileBatch
from ..tiles import LogitOptions, new_lse
from .block_lists import lists_by_key, lists_by_query
from .dkv import delta_kernel, dkv_kernel, reduce_splits_kernel
from .forward_dq import forward_dq_kernel
from .launch_config import MAX_HEAD_DIM
from .launch_plan import CallShapes, LaunchPlans, block_dim, launch_plans
from .rule_table import pattern_blocks

_MIN_BLOCK = 16 if INTERPRETED else 64
"""The smallest block of a pattern: wgmma multiplies tiles of 64; the interpreter accepts less."""


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, logits: LogitOptions
) -> str | None:
    """Return why the kernels cannot compute the call, and what can; None if they can."""
    if reason := device_unsupported_reason(q):
        return reason
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"does not support {q.dtype}; use torch"
    if isinstance(pattern, TokenLists):
        return "has no kernel for keys that each query chooses; use torch"
    head_dim = max(q.shape[-1], v.shape[-1])
    if head_dim > MAX_HEAD_DIM:
        return (
            f"supports head dims up to {MAX_HEAD_DIM}, not {head_dim}; "
            "use torch, or flash for causal and windows"
        )
    smallest_block = min(pattern_blocks(pattern, k.shape[2]), default=_MIN_BLOCK)
    if smallest_block < _MIN_BLOCK:
        return (
            f"needs blocks of at least {_MIN_BLOCK} tokens, but {pattern!r} has {smallest_block}; "
            "use torch"
        )
    return None


@on_device_of_first_argument
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    logits: LogitOptions,
    tiles: TileBatch,
    out: Tensor,
    lse: Tensor,
) -> None:
    """See :func:`~longspan.attention.softmax.backends.forward_`."""
    triton.set_allocator(allocate_workspace)  # of this thread: autograd has its own
    q, k, v = map(with_dense_heads, (q, k, v))
    for plans in launch_plans(pattern, logits, tiles, _shapes(q, v)):
        _launch_forward_dq("forward", plans, q, k, v, out, lse, None, None, not tiles.is_first)


@on_device_of_first_argument
def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    pattern: Pattern,
    logits: LogitOptions,
    tiles: TileBatch,
    gradients: Gradients,
) -> None:
    """See :func:`~longspan.attention.softmax.backends.backward_`."""
    triton.set_allocator(allocate_workspace)
    grad_out, q, k, v, out = map(with_dense_heads, (grad_out, q, k, v, out))
    if lse.stride(1) != 1:  # kernels read a head's queries side by side
        lse = new_lse(q, lse.dtype).copy_(lse)
    delta = _delta(out, grad_out, lse, grad_lse)
    for plans in launch_plans(pattern, logits, tiles, _shapes(q, v)):
        _launch_forward_dq(
            "dq", plans, q, k, v, gradients.q, lse, grad_out, delta, gradients.accumulate
        )
        _key_gradients(plans, q, k, v, grad_out, lse, delta, gradients)


def _shapes(q: Tensor, v: Tensor) -> CallShapes:
    return CallShapes(q.shape[2], v.shape[2], q.shape[3], v.shape[3], q.dtype, q.device)


def _delta(out: Tensor, grad_out: Tensor, lse: Tensor, grad_lse: Tensor | None) -> Tensor:
    """Return ``sum(out * grad_out) - grad_lse`` of each query, in fp32 and shaped as ``lse``."""
    batch, queries, heads, dim = out.shape
    delta = torch.empty_strided(lse.shape, lse.stride(), dtype=torch.float32, device=lse.device)
    grad_lse_strides = lse.stride() if grad_lse is None else grad_lse.stride()
    if delta.numel():
        delta_kernel[batch * triton.cdiv(queries, 64), heads](
            out, grad_out, grad_lse, delta,
            *out.stride()[:3], *grad_out.stride()[:3], *grad_lse_strides, *delta.stride()[::2],
            queries, DV=dim, BLOCK_DV=block_dim(dim), BM=64,
        )  # fmt: skip
    return delta


def _use_bulk_copies(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> bool:
    return (
        q.dtype != torch.float32
        and has_bulk_copies(compute_capability(q.device))
        and fits_bulk_copies(q, k, v, do)
    )


def _launch_forward_dq(
    kernel: str,
    plans: LaunchPlans,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None,
    delta: Tensor | None,
    add: bool,
) -> None:
    """Launch the kernel as ``forward``, or as ``dq`` with ``grad_out`` and ``delta``."""
    do = out if grad_out is None else grad_out
    plan = plans.plan(kernel, add, _use_bulk_copies(q, k, v, do))
    if plan is None:
        return
    lists = lse  # any pointer
    list_strides = (0, 0, 0)
    if plans.block_lists is not None:
        lists = lists_by_query(plans.block_lists.of_heads(k.shape[2]).to(q.device))
        batch_stride = lists.stride(0) if lists.shape[0] > 1 else 0
        list_strides = (batch_stride, lists.stride(1), lists.stride(2))
    forward_dq_kernel[plan.grid](
        q, k, v, out, lse, do, lse if delta is None else delta,
        plan.rules, lists, *plan.tables, *plans.scales,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *do.stride()[:3],
        *lse.stride()[::2], *list_strides, *plan.keys,
        GRAD=kernel == "dq", **plan.constants,
    )  # fmt: skip


def _key_gradients(
    plans: LaunchPlans,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    gradients: Gradients,
) -> None:
    """Compute dK and dV.

    One launch computes what the bands show, and one for each far rule adds what they leave.
    """
    rules = plans.key_rules
    inputs = (q, k, v, grad_out, lse, delta)
    if rules.num_bands > 0 or plans.block_lists is not None:
        _launch_dkv(plans, *inputs, gradients.k, gradients.v, gradients.accumulate)
    elif not gradients.accumulate:
        gradients.k.zero_()
        gradients.v.zero_()
    if plans.block_lists is not None:
        return
    for far in range(rules.num_far):
        plan = plans.plan("dkv", False, _use_bulk_copies(q, k, v, grad_out), far)
        if plan is None:
            continue
        # The sums of each program, which are added to the places of the keys in a fixed order.
        key_tile = plan.constants["BN"]
        dk, dv = (
            torch.empty(*plan.grid, key_tile, x.shape[3], dtype=torch.float32, device=x.device)
            for x in (k, v)
        )
        _launch_dkv(plans, *inputs, dk, dv, False, far)
        for parts, out in ((dk, gradients.k), (dv, gradients.v)):
            reduce_splits_kernel[plan.grid](
                parts, out, plan.rules, *plan.tables, *out.stride()[:3],
                D=out.shape[3], BLOCK_D=block_dim(out.shape[3]), BN=key_tile,
                RULES=rules.num_bands + rules.num_far, RULE=rules.num_bands + far,
                RELATIVE=far >= rules.num_fixed,
            )  # fmt: skip


def _launch_dkv(
    plans: LaunchPlans,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    add: bool,
    far: int = -1,
) -> None:
    """Launch the kernel for the bands or lists (``far`` is -1), or for one far rule."""
    plan = plans.plan("dkv", add, _use_bulk_copies(q, k, v, grad_out), far)
    if plan is None:
        return
    pointers = lists = lse  # any pointer
    list_strides = (0, 0)
    if plans.block_lists is not None:
        by_query = plans.block_lists.of_heads(k.shape[2]).to(q.device)
        last_key = max(place.k_positions.end_position for place in plans.tiles.places) - 1
        num_blocks = last_key // plans.block_lists.block + 1
        pointers, lists = lists_by_key(by_query, num_blocks)
        batch_stride = k.shape[2] * num_blocks if by_query.shape[0] > 1 else 0
        list_strides = (batch_stride, num_blocks)
    dkv_kernel[plan.grid](
        q, k, v, lse, grad_out, delta, dk, dv,
        plan.rules, pointers, lists, *plan.tables, *plans.scales,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3],
        *lse.stride()[::2], *dk.stride()[:3], *dv.stride()[:3], *list_strides, *plan.keys,
        FAR=far, **plan.constants,
    )  # fmt: skip
