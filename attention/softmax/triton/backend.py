"""Softmax attention by our Triton kernels, which read the pattern as a small table of rules.

One launch for the queries of all tiles of a batch, whatever their number, and a few for their keys:
one for the bands, and one for each far rule.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...arguments import with_dense_heads
from ...gpu import compute_capability
from ...patterns import Pattern
from ...patterns.token_lists import TokenLists
from ...triton_device import (
    INTERPRETED,
    allocate_workspace,
    device_unsupported_reason,
    fits_bulk_copies,
    has_bulk_copies,
    on_device_of_first_argument,
)
from ..tile_batch import TileBatch
from ..tiles import Gradients, LogitOptions, new_head_major_lse
from .block_lists import lists_by_key, lists_by_query
from .dkv import delta_kernel, dkv_kernel, reduce_splits_kernel
from .forward_dq import forward_dq_kernel
from .launch_config import MAX_HEAD_DIM
from .launch_plan import CallShapes, LaunchPlans, block_dim, launch_plans
from .rule_table import smallest_block

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
    block = smallest_block(pattern, k.shape[2])
    if block is not None and block < _MIN_BLOCK:
        return (
            f"needs blocks of at least {_MIN_BLOCK} tokens, but {pattern!r} has {block}; use torch"
        )
    return None


class _Inputs(NamedTuple):
    """What the kernels read."""

    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    """In forward it is written."""
    use_bulk_copies: bool
    grad_out: Tensor | None = None
    """In backward, as is ``delta``."""
    delta: Tensor | None = None

    @property
    def strides(self) -> tuple[int, ...]:
        """Of batch, time and heads of queries, keys and values."""
        return self.q.stride()[:3] + self.k.stride()[:3] + self.v.stride()[:3]

    @property
    def lse_strides(self) -> tuple[int, int]:
        """Of batch and heads; those of ``delta`` are the same."""
        batch, _, heads = self.lse.stride()
        return batch, heads


def _use_bulk_copies(*tensors: Tensor) -> bool:
    has_them = has_bulk_copies(compute_capability(tensors[0].device))
    return has_them and tensors[0].dtype != torch.float32 and fits_bulk_copies(*tensors)


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
    inputs = _Inputs(q, k, v, lse, _use_bulk_copies(q, k, v))
    for plans in launch_plans(pattern, logits, tiles, _shapes(q, v)):
        _launch_forward_dq("forward", plans, inputs, out, not tiles.is_first)


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
        lse = new_head_major_lse(q, lse.dtype).copy_(lse)
    delta = _delta(out, grad_out, lse, grad_lse)
    bulk = _use_bulk_copies(q, k, v, grad_out)
    inputs = _Inputs(q, k, v, lse, bulk, grad_out, delta)
    for plans in launch_plans(pattern, logits, tiles, _shapes(q, v)):
        _launch_forward_dq("dq", plans, inputs, gradients.q, gradients.accumulate)
        _launch_all_dkv(plans, inputs, gradients)


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


def _launch_forward_dq(
    kernel: str, plans: LaunchPlans, inputs: _Inputs, out: Tensor, add: bool
) -> None:
    """Launch the kernel as ``forward``, or as ``dq`` with the gradient of the output."""
    plan = plans.plan(kernel, add, inputs.use_bulk_copies)
    if plan is None:
        return
    q, k, v, lse, _, grad_out, delta = inputs
    do = out if grad_out is None else grad_out  # not read in forward
    lists = lse  # any pointer
    list_strides = (0, 0, 0)
    if plans.block_lists is not None:
        lists = lists_by_query(plans.block_lists.of_heads(k.shape[2]).to(q.device))
        batch_stride = lists.stride(0) if lists.shape[0] > 1 else 0
        list_strides = (batch_stride, lists.stride(1), lists.stride(2))
    forward_dq_kernel[plan.grid](
        q, k, v, out, lse, do, lse if delta is None else delta,
        plan.rules, lists, *plan.tables, *plans.scales,
        *inputs.strides, *out.stride()[:3], *do.stride()[:3], *inputs.lse_strides,
        *list_strides, *plan.keys, GRAD=kernel == "dq", **plan.constants,
    )  # fmt: skip


def _launch_all_dkv(plans: LaunchPlans, inputs: _Inputs, gradients: Gradients) -> None:
    """Compute dK and dV.

    One launch computes what the bands show, and one for each far rule adds what they leave.
    """
    rules = plans.key_rules
    dk, dv = gradients.k, gradients.v
    if rules.num_bands > 0 or plans.block_lists is not None:
        _launch_dkv(plans, inputs, dk, dv, gradients.accumulate)
    elif not gradients.accumulate:
        dk.zero_()
        dv.zero_()
    if plans.block_lists is not None:
        return
    for far in range(rules.num_far):
        plan = plans.plan("dkv", False, inputs.use_bulk_copies, far)
        if plan is None:
            continue
        # The sums of each program, which are then added to the keys' gradients in a fixed order.
        tile = plan.constants["BN"]
        dk_parts, dv_parts = (
            torch.empty(*plan.grid, tile, x.shape[3], dtype=torch.float32, device=x.device)
            for x in (dk, dv)
        )
        _launch_dkv(plans, inputs, dk_parts, dv_parts, False, far)
        for parts, out, dim in ((dk_parts, dk, "D"), (dv_parts, dv, "DV")):
            reduce_splits_kernel[plan.grid](
                parts, out, plan.rules, *plan.tables, *out.stride()[:3],
                D=plan.constants[dim], BLOCK_D=plan.constants[f"BLOCK_{dim}"], BN=tile,
                RULES=rules.num_bands + rules.num_far, RULE=rules.num_bands + far,
                RELATIVE=far >= rules.num_fixed,
            )  # fmt: skip


def _launch_dkv(
    plans: LaunchPlans, inputs: _Inputs, dk: Tensor, dv: Tensor, add: bool, far: int = -1
) -> None:
    """Launch the kernel for the bands or lists (``far`` is -1), or for one far rule."""
    plan = plans.plan("dkv", add, inputs.use_bulk_copies, far)
    if plan is None:
        return
    q, k, v, lse, _, grad_out, delta = inputs
    assert grad_out is not None
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
        *inputs.strides, *grad_out.stride()[:3], *inputs.lse_strides,
        *dk.stride()[:3], *dv.stride()[:3], *list_strides, *plan.keys, FAR=far, **plan.constants,
    )  # fmt: skip
