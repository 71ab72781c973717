"""The activation of a gated MLP on Triton, and its gradients."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...attention.triton_device import on_device_of_first_argument

_BLOCK = 1024
"""Columns that a program computes at a time."""


def fused_gated_activation(x: Tensor, is_silu: bool, weights: Tensor | None) -> Tensor:
    """See :func:`.gated_mlp.gated_activation`; the activation is SiLU or none."""
    return _GatedActivation.apply(x, weights, is_silu)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor | None, is_silu: bool) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.is_silu = is_silu
        return _activated(x, weights, is_silu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weights = ctx.saved_tensors
        return *_gradients(grad_out, x, weights, ctx.is_silu), None


@on_device_of_first_argument
def _activated(x: Tensor, weights: Tensor | None, is_silu: bool) -> Tensor:
    """Return the activation of ``x [..., 2 * width]``."""
    x = x.contiguous()
    *tokens, double_width = x.shape
    out = x.new_empty(*tokens, double_width // 2)
    if out.numel():
        weights = None if weights is None else weights.contiguous()
        grid = (out.numel() // out.shape[-1],)
        gated_forward_kernel[grid](x, weights, out, out.shape[-1], SILU=is_silu, BLOCK=_BLOCK)
    return out


@on_device_of_first_argument
def _gradients(
    grad_out: Tensor, x: Tensor, weights: Tensor | None, is_silu: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of ``x [..., 2 * width]`` and of its tokens' weights."""
    x = x.contiguous()
    grad_out = grad_out.contiguous()
    grad_x = torch.empty_like(x)
    grad_weights = None
    if weights is not None:
        weights = weights.contiguous()
        grad_weights = torch.zeros_like(weights)
    if grad_out.numel():
        width = grad_out.shape[-1]
        grid = (grad_out.numel() // width,)
        gated_backward_kernel[grid](
            grad_out, x, weights, grad_x, grad_weights, width, SILU=is_silu, BLOCK=_BLOCK
        )
    return grad_x, grad_weights


@triton.jit
def gated_forward_kernel(X, WEIGHTS, OUT, width, SILU: tl.constexpr, BLOCK: tl.constexpr):
    """Compute one token."""
    token = tl.program_id(0).to(tl.int64)
    X += token * 2 * width
    OUT += token * width
    weight = 1.0
    if WEIGHTS is not None:
        weight = tl.load(WEIGHTS + token).to(tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_inside = column < width
        gate = tl.load(X + column, mask=is_inside, other=0.0).to(tl.float32)
        up = tl.load(X + width + column, mask=is_inside, other=0.0).to(tl.float32)
        if SILU:
            gate *= tl.sigmoid(gate)
        tl.store(OUT + column, (gate * up * weight).to(OUT.dtype.element_ty), mask=is_inside)


@triton.jit
def gated_backward_kernel(
    GRAD_OUT,
    X,
    WEIGHTS,
    GRAD_X,
    GRAD_WEIGHTS,
    width,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the gradients of one token."""
    token = tl.program_id(0).to(tl.int64)
    X += token * 2 * width
    GRAD_X += token * 2 * width
    GRAD_OUT += token * width
    weight = 1.0
    if WEIGHTS is not None:
        weight = tl.load(WEIGHTS + token).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_inside = column < width
        gate = tl.load(X + column, mask=is_inside, other=0.0).to(tl.float32)
        up = tl.load(X + width + column, mask=is_inside, other=0.0).to(tl.float32)
        grad = tl.load(GRAD_OUT + column, mask=is_inside, other=0.0).to(tl.float32)
        if SILU:
            sigmoid = tl.sigmoid(gate)
            slope = sigmoid * (1 + gate * (1 - sigmoid))
            active = gate * sigmoid
        else:
            slope = 1.0
            active = gate
        grad_weight += grad * active * up
        grad *= weight
        grad_gate = (grad * up * slope).to(GRAD_X.dtype.element_ty)
        grad_up = (grad * active).to(GRAD_X.dtype.element_ty)
        tl.store(GRAD_X + column, grad_gate, mask=is_inside)
        tl.store(GRAD_X + width + column, grad_up, mask=is_inside)
    if GRAD_WEIGHTS is not None:
        total = tl.sum(grad_weight)
        tl.store(GRAD_WEIGHTS + token, total.to(GRAD_WEIGHTS.dtype.element_ty))
