"""Rotary position embedding on Triton: of heads, and of a whole fused projection at once."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import with_dense_heads
from .triton_device import on_device_of_first_argument

_NUMBERS = 2048
"""Numbers of one head that a program moves."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dims of ``x [batch, time, heads, dim]``; see :func:`.rotary.apply_rotary`.

    The output is contiguous.
    """
    return _Rotate.apply(x, cos, sin)


def split(
    projected: Tensor, group: int, num_gates: int, tables: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split a fused projection and rotate its queries and keys; see :func:`.rotary.split_heads`.

    All outputs are contiguous.
    """
    cos, sin = tables or (None, None)
    return _Split.apply(projected, group, num_gates, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(grad, *ctx.saved_tensors, -1.0), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        group: int,
        num_gates: int,
        cos: Tensor | None,
        sin: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        # The gradient lies in memory as the projection does, whose time may come before its batch.
        ctx.shape = projected.shape
        ctx.strides = torch.empty_like(projected, device="meta").stride()
        batch, length, kv_heads, _, dim = projected.shape
        q = projected.new_empty(batch, length, kv_heads * group, dim)
        gate = projected.new_empty(batch, length, kv_heads, num_gates, dim)
        k = projected.new_empty(batch, length, kv_heads, dim)
        v = torch.empty_like(k)
        _move_projection(projected, q, gate, k, v, cos, sin, True)
        return q, gate, k, v

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_q: Tensor, grad_gate: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad = grad_q.new_empty_strided(ctx.shape, ctx.strides)
        _move_projection(grad, grad_q, grad_gate, grad_k, grad_v, *ctx.saved_tensors, False)
        return grad, None, None, None, None


@on_device_of_first_argument
def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    """Return ``x [batch, time, heads, dim]`` rotated by the angles, or back with direction -1."""
    x = with_dense_heads(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, length, heads, dim = x.shape
    cos = cos.contiguous()
    sin = sin.expand_as(cos).contiguous()
    sizes = _sizes(dim, cos.shape[-1])
    grid = (triton.cdiv(length, sizes["TOKENS"]), heads, batch)
    if out.numel():
        rotate_kernel[grid](
            x, out, cos, sin, direction, length, *x.stride()[:3], *out.stride()[:3], **sizes
        )
    return out


@on_device_of_first_argument
def _move_projection(
    projected: Tensor,
    q: Tensor,
    gate: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    is_forward: bool,
) -> None:
    """Move a projection into its parts and rotate them, or their gradients back into its own.

    Shapes are those of :func:`.rotary.split_heads`.
    """
    batch, length, kv_heads, num_slots, dim = projected.shape
    num_gates = gate.shape[3]
    if not projected.numel():
        return
    projected = projected if projected.stride(-1) == 1 else projected.contiguous()
    q, k, v = (with_dense_heads(x) for x in (q, k, v))
    gate = gate.flatten(2, 3)  # [batch, time, KV heads * gates, dim]
    gate = with_dense_heads(gate)
    half = 0
    if cos is not None:
        assert sin is not None
        half = cos.shape[-1]
        cos = cos.contiguous()
        sin = sin.contiguous()
    sizes = _sizes(dim, half)
    grid = (triton.cdiv(length, sizes["TOKENS"]), kv_heads * num_slots, batch)
    strides = [x.stride()[:3] for x in (q, gate, k, v)]
    split_kernel[grid](
        projected, q, gate, k, v, cos, sin, length,
        *projected.stride()[:4], *(stride for part in strides for stride in part),
        GROUP=num_slots - num_gates - 2, GATES=num_gates, FORWARD=is_forward, **sizes,
    )  # fmt: skip


def _sizes(dim: int, half: int) -> dict[str, int]:
    """Return the kernels' sizes for heads of ``dim`` dims, of which twice ``half`` are rotated."""
    rest = dim - 2 * half
    return {
        "TOKENS": max(1, _NUMBERS // triton.next_power_of_2(dim)),
        "D": dim,
        "HALF": half,
        "BLOCK_HALF": triton.next_power_of_2(max(half, 1)),
        "BLOCK_REST": triton.next_power_of_2(max(rest, 1)),
        "BLOCK_D": triton.next_power_of_2(dim),
    }


@triton.jit
def rotate_kernel(
    X,
    OUT,
    COS,
    SIN,
    direction,
    length,
    x_b,
    x_t,
    x_h,
    out_b,
    out_t,
    out_h,
    TOKENS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rotate some tokens of one head."""
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * TOKENS
    source = X + batch * x_b + head * x_h
    target = OUT + batch * out_b + head * out_h
    angles = batch * length * HALF
    move_head(
        source, x_t, target, out_t, COS + angles, SIN + angles, direction, token, length,
        TOKENS, D, HALF, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip


@triton.jit
def split_kernel(
    PROJECTED,
    Q,
    GATE,
    K,
    V,
    COS,
    SIN,
    length,
    p_b,
    p_t,
    p_h,
    p_s,
    q_b,
    q_t,
    q_h,
    gate_b,
    gate_t,
    gate_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    GROUP: tl.constexpr,
    GATES: tl.constexpr,
    FORWARD: tl.constexpr,
    TOKENS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Move some tokens of one slot of the projection into its part, or back."""
    SLOTS: tl.constexpr = GROUP + GATES + 2
    batch = tl.program_id(2).to(tl.int64)
    kv_head = (tl.program_id(1) // SLOTS).to(tl.int64)
    slot = tl.program_id(1) % SLOTS
    token = tl.program_id(0).to(tl.int64) * TOKENS
    fused = PROJECTED + batch * p_b + kv_head * p_h + slot * p_s
    if slot < GROUP:
        part = Q + batch * q_b + (kv_head * GROUP + slot) * q_h
        part_t = q_t
    elif slot < GROUP + GATES:
        part = GATE + batch * gate_b + (kv_head * GATES + slot - GROUP) * gate_h
        part_t = gate_t
    elif slot == GROUP + GATES:
        part = K + batch * k_b + kv_head * k_h
        part_t = k_t
    else:
        part = V + batch * v_b + kv_head * v_h
        part_t = v_t

    if FORWARD:
        source, source_t, target, target_t = fused, p_t, part, part_t
    else:
        source, source_t, target, target_t = part, part_t, fused, p_t
    if HALF == 0:
        copy_head(source, source_t, target, target_t, token, length, TOKENS, D, BLOCK_D)
    elif (slot < GROUP) | (slot == GROUP + GATES):
        angles = batch * length * HALF
        move_head(
            source, source_t, target, target_t, COS + angles, SIN + angles,
            1.0 if FORWARD else -1.0, token, length, TOKENS, D, HALF, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        copy_head(source, source_t, target, target_t, token, length, TOKENS, D, BLOCK_D)


@triton.jit
def move_head(
    source,
    source_t,
    target,
    target_t,
    COS,
    SIN,
    direction,
    token,
    length,
    TOKENS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rotate the first ``2 HALF`` dims of a head's tokens, and copy the others."""
    tokens = token + tl.arange(0, TOKENS)[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    is_inside = (tokens < length) & (column < HALF)
    cos = tl.load(COS + tokens * HALF + column, mask=is_inside, other=0.0)
    sin = tl.load(SIN + tokens * HALF + column, mask=is_inside, other=0.0) * direction
    first = source + tokens * source_t + column
    a = tl.load(first, mask=is_inside, other=0.0).to(tl.float32)
    b = tl.load(first + HALF, mask=is_inside, other=0.0).to(tl.float32)
    out = target + tokens * target_t + column
    tl.store(out, (a * cos - b * sin).to(target.dtype.element_ty), mask=is_inside)
    tl.store(out + HALF, (b * cos + a * sin).to(target.dtype.element_ty), mask=is_inside)
    if 2 * HALF < D:
        copy_head(
            source + 2 * HALF, source_t, target + 2 * HALF, target_t, token, length,
            TOKENS, D - 2 * HALF, BLOCK_REST,
        )  # fmt: skip


@triton.jit
def copy_head(
    source,
    source_t,
    target,
    target_t,
    token,
    length,
    TOKENS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copy ``D`` dims of a head's tokens."""
    tokens = token + tl.arange(0, TOKENS)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    is_inside = (tokens < length) & (column < D)
    x = tl.load(source + tokens * source_t + column, mask=is_inside, other=0.0)
    tl.store(target + tokens * target_t + column, x, mask=is_inside)
