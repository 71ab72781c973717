"""Linear attention on Triton, with one decay per head, or per token and head.

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

Sequences are cut into segments, so that there are enough programs. A first launch finds what each
segment adds to the state, a second carries the state over the segments' edges, and a third computes
all outputs, with the states of the chunks in registers. Only the states at the edges of segments
are kept for the backward pass.

A decay's gradient is ``<dS_t, exp(g_t) S_{t-1}> = sum over s >= t of q_s . dq_s - k_s . dk_s``,
over the tokens ``s`` of the same document and segment, plus ``<S, dS>`` at the segment's end for
the document that continues there.

Everything is deterministic: no atomics. Exponents are differences of sums of decays, never above 0.
At a document's edge the state is not decayed but left out: it may be NaN. Inside a chunk that holds
several documents the edge is a factor of 0, which a NaN of the chunk's own tokens passes.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..arguments import with_dense_heads
from ..operation import without_autocast
from ..softmax.triton.launch_config import MAX_HEAD_DIM
from ..triton_device import (
    INTERPRETED,
    LOG2E,
    allocate_workspace,
    compute_capability,
    device_unsupported_reason,
    fits_bulk_copies,
    has_bulk_copies,
    tensor_descriptor,
)


@dataclass(frozen=True)
class ScanConfig:
    """How the chunk scan is launched."""

    chunk: int
    """Tokens of a chunk."""
    block: int
    """Dims of ``Z`` that a program computes."""
    warps: int
    stages: int
    """Loads in flight."""


def scan_config(capability: int, bytes_per_number: int, dim: int) -> ScanConfig:
    """Return how to launch the scan, so that registers all but suffice.

    Args:
        capability: compute capability of the GPU, as 90 for 9.0.
        bytes_per_number: of the inputs.
        dim: of ``X`` and ``Y``.
    """
    if bytes_per_number == 4:  # no tensor cores
        return ScanConfig(16, 16, 8, 1)
    if not has_bulk_copies(capability):  # nor matrix products of four warps together
        return ScanConfig(32, 64, 8, 2)
    return ScanConfig(64, 64, 8 if capability >= 100 else 4, 3 if dim <= 64 else 2)


# exp() is 0 in fp32 from here on: stronger decays would only take digits from the others in their
# sums.
STRONGEST = tl.constexpr(-104.0)
# A chunk's sums of decays have two parts: multiples of 1/256, exact in fp32, and what is left.
# Differences of sums are then as exact as if only the decays between had been added up.
COARSE = tl.constexpr(256.0)


@triton.jit
def _load_tile(
    tiles,
    t,
    length,
    stride,
    first_dim,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TMA: tl.constexpr,
):
    """Load ``BLOCK`` of the ``D`` dims of tokens ``t`` to ``t + SIZE``: ``[SIZE, BLOCK]``.

    Zeros are beyond the last token and the last dim. ``tiles`` comes from ``tensor_descriptor``.
    """
    if TMA:
        x = tiles.load([t, first_dim])
    else:
        rows = tl.arange(0, SIZE)
        dims = first_dim + tl.arange(0, BLOCK)
        mask = (t + rows < length)[:, None]
        if D % BLOCK:
            mask = mask & (dims < D)[None, :]
        x = tl.load(
            tiles + t.to(tl.int64) * stride + rows[:, None] * stride + dims[None, :],
            mask=mask,
            other=0.0,
        )
    return x


@triton.jit
def _document(DOCUMENTS, t, length):
    """Load the document of token ``t``; beyond either end, that of the first or the last token."""
    return tl.load(DOCUMENTS + tl.minimum(tl.maximum(t, 0), length - 1))


@triton.jit(do_not_specialize=["length", "chunks"])
def chunk_scan_kernel(
    X,
    Y,
    Z,
    PARTNER,
    DECAY,
    DOCUMENTS,
    STATES,
    CARRY,
    OUT,
    DOTS,
    scale,
    x_b,
    x_t,
    x_h,
    y_b,
    y_t,
    y_h,
    z_b,
    z_t,
    z_h,
    p_b,
    p_t,
    p_h,
    s_x,
    s_z,
    heads,
    x_group,
    z_group,
    length,
    chunks,
    DX: tl.constexpr,
    DZ: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    CHUNK: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    REVERSE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scan the ``chunks`` chunks of a segment of one head, for ``BLOCK_Z`` of the dims of ``Z``.

    ``STATES`` are those at the segments' edges, ``[segments + 1, batch, heads, ...]``, fp32.

    With ``OUT``: compute it, from the segment's state in ``STATES``. Without: start from a state of
    0, store the state at the segment's end in ``STATES`` and its decay in ``CARRY`` ``[segments,
    batch, heads]``, -1 if another document begins in the segment.

    With ``PARTNER``, of the shape of ``OUT``: also store the products of its rows with those of
    ``OUT``, for the block's dims, in ``DOTS``, fp32 ``[blocks of Z, batch, time, heads]``.
    """
    # What this program computes: a segment and a block of dims, of a row and head of the batch.
    blocks: tl.constexpr = (DZ + BLOCK_Z - 1) // BLOCK_Z
    segment = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    row = tl.program_id(1).to(tl.int64)  # of [batch, heads]
    b = row // heads
    h = row % heads
    x_head = h // x_group
    z_head = h // z_group

    xs = tensor_descriptor(X + b * x_b + x_head * x_h, length, x_t, CHUNK, DX, BLOCK_X, TMA)
    ys = tensor_descriptor(Y + b * y_b + x_head * y_h, length, y_t, CHUNK, DX, BLOCK_X, TMA)
    zs = tensor_descriptor(Z + b * z_b + z_head * z_h, length, z_t, CHUNK, DZ, BLOCK_Z, TMA)
    if PARTNER is not None:
        ps = tensor_descriptor(
            PARTNER + b * p_b + z_head * p_h, length, p_t, CHUNK, DZ, BLOCK_Z, TMA
        )
    first_token = b * length * heads + h  # of [batch, time, heads]
    if DOCUMENTS is not None:
        DOCUMENTS += b * length

    # The state at the segment's edge: where the scan starts, or ends if there is no OUT.
    i = tl.arange(0, CHUNK)
    dims_x = tl.arange(0, BLOCK_X)
    dims_z = block * BLOCK_Z + tl.arange(0, BLOCK_Z)
    edge = (
        tl.num_programs(1)
        * DX
        * DZ
        * (segment + (0 if (OUT is None) == REVERSE else 1)).to(tl.int64)
    )
    state_offsets = edge + row * DX * DZ + dims_x[:, None] * s_x + dims_z[None, :] * s_z
    state_mask = (dims_x < DX)[:, None] & (dims_z < DZ)[None, :]
    if OUT is None:
        state = tl.zeros([BLOCK_X, BLOCK_Z], tl.float32)
    else:
        state = tl.load(STATES + state_offsets, mask=state_mask, other=0.0)
    segment_carry = 1.0
    is_one_document = True
    rate = LOG2E if PER_TOKEN else tl.load(DECAY + h) * LOG2E
    # A long sum exceeds the range of fp16.
    wide: tl.constexpr = tl.bfloat16 if Y.dtype.element_ty == tl.float16 else Y.dtype.element_ty

    for n in range(chunks):
        t = (segment * chunks + (chunks - 1 - n if REVERSE else n)) * CHUNK
        in_sequence = t + i < length

        # The sum of decays up to each token, in the direction of the scan, is
        # (coarse + fine) * rate; that of the whole chunk (coarse_total + fine_total) * rate.
        if PER_TOKEN:
            decay = tl.load(
                DECAY + first_token + (t + i).to(tl.int64) * heads, mask=in_sequence, other=0.0
            )
            decay = tl.maximum(decay, STRONGEST, propagate_nan=tl.PropagateNan.ALL)
            decay_coarse = tl.floor(decay * COARSE) / COARSE
            coarse = tl.cumsum(decay_coarse, 0)
            fine = tl.cumsum(decay - decay_coarse, 0)
            coarse_total = tl.sum(decay_coarse, 0)
            fine_total = tl.sum(decay - decay_coarse, 0)
        else:
            coarse_total = tl.maximum(tl.minimum(length - t, CHUNK), 0).to(tl.float32)
            fine_total = 0.0
            coarse = tl.minimum(i + 1.0, coarse_total)
            fine = 0.0
        if REVERSE:
            coarse = coarse_total - coarse
            fine = fine_total - fine

        # Factors of what a token reads from the state, of the state itself over the chunk, and of
        # what a token writes to it.
        reading = tl.exp2((coarse + fine) * rate)
        carry = tl.exp2((coarse_total + fine_total) * rate)
        writing = tl.exp2((coarse_total - coarse + (fine_total - fine)) * rate)
        visible = i[:, None] <= i[None, :] if REVERSE else i[:, None] >= i[None, :]
        if DOCUMENTS is not None:
            ids = tl.load(DOCUMENTS + t + i, mask=in_sequence, other=-1)
            before = _document(DOCUMENTS, t + CHUNK if REVERSE else t - 1, length)
            last = _document(DOCUMENTS, t if REVERSE else t + CHUNK - 1, length)
            reading = tl.where(ids == before, reading, 0.0)
            writing = tl.where(ids == last, writing, 0.0)
            first = _document(DOCUMENTS, t + CHUNK - 1 if REVERSE else t, length)
            state = tl.where(before == first, state, 0.0)
            carry = tl.where(before == last, carry, 0.0)
            is_one_document = is_one_document & (before == last)
            visible = visible & (ids[:, None] == ids[None, :])
        # What passes through q, which reads in one direction and writes in the other, is scaled.
        if REVERSE:
            writing *= scale
        else:
            reading *= scale

        # What comes from the state before the chunk, and the state after it.
        y = _load_tile(ys, t, length, y_t, 0, CHUNK, DX, BLOCK_X, TMA)
        z = _load_tile(zs, t, length, z_t, block * BLOCK_Z, CHUNK, DZ, BLOCK_Z, TMA)
        if OUT is not None:
            x = _load_tile(xs, t, length, x_t, 0, CHUNK, DX, BLOCK_X, TMA)
            out = tl.dot(x.to(wide), state.to(wide), input_precision=PRECISION) * reading[:, None]
        state = tl.dot(
            tl.trans(y),
            (z * writing[:, None]).to(z.dtype),
            state * carry,
            input_precision=PRECISION,
        )
        segment_carry *= carry

        # What comes from the tokens of the chunk.
        if OUT is not None:
            pairs = tl.dot(x, tl.trans(y), input_precision=PRECISION)
            lag = coarse[:, None] - coarse[None, :]
            if PER_TOKEN:
                lag += fine[:, None] - fine[None, :]
            pairs *= tl.exp2(tl.where(visible, lag * rate, -float("inf"))) * scale
            out = tl.dot(pairs.to(z.dtype), z, out, input_precision=PRECISION)
            tokens = first_token + (t + i).to(tl.int64) * heads
            out_mask = in_sequence[:, None] & (dims_z < DZ)[None, :]
            tl.store(
                OUT + tokens[:, None] * DZ + dims_z[None, :],
                out.to(OUT.dtype.element_ty),
                mask=out_mask,
            )
            if PARTNER is not None:
                partner = _load_tile(ps, t, length, p_t, block * BLOCK_Z, CHUNK, DZ, BLOCK_Z, TMA)
                block_dots = DOTS + tl.num_programs(1).to(tl.int64) * length * block
                tl.store(block_dots + tokens, tl.sum(out * partner, 1), mask=in_sequence)

    if OUT is None:
        tl.store(STATES + state_offsets, state, mask=state_mask)
        if DOCUMENTS is not None:
            segment_carry = tl.where(is_one_document, segment_carry, -1.0)
        tl.store(CARRY + segment * tl.num_programs(1) + row, segment_carry)


@triton.jit(do_not_specialize=["segments"])
def state_passing_kernel(
    STATES, CARRY, segments, SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr
):
    """Turn what each segment adds into the states at the segments' edges, in place.

    ``STATES`` ``[segments + 1, batch, heads, SIZE]`` has the first state, in the direction of the
    scan, at its edge.
    """
    dims = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    rows = tl.num_programs(1).to(tl.int64)
    STATES += row * SIZE + dims
    state = tl.load(STATES + (segments if REVERSE else 0) * rows * SIZE, mask=dims < SIZE)
    for n in range(segments):
        segment = segments - 1 - n if REVERSE else n
        edge = STATES + (segment if REVERSE else segment + 1) * rows * SIZE
        carry = tl.load(CARRY + segment * rows + row)
        kept = tl.where(carry < 0.0, 0.0, state * carry)  # another document begins in the segment
        state = kept + tl.load(edge, mask=dims < SIZE)
        tl.store(edge, state, mask=dims < SIZE)


@triton.jit(do_not_specialize=["length", "chunks"])
def decay_kernel(TOKEN_DOTS, EDGE_DOTS, DOCUMENTS, OUT, heads, length, chunks, CHUNK: tl.constexpr):
    """Compute the decays' gradient in a segment of one head, from the last token to the first.

    ``TOKEN_DOTS``: ``q . dq - k . dk`` of each token, ``[batch, time, heads]``. ``EDGE_DOTS``:
    ``<S, dS>`` after each segment, ``[segments, batch, heads]``. ``OUT``: ``[batch, time, heads]``.
    """
    segment = tl.program_id(0)
    i = tl.arange(0, CHUNK)
    row = tl.program_id(1).to(tl.int64)  # of [batch, heads]
    first_token = row // heads * length * heads + row % heads  # of [batch, time, heads]
    # The gradient at the token after the chunk, for tokens of its document.
    after = tl.load(EDGE_DOTS + segment * tl.num_programs(1) + row).to(tl.float64)
    if DOCUMENTS is not None:
        DOCUMENTS += row // heads * length

    for n in range(chunks):
        t = (segment * chunks + chunks - 1 - n) * CHUNK
        in_sequence = t + i < length
        tokens = first_token + (t + i).to(tl.int64) * heads
        dots = tl.load(TOKEN_DOTS + tokens, mask=in_sequence, other=0.0)
        if DOCUMENTS is None:
            gradient = tl.sum(tl.where(i[:, None] <= i[None, :], dots[None, :], 0.0), 1) + after
            after += tl.sum(dots)
        else:
            ids = tl.load(DOCUMENTS + t + i, mask=in_sequence, other=-1)
            previous = tl.load(DOCUMENTS + tl.maximum(t + i - 1, 0), mask=in_sequence, other=-1)
            next_document = _document(DOCUMENTS, t + CHUNK, length)
            first_document = _document(DOCUMENTS, t, length)
            visible = (i[:, None] <= i[None, :]) & (ids[:, None] == ids[None, :])
            gradient = tl.sum(tl.where(visible, dots[None, :], 0.0), 1) + tl.where(
                ids == next_document, after, 0.0
            )
            # The state before a document's first token is 0, so its decay changes nothing.
            gradient = tl.where(ids == previous, gradient, 0.0)
            after = tl.where(first_document == next_document, after, 0.0) + tl.sum(
                tl.where(ids == first_document, dots, 0.0)
            )
        tl.store(OUT + tokens, gradient.to(tl.float32), mask=in_sequence)


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None
) -> str | None:
    """Return why the kernels cannot compute the call, and what can, or None if they can."""
    if reason := device_unsupported_reason(q):
        return reason
    if beta is not None:
        return "has no delta rule (beta); use fla or torch"
    if decay is not None and decay.ndim == 4:
        return "supports one decay per head, not one per key dim; use fla or torch"
    if {q.dtype, k.dtype, v.dtype} not in ({torch.float32}, {torch.float16}, {torch.bfloat16}):
        return (
            f"needs q, k and v all in bf16, fp16 or fp32, not in {q.dtype}, {k.dtype} "
            f"and {v.dtype}; use torch"
        )
    batch_heads = v.shape[0] * v.shape[2]
    if batch_heads > _MOST_HEADS:
        return (
            f"supports at most {_MOST_HEADS:,} heads in all rows of a batch, not {batch_heads:,}; "
            "use fla or torch"
        )
    largest_dim = max(q.shape[-1], v.shape[-1])
    if largest_dim > MAX_HEAD_DIM:
        return f"supports head dims up to {MAX_HEAD_DIM}, not {largest_dim}; use fla or torch"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return ``out`` ``[batch, time, heads, value_dim]`` in the dtype of ``v``, and the last state.

    The state is fp32. Both are differentiable in all tensors but ``documents``.

    Args:
        q, k: ``[batch, time, key_heads, key_dim]``; head ``h`` of ``v`` reads key head
            ``h // (heads // key_heads)``.
        v: ``[batch, time, heads, value_dim]``.
        decay: natural log, fp32, at most 0: ``[heads]`` or ``[batch, time, heads]``; None is no
            decay.
        beta: None; see :func:`unsupported_reason`.
        scale: factor of the output.
        state: fp32 ``[batch, heads, key_dim, value_dim]``, before the first token, of the first
            token's document.
        documents: int ``[batch, time]``, non-decreasing: the state starts again at each new id.
    """
    if decay is None:
        decay = torch.zeros(v.shape[2], dtype=torch.float32, device=v.device)
    return _LinearAttention.apply(q, k, v, decay, state, scale, documents)


class _LinearAttention(torch.autograd.Function):
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
        documents = None if documents is None else documents.contiguous()
        decay = decay.float().clamp(min=STRONGEST.value).contiguous()
        blocks = triton.cdiv(v.shape[3], _scan_config(q, v).block)
        segment = _segment(v.shape[1], v.shape[0] * v.shape[2] * blocks, v.device)

        scan = _Scan(decay, documents, scale, segment)
        with torch.cuda.device_of(v):
            states = scan.edge_states(k, v, state)
            out = scan.out(q, k, v, states, v.dtype)
        ctx.scale = scale
        ctx.segment = segment
        ctx.save_for_backward(q, k, v, decay, documents, states)
        return out, states[-1].clone()

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay, documents, states = ctx.saved_tensors
        # It may be one row for all tokens, which bulk copies cannot read.
        grad_out = grad_out.contiguous()
        scan = _Scan(decay, documents, ctx.scale, ctx.segment)

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
                edge_dots = (states * grad_states)[1:].sum((3, 4))
                d_decay = scan.decay_gradient(token_dots, edge_dots)
        if is_grouped:
            dq, dk = (x.unflatten(2, (q.shape[2], -1)).sum(3).to(q.dtype) for x in (dq, dk))
        return dq, dk, dv, d_decay, grad_states[0], None, None


@dataclass(frozen=True)
class _Scan:
    """The kernels' launches over the same tokens, forward and (``reverse``) back.

    ``x``, ``y`` and ``z`` are as in the module's docstring: ``[batch, time, heads, dim]``.
    """

    decay: Tensor
    documents: Tensor | None
    scale: float
    segment: int
    """Tokens of a segment."""

    def edge_states(self, y: Tensor, z: Tensor, first: Tensor, reverse: bool = False) -> Tensor:
        """Return the states at the edges of segments, from the ``first`` in the scan's direction.

        fp32 ``[segments + 1, batch, heads, key_dim, value_dim]``.
        """
        segments = triton.cdiv(z.shape[1], self.segment)
        state_size = first.shape[2] * first.shape[3]
        states = torch.empty(segments + 1, *first.shape, dtype=torch.float32, device=first.device)
        states[-1 if reverse else 0] = first
        carry = states.new_empty(segments, *first.shape[:2])
        self._launch(y, y, z, states, reverse, carry=carry)
        grid = (triton.cdiv(state_size, _PASSED), first.shape[0] * first.shape[1])
        state_passing_kernel[grid](
            states, carry, segments, SIZE=state_size, BLOCK=_PASSED, REVERSE=reverse
        )
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
        out = z.new_empty(*z.shape[:2], states.shape[2], z.shape[3], dtype=dtype)
        self._launch(x, y, z, states, reverse, transposed, partner, dots, out=out)
        return out

    def decay_gradient(self, token_dots: Tensor, edge_dots: Tensor) -> Tensor:
        """Return the gradient of the decays, in their shape. Arguments are the kernel's."""
        gradient = torch.empty_like(token_dots)
        batch, length, heads = token_dots.shape
        decay_kernel[len(edge_dots), batch * heads](
            token_dots,
            edge_dots,
            self.documents,
            gradient,
            heads,
            length,
            self.segment // _CHUNK,
            CHUNK=_CHUNK,
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
        heads = states.shape[2]
        tensors = [x, y, z] if partner is None else [x, y, z, partner]
        bulk = (
            has_bulk_copies(compute_capability(z.device))
            and z.dtype != torch.float32
            and fits_bulk_copies(*tensors)
        )
        if bulk:
            triton.set_allocator(allocate_workspace)  # of this thread: autograd has its own
        segments = triton.cdiv(z.shape[1], self.segment)
        blocks = triton.cdiv(z.shape[3], config.block)
        chunk_scan_kernel[segments * blocks, z.shape[0] * heads](
            x, y, z, partner, self.decay, self.documents, states, carry, out, dots, self.scale,
            *x.stride()[:3], *y.stride()[:3], *z.stride()[:3], *tensors[-1].stride()[:3],
            *(states.stride()[:2:-1] if transposed else states.stride()[3:]),
            heads, heads // y.shape[2], heads // z.shape[2],
            z.shape[1], self.segment // config.chunk,
            DX=x.shape[3], DZ=z.shape[3], BLOCK_X=_padded_dim(x), BLOCK_Z=config.block,
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


def _padded_dim(x: Tensor) -> int:
    return max(16, triton.next_power_of_2(x.shape[3]))


def _scan_config(x: Tensor, z: Tensor) -> ScanConfig:
    """Return the launch config; the interpreter, which has no bf16, uses that of bf16 for fp32."""
    bytes_per_number = 2 if INTERPRETED else z.element_size()
    config = scan_config(compute_capability(z.device), bytes_per_number, x.shape[3])
    return replace(config, block=min(config.block, _padded_dim(z)))


_CHUNK = 64
# A segment's states are small beside its tokens, and few enough to be passed on quickly.
_SHORTEST, _LONGEST = 512, 4096
_PROGRAMS = 4  # for each processor of the GPU
_PASSED = 1024  # numbers of a state that one program of the state passing has
_MOST_HEADS = 65535  # programs along the second axis of a launch
