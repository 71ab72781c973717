"""Linear attention with one decay per head, or per token and head, without the delta rule.

One kernel, the chunk scan, has six roles.

With chunks of ``C`` tokens and ``G`` the running sum of the log-decays in a chunk, the recurrence
of :func:`~longspan.attention.linear_attention` is, for ``X, Y, Z = q, k, v``,::

    D_ij = exp(G_i - G_j) where j <= i, else 0
    out  = ((X Y^T) * D) Z + exp(G) (X S)
    S'   = exp(G_C) S + Y^T (exp(G_C - G) Z)

Its gradients are the same formula. With ``dS`` the gradient of the state after a token, ``(dO, v,
k)`` on the transposed states give ``dq``; scanned from the last token to the first, on ``dS``,
``(k, q, dO)`` give ``dv`` and ``(v, dO, q)`` give ``dk``. Such a scan sums the decays from the
chunk's other end: ``G_C - G`` takes the place of ``G``.

Documents are cut into segments, so that there are enough programs. A first launch finds what each
segment adds to the state, a second carries the state over the segments' edges, and a third computes
all outputs, with the states of the chunks in registers. Only the states at the edges of segments
are kept for the backward pass.

A decay's gradient is ``<dS_t, exp(g_t) S_{t-1}> = sum over s >= t of q_s . dq_s - k_s . dk_s``,
over the tokens ``s`` of the same segment, plus ``<S, dS>`` at the segment's end.

Everything is deterministic: no atomics. Exponents are differences of sums of decays, never above 0.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...arguments import with_dense_heads
from ...gpu import compute_capability
from ...operation import without_autocast
from ...triton_device import (
    INTERPRETED,
    allocate_workspace,
    fits_bulk_copies,
    has_bulk_copies,
)
from .chunk_scan import chunk_scan_kernel, state_passing_kernel
from .decay_gradient import decay_gradient_kernel
from .launch_config import ScanConfig, padded_dim, scan_config
from .pieces import Pieces, pieces_of
from .tiles import STRONGEST

_CHUNK = 64
"""Tokens of which segments are whole numbers."""
# A segment's states are small beside its tokens, and few enough to be passed on quickly.
_SHORTEST, _LONGEST = 512, 4096
_PROGRAMS = 4
"""Programs for each processor of the GPU."""
_PASSED = 1024
"""Numbers of a state that one program of the state passing has."""


class ScalarLinearAttention(torch.autograd.Function):
    """The output and the last state, from ``q, k, v, decay, state, scale, documents``."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        state: Tensor,
        scale: float,
        documents: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = map(with_dense_heads, (q, k, v))
        decay = decay.float().clamp(min=STRONGEST.value).contiguous()
        batch, length, heads, value_dim = v.shape
        blocks = triton.cdiv(value_dim, _scan_config(q, v).block)
        segment = _segment(length, batch * heads * blocks, v.device)
        segments = pieces_of(documents, (batch, length), segment, v.device)

        scan = _Scan(decay, segments, scale)
        with torch.cuda.device_of(v):
            states = scan.edge_states(k, v, state)
            out = scan.out(q, k, v, states, v.dtype)
        ctx.scale = scale
        ctx.segments = segments
        ctx.save_for_backward(q, k, v, decay, states)
        return out, states[batch : 2 * batch].clone()

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay, states = ctx.saved_tensors
        # It may be one row for all tokens, which bulk copies cannot read.
        grad_out = grad_out.contiguous()
        scan = _Scan(decay, ctx.segments, ctx.scale)

        # For the decays' gradient: q . dq and k . dk of each token, by block of dims.
        needs_decay = ctx.needs_input_grad[3]
        q_dots, k_dots = None, None
        if needs_decay:
            blocks = triton.cdiv(k.shape[3], _scan_config(v, k).block)
            q_dots, k_dots = (
                torch.empty(blocks, *v.shape[:3], dtype=torch.float32, device=v.device)
                for _ in range(2)
            )
        q_partner = q if needs_decay else None
        k_partner = k if needs_decay else None

        # See the module's docstring for what gives what.
        is_grouped = q.shape[2] < v.shape[2]  # several heads add to the gradient of a key head
        dtype = torch.float32 if is_grouped else q.dtype
        d_decay = None
        with torch.cuda.device_of(v):
            grad_states = scan.edge_states(q, grad_out, grad_state, reverse=True)
            dq = scan.out(
                grad_out, v, k, states, dtype, transposed=True, partner=q_partner, dots=q_dots
            )
            dk = scan.out(
                v, grad_out, q, grad_states, dtype, transposed=True, reverse=True,
                partner=k_partner, dots=k_dots,
            )  # fmt: skip
            dv = scan.out(k, q, grad_out, grad_states, v.dtype, reverse=True)
            if q_dots is not None and k_dots is not None:
                token_dots = (q_dots - k_dots).sum(0)
                edge_dots = (states * grad_states).sum((2, 3))
                d_decay = scan.decay_gradient(token_dots, edge_dots)
        if is_grouped:
            dq, dk = (x.unflatten(2, (q.shape[2], -1)).sum(3).to(q.dtype) for x in (dq, dk))
        return dq, dk, dv, d_decay, grad_states[: len(q)], None, None


@dataclass(frozen=True)
class _Scan:
    """The kernels' launches over the same tokens, forward and (``reverse``) back.

    ``x``, ``y`` and ``z`` are as in the module's docstring: ``[batch, time, heads, dim]``.
    """

    decay: Tensor
    segments: Pieces
    scale: float

    def edge_states(self, y: Tensor, z: Tensor, first: Tensor, reverse: bool = False) -> Tensor:
        """Return the states at the edges of segments, from the ``first`` in the scan's direction.

        fp32 ``[slots, heads, key_dim, value_dim]``; ``first`` is that of each batch row.
        """
        batch, heads, key_dim, value_dim = first.shape
        states = first.new_empty(
            self.segments.slots, heads, key_dim, value_dim, dtype=torch.float32
        )
        first_slot = batch if reverse else 0
        states[first_slot : first_slot + batch] = first
        carry = states.new_empty(len(self.segments.table), heads)
        self._launch(y, y, z, states, reverse, carry=carry)
        blocks = triton.cdiv(key_dim * value_dim, _PASSED)
        state_passing_kernel[len(self.segments.documents) * blocks, heads](
            states, carry, self.segments.table, self.segments.documents,
            SIZE=key_dim * value_dim, BLOCK=_PASSED, REVERSE=reverse,
        )  # fmt: skip
        return states

    def out(
        self,
        x: Tensor,
        y: Tensor,
        z: Tensor,
        states: Tensor,
        dtype: torch.dtype,
        transposed: bool = False,
        reverse: bool = False,
        partner: Tensor | None = None,
        dots: Tensor | None = None,
    ) -> Tensor:
        """Return ``[batch, time, heads, dim of z]``, from the states at the edges of segments.

        Args:
            transposed: whether ``x`` and ``y`` are values, so that states are read transposed.
            partner, dots: write products of the result's rows with those of ``partner`` to
                ``dots``.
        """
        out = z.new_empty(*z.shape[:2], states.shape[1], z.shape[3], dtype=dtype)
        self._launch(x, y, z, states, reverse, transposed, partner, dots, out=out)
        return out

    def decay_gradient(self, token_dots: Tensor, edge_dots: Tensor) -> Tensor:
        """Return the gradient of the decays, in their shape. Arguments are the kernel's."""
        gradient = torch.empty_like(token_dots)
        _, length, heads = token_dots.shape
        decay_gradient_kernel[len(self.segments.table), heads](
            token_dots, edge_dots, self.segments.table, gradient, length, CHUNK=_CHUNK
        )
        return gradient if self.decay.ndim == 3 else gradient.sum((0, 1))

    def _launch(
        self,
        x: Tensor,
        y: Tensor,
        z: Tensor,
        states: Tensor,
        reverse: bool,
        transposed: bool = False,
        partner: Tensor | None = None,
        dots: Tensor | None = None,
        out: Tensor | None = None,
        carry: Tensor | None = None,
    ) -> None:
        config = _scan_config(x, z)
        heads = states.shape[1]
        tensors = [x, y, z] if partner is None else [x, y, z, partner]
        bulk = (
            has_bulk_copies(compute_capability(z.device))
            and z.dtype != torch.float32
            and fits_bulk_copies(*tensors)
        )
        if bulk:
            triton.set_allocator(allocate_workspace)  # of this thread: autograd has its own
        blocks = triton.cdiv(z.shape[3], config.block)
        chunk_scan_kernel[len(self.segments.table) * blocks, heads](
            x, y, z, partner, self.decay, self.segments.table, states, carry, out, dots, self.scale,
            *x.stride()[:3], *y.stride()[:3], *z.stride()[:3], *tensors[-1].stride()[:3],
            *(states.stride()[:1:-1] if transposed else states.stride()[2:]),
            heads // y.shape[2], heads // z.shape[2], *z.shape[:2],
            DX=x.shape[3], DZ=z.shape[3], BLOCK_X=padded_dim(x.shape[3]), BLOCK_Z=config.block,
            CHUNK=config.chunk, PER_TOKEN=self.decay.ndim == 3, REVERSE=reverse, TMA=bulk,
            PRECISION="ieee" if z.dtype == torch.float32 else "tf32",
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip


def _segment(length: int, programs: int, device: torch.device) -> int:
    """Return the tokens of a segment, so that the GPU has enough programs.

    Args:
        programs: number of programs of each segment.
    """
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    tokens = triton.cdiv(length * programs, _PROGRAMS * processors)
    return triton.cdiv(min(max(tokens, _SHORTEST), _LONGEST), _CHUNK) * _CHUNK


def _scan_config(x: Tensor, z: Tensor) -> ScanConfig:
    """Return the launch config; the interpreter, which has no bf16, uses that of bf16 for fp32."""
    dtype = torch.bfloat16 if INTERPRETED else z.dtype
    config = scan_config(compute_capability(z.device), dtype, x.shape[3])
    return replace(config, block=min(config.block, padded_dim(z.shape[3])))
