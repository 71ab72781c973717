"""Linear attention with one decay per head, or per token and head, on Triton: one kernel in six roles.

With chunks of ``C`` tokens and ``G`` the running sum of the log decays in a chunk, the recurrence of
:func:`~longspan.attention.linear_attention` is, for ``X, Y, Z = q, k, v``,::

    D_ij = exp(G_i - G_j) where j <= i, else 0
    out  = ((X Y^T) * D) Z + exp(G) (X S)
    S'   = exp(G_C) S + Y^T (exp(G_C - G) Z)

Its gradients are the same formula. With ``dS`` the gradient of the state after a token, ``(dO, v, k)`` on the transposed
states give ``dq``; walked from the last token to the first, on ``dS``, ``(k, q, dO)`` give ``dv`` and ``(v, dO, q)`` give
``dk``. Such a walk sums the decays from the chunk's other end: ``G_C - G`` takes the place of ``G``.

Sequences are cut into segments, so that there are programs enough. A first launch finds what each segment adds to the
state, a second carries the state over the segments' edges, and a third has all outputs, with the states of the chunks in
registers. Only the states at the edges of segments are kept for the backward pass.

A decay's gradient is ``<dS_t, exp(g_t) S_{t-1}> = sum over s >= t of q_s . dq_s - k_s . dk_s``, of the tokens ``s`` of the same
document and segment, and ``<S, dS>`` at the segment's end for the document that goes on there.

Everything is deterministic: no atomics. Exponents are differences of decays' sums, never above 0. A document's edge is a factor
of 0, not a decay.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..softmax.triton.launch_config import MAX_HEAD_DIM
from ..triton_device import (
    INTERPRETED,
    LOG2E,
    allocate_workspace,
    compute_capability,
    device_unsupported_reason,
    fits_bulk_copies,
    tensor_descriptor,
    with_unit_stride,
)


@dataclass(frozen=True)
class ScanConfig:
    """Tokens of a chunk, dims of ``z`` that a program takes, its warps, and loads in flight."""

    chunk: int
    block: int
    warps: int
    stages: int


def shape(capability: int, bytes_per_number: int, dim: int) -> ScanConfig:
    """On a GPU of compute ``capability`` (90 for 9.0), where ``x`` and ``y`` have ``dim`` dims: registers all but suffice."""
    if bytes_per_number == 4:  # no tensor cores
        return ScanConfig(16, 16, 8, 1)
    if capability < 90:
        return ScanConfig(32, 64, 8, 3)
    return ScanConfig(64, 64, 8 if capability >= 100 else 4, 3 if dim <= 64 else 2)


# exp() is 0 in fp32 from here on: stronger decays would only take digits from the others in their sums.
STRONGEST = tl.constexpr(-104.0)
# A chunk's sums of decays have two parts: multiples of 1/256, exact in fp32, and what is left. Differences of sums are then as
# exact as if only the decays between had been added up.
COARSE = tl.constexpr(256.0)


@triton.jit
def _tile(
    tiles,
    t,
    length,
    stride,
    first,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TMA: tl.constexpr,
):
    """``BLOCK`` of the ``D`` dims of tokens ``t`` to ``t + SIZE``, zeros beyond the last token and the last dim."""
    if TMA:
        x = tiles.load([t, first])
    else:
        rows, dims = tl.arange(0, SIZE), first + tl.arange(0, BLOCK)
        inside = (t + rows < length)[:, None]
        if D % BLOCK:
            inside = inside & (dims < D)[None, :]
        x = tl.load(
            tiles + t.to(tl.int64) * stride + rows[:, None] * stride + dims[None, :],
            mask=inside,
            other=0.0,
        )
    return x


@triton.jit
def _document(DOCUMENTS, t, length):
    """Of token ``t``; before the first token the first's, behind the last token the last's."""
    return tl.load(DOCUMENTS + tl.minimum(tl.maximum(t, 0), length - 1))


@triton.jit(do_not_specialize=["length", "chunks"])
def chunk_scan_kernel(
    X,
    Y,
    Z,
    ROWS,
    DECAY,
    DOCUMENTS,
    STATES,
    CARRY,
    OUT,
    SUMS,
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
    r_b,
    r_t,
    r_h,
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
    """A segment of ``chunks`` chunks of one head, for ``BLOCK_Z`` of the dims of ``Z``.

    Without ``OUT`` from a state of 0, and the state at its end goes to ``STATES``, its decay to ``CARRY``. ``STATES`` are those
    at the segments' edges, ``[segments + 1, batch, heads, ...]``.

    With ``ROWS``, of the shape of ``OUT``, also the products of its rows with those of ``OUT``, for the block's dims: ``SUMS``,
    fp32 ``[blocks of Z, batch, time, heads]``.
    """
    blocks: tl.constexpr = (DZ + BLOCK_Z - 1) // BLOCK_Z
    segment, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row = tl.program_id(1).to(tl.int64)
    b, h = row // heads, row % heads
    x_head, z_head = h // x_group, h // z_group
    xs = tensor_descriptor(X + b * x_b + x_head * x_h, length, x_t, CHUNK, DX, BLOCK_X, TMA)
    ys = tensor_descriptor(Y + b * y_b + x_head * y_h, length, y_t, CHUNK, DX, BLOCK_X, TMA)
    zs = tensor_descriptor(Z + b * z_b + z_head * z_h, length, z_t, CHUNK, DZ, BLOCK_Z, TMA)
    if ROWS is not None:
        rs = tensor_descriptor(ROWS + b * r_b + z_head * r_h, length, r_t, CHUNK, DZ, BLOCK_Z, TMA)
    token = b * length * heads + h  # of [batch, time, heads]
    if DOCUMENTS is not None:
        DOCUMENTS += b * length

    i, dims_x, dims_z = (
        tl.arange(0, CHUNK),
        tl.arange(0, BLOCK_X),
        block * BLOCK_Z + tl.arange(0, BLOCK_Z),
    )
    edge = (
        tl.num_programs(1)
        * DX
        * DZ
        * (segment + (0 if (OUT is None) == REVERSE else 1)).to(tl.int64)
    )
    state = edge + row * DX * DZ + dims_x[:, None] * s_x + dims_z[None, :] * s_z
    held = (dims_x < DX)[:, None] & (dims_z < DZ)[None, :]
    if OUT is None:
        s = tl.zeros([BLOCK_X, BLOCK_Z], tl.float32)
    else:
        s = tl.load(STATES + state, mask=held, other=0.0)
    carried = 1.0
    rate = LOG2E if PER_TOKEN else tl.load(DECAY + h) * LOG2E
    # A long sum passes what fp16 holds.
    wide: tl.constexpr = tl.bfloat16 if Y.dtype.element_ty == tl.float16 else Y.dtype.element_ty

    for n in range(chunks):
        t = (segment * chunks + (chunks - 1 - n if REVERSE else n)) * CHUNK
        inside = t + i < length
        # The sum of decays up to each token, as the walk goes, is (at + fine) * rate.
        if PER_TOKEN:
            decay = tl.load(DECAY + token + (t + i).to(tl.int64) * heads, mask=inside, other=0.0)
            decay = tl.maximum(decay, STRONGEST)
            coarse = tl.floor(decay * COARSE) / COARSE
            at, fine = tl.cumsum(coarse, 0), tl.cumsum(decay - coarse, 0)
            whole, whole_fine = tl.sum(coarse, 0), tl.sum(decay - coarse, 0)
        else:
            whole, whole_fine = tl.maximum(tl.minimum(length - t, CHUNK), 0).to(tl.float32), 0.0
            at, fine = tl.minimum(i + 1.0, whole), 0.0
        if REVERSE:
            at, fine = whole - at, whole_fine - fine
        reading, carry = tl.exp2((at + fine) * rate), tl.exp2((whole + whole_fine) * rate)
        writing = tl.exp2((whole - at + (whole_fine - fine)) * rate)
        seen = i[:, None] <= i[None, :] if REVERSE else i[:, None] >= i[None, :]
        if DOCUMENTS is not None:
            ids = tl.load(DOCUMENTS + t + i, mask=inside, other=-1)
            before = _document(DOCUMENTS, t + CHUNK if REVERSE else t - 1, length)
            last = _document(DOCUMENTS, t if REVERSE else t + CHUNK - 1, length)
            reading = tl.where(ids == before, reading, 0.0)
            writing = tl.where(ids == last, writing, 0.0)
            carry = tl.where(before == last, carry, 0.0)
            seen = seen & (ids[:, None] == ids[None, :])
        # What passes through q, the reader in the one walk and the writer in the other, is scaled.
        if REVERSE:
            writing *= scale
        else:
            reading *= scale

        y = _tile(ys, t, length, y_t, 0, CHUNK, DX, BLOCK_X, TMA)
        z = _tile(zs, t, length, z_t, block * BLOCK_Z, CHUNK, DZ, BLOCK_Z, TMA)
        if OUT is not None:
            x = _tile(xs, t, length, x_t, 0, CHUNK, DX, BLOCK_X, TMA)
            out = tl.dot(x.to(wide), s.to(wide), input_precision=PRECISION) * reading[:, None]
        s = tl.dot(
            tl.trans(y), (z * writing[:, None]).to(z.dtype), s * carry, input_precision=PRECISION
        )
        carried *= carry
        if OUT is not None:
            pairs = tl.dot(x, tl.trans(y), input_precision=PRECISION)
            lag = at[:, None] - at[None, :]
            if PER_TOKEN:
                lag += fine[:, None] - fine[None, :]
            pairs *= tl.exp2(tl.where(seen, lag * rate, -float("inf"))) * scale
            out = tl.dot(pairs.to(z.dtype), z, out, input_precision=PRECISION)
            to = token + (t + i).to(tl.int64) * heads
            kept = inside[:, None] & (dims_z < DZ)[None, :]
            tl.store(
                OUT + to[:, None] * DZ + dims_z[None, :], out.to(OUT.dtype.element_ty), mask=kept
            )
            if ROWS is not None:
                rows = _tile(rs, t, length, r_t, block * BLOCK_Z, CHUNK, DZ, BLOCK_Z, TMA)
                of_block = SUMS + tl.num_programs(1).to(tl.int64) * length * block
                tl.store(of_block + to, tl.sum(out * rows, 1), mask=inside)

    if OUT is None:
        tl.store(STATES + state, s, mask=held)
        tl.store(CARRY + segment * tl.num_programs(1) + row, carried)


@triton.jit(do_not_specialize=["segments"])
def state_passing_kernel(
    STATES, CARRY, segments, SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr
):
    """From what each segment adds the states at the edges of segments, in place, by the one that the walk begins with."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, rows = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    STATES += row * SIZE + at
    state = tl.load(STATES + (segments if REVERSE else 0) * rows * SIZE, mask=at < SIZE)
    for n in range(segments):
        segment = segments - 1 - n if REVERSE else n
        edge = STATES + (segment if REVERSE else segment + 1) * rows * SIZE
        state = state * tl.load(CARRY + segment * rows + row) + tl.load(edge, mask=at < SIZE)
        tl.store(edge, state, mask=at < SIZE)


@triton.jit(do_not_specialize=["length", "chunks"])
def decay_kernel(SUMS, EDGES, DOCUMENTS, OUT, heads, length, chunks, CHUNK: tl.constexpr):
    """The decays' gradient in a segment of one head, from the last token to the first.

    ``SUMS``: ``q . dq - k . dk`` of each token, ``[batch, time, heads]``; ``EDGES``: ``<S, dS>`` behind each segment.
    """
    segment, i = tl.program_id(0), tl.arange(0, CHUNK)
    row = tl.program_id(1).to(tl.int64)
    token = row // heads * length * heads + row % heads
    since = tl.load(EDGES + segment * tl.num_programs(1) + row).to(
        tl.float64
    )  # at the token behind the chunk
    if DOCUMENTS is not None:
        DOCUMENTS += row // heads * length
    for n in range(chunks):
        t = (segment * chunks + chunks - 1 - n) * CHUNK
        inside = t + i < length
        at = token + (t + i).to(tl.int64) * heads
        sums = tl.load(SUMS + at, mask=inside, other=0.0)
        if DOCUMENTS is None:
            gradient = tl.sum(tl.where(i[:, None] <= i[None, :], sums[None, :], 0.0), 1) + since
            since += tl.sum(sums)
        else:
            ids = tl.load(DOCUMENTS + t + i, mask=inside, other=-1)
            previous = tl.load(DOCUMENTS + tl.maximum(t + i - 1, 0), mask=inside, other=-1)
            behind, first = _document(DOCUMENTS, t + CHUNK, length), _document(DOCUMENTS, t, length)
            seen = (i[:, None] <= i[None, :]) & (ids[:, None] == ids[None, :])
            gradient = tl.sum(tl.where(seen, sums[None, :], 0.0), 1) + tl.where(
                ids == behind, since, 0.0
            )
            gradient = tl.where(
                ids == previous, gradient, 0.0
            )  # the state before a document's first token is 0
            since = tl.where(first == behind, since, 0.0) + tl.sum(
                tl.where(ids == first, sums, 0.0)
            )
        tl.store(OUT + at, gradient.to(tl.float32), mask=inside)


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None
) -> str | None:
    """What it cannot do, and what can."""
    if reason := device_unsupported_reason(q):
        return reason
    if beta is not None:
        return "has no delta rule (beta); use fla or torch"
    if decay is not None and decay.ndim == 4:
        return "takes one decay per head, not one per key dim; use fla or torch"
    if {q.dtype, k.dtype, v.dtype} not in ({torch.float32}, {torch.float16}, {torch.bfloat16}):
        return f"takes q, k and v all in bf16, fp16 or fp32, not in {q.dtype}, {k.dtype} and {v.dtype}; use torch"
    if v.shape[0] * v.shape[2] > _MOST_HEADS:
        return f"takes at most {_MOST_HEADS:,} heads in all rows of a batch, not {v.shape[0] * v.shape[2]:,}; use fla or torch"
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        return f"takes head dims up to {MAX_HEAD_DIM}, not {max(q.shape[-1], v.shape[-1])}; use fla or torch"
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: None,
    scale: float,
    state: Tensor,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``out [batch, time, heads, value_dim]`` in the dtype of ``v``, and the state after the last token, fp32.

    Args:
        q, k: ``[batch, time, key_heads, key_dim]``; head ``h`` of ``v`` reads key head ``h // (heads // key_heads)``.
        v: ``[batch, time, heads, value_dim]``.
        decay: natural log, fp32, at most 0: ``[heads]`` or ``[batch, time, heads]``; None is no decay.
        beta: none; see :func:`unsupported_reason`.
        scale: of the output.
        state: fp32 ``[batch, heads, key_dim, value_dim]``, before the first token, of the first token's document.
        documents: int ``[batch, time]``, non-decreasing: the state starts again at each new id.

    Differentiable in all tensors but ``documents``.
    """
    if decay is None:
        decay = torch.zeros(v.shape[2], dtype=torch.float32, device=v.device)
    return _Linear.apply(q, k, v, decay, state, scale, documents)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, decay, state, scale, documents):
        q, k, v = map(with_unit_stride, (q, k, v))
        documents = None if documents is None else documents.contiguous()
        segment = _segment(
            v.shape[1],
            v.shape[0] * v.shape[2] * triton.cdiv(v.shape[3], _size(q, v).block),
            v.device,
        )
        walks = _Walks(
            decay.float().clamp(min=STRONGEST.value).contiguous(), documents, scale, segment
        )
        with torch.cuda.device_of(v):
            states = walks.states(k, v, state)
            out = walks.out(q, k, v, states, v.dtype)
        ctx.scale, ctx.segment = scale, segment
        ctx.save_for_backward(q, k, v, walks.decay, documents, states)
        return out, states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_state):
        q, k, v, decay, documents, states = ctx.saved_tensors
        grad_out = (
            grad_out.contiguous()
        )  # it may be one row for all tokens, which bulk copies cannot take
        walks = _Walks(decay, documents, ctx.scale, ctx.segment)
        grouped, of_rows, of_decay = q.shape[2] < v.shape[2], {"q": {}, "k": {}}, None
        if ctx.needs_input_grad[3]:
            blocks = triton.cdiv(k.shape[3], _size(v, k).block)
            sums = [
                torch.empty(blocks, *v.shape[:3], dtype=torch.float32, device=v.device)
                for _ in "qk"
            ]
            of_rows = {"q": {"rows": q, "sums": sums[0]}, "k": {"rows": k, "sums": sums[1]}}
        dtype = torch.float32 if grouped else q.dtype
        with torch.cuda.device_of(v):
            grads = walks.states(q, grad_out, grad_state, reverse=True)
            dq = walks.out(grad_out, v, k, states, dtype, transposed=True, **of_rows["q"])
            dk = walks.out(
                v, grad_out, q, grads, dtype, transposed=True, reverse=True, **of_rows["k"]
            )
            dv = walks.out(k, q, grad_out, grads, v.dtype, reverse=True)
            if ctx.needs_input_grad[3]:
                of_decay = walks.decay_gradient(
                    (sums[0] - sums[1]).sum(0), (states * grads)[1:].sum((3, 4))
                )
        if grouped:
            dq, dk = (x.unflatten(2, (q.shape[2], -1)).sum(3).to(q.dtype) for x in (dq, dk))
        return dq, dk, dv, of_decay, grads[0], None, None


@dataclass(frozen=True)
class _Walks:
    """The kernels' launches over the same tokens, forward and (``reverse``) back."""

    decay: Tensor
    documents: Tensor | None
    scale: float
    segment: int
    """Tokens in each."""

    def states(self, y: Tensor, z: Tensor, first: Tensor, reverse: bool = False) -> Tensor:
        """At the edges of segments: fp32 ``[segments + 1, batch, heads, key_dim, value_dim]``, ``first`` among them."""
        segments, dims = triton.cdiv(z.shape[1], self.segment), first.shape[2] * first.shape[3]
        states = torch.empty(segments + 1, *first.shape, dtype=torch.float32, device=first.device)
        states[-1 if reverse else 0] = first
        carry = states.new_empty(segments, *first.shape[:2])
        self._launch(y, y, z, states, reverse, carry=carry)
        grid = triton.cdiv(dims, _CARRIED), first.shape[0] * first.shape[1]
        state_passing_kernel[grid](
            states, carry, segments, SIZE=dims, BLOCK=_CARRIED, REVERSE=reverse
        )
        return states

    def out(
        self, x, y, z, states, dtype, transposed=False, reverse=False, **of_rows: Tensor
    ) -> Tensor:
        """``[batch, time, heads, dim of z]``, from the states at the edges; ``transposed`` where ``x`` are values."""
        out = z.new_empty(*z.shape[:2], states.shape[2], z.shape[3], dtype=dtype)
        self._launch(x, y, z, states, reverse, transposed, out=out, **of_rows)
        return out

    def decay_gradient(self, sums: Tensor, edges: Tensor) -> Tensor:
        """Of the shape of the decays. Arguments as of the kernel."""
        gradient, (batch, length, heads) = torch.empty_like(sums), sums.shape
        decay_kernel[len(edges), batch * heads](
            sums,
            edges,
            self.documents,
            gradient,
            heads,
            length,
            self.segment // _CHUNK,
            CHUNK=_CHUNK,
        )
        return gradient if self.decay.ndim == 3 else gradient.sum((0, 1))

    def _launch(
        self, x, y, z, states, reverse, transposed=False, rows=None, sums=None, out=None, carry=None
    ) -> None:
        size, heads = _size(x, z), states.shape[2]
        tensors = [x, y, z] if rows is None else [x, y, z, rows]
        bulk = (
            compute_capability(z.device) >= 90
            and z.dtype != torch.float32
            and fits_bulk_copies(*tensors)
        )
        if bulk:
            triton.set_allocator(allocate_workspace)  # of this thread: autograd has its own
        blocks = triton.cdiv(z.shape[1], self.segment) * triton.cdiv(z.shape[3], size.block)
        chunk_scan_kernel[blocks, z.shape[0] * heads](
            x, y, z, rows, self.decay, self.documents, states, carry, out, sums, self.scale,
            *x.stride()[:3], *y.stride()[:3], *z.stride()[:3], *tensors[-1].stride()[:3],
            *(states.stride()[:2:-1] if transposed else states.stride()[3:]),
            heads, heads // y.shape[2], heads // z.shape[2], z.shape[1], self.segment // size.chunk,
            DX=x.shape[3], DZ=z.shape[3], BLOCK_X=_padded(x), BLOCK_Z=size.block, CHUNK=size.chunk,
            PER_TOKEN=self.decay.ndim == 3, REVERSE=reverse, TMA=bulk, PRECISION="ieee" if z.dtype == torch.float32 else "tf32",
            num_warps=size.warps, num_stages=size.stages,
        )  # fmt: skip


def _segment(length: int, programs: int, device: torch.device) -> int:
    """Tokens of a segment, so that with ``programs`` for each the GPU has enough of them."""
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )
    tokens = triton.cdiv(length * programs, _PROGRAMS * processors)
    return triton.cdiv(min(max(tokens, _SHORTEST), _LONGEST), _CHUNK) * _CHUNK


def _padded(x: Tensor) -> int:
    return max(16, triton.next_power_of_2(x.shape[3]))


def _size(x: Tensor, z: Tensor) -> ScanConfig:
    """The launch shape; the interpreter, which has no bf16, takes that of bf16 for fp32."""
    found = shape(compute_capability(z.device), 2 if INTERPRETED else z.element_size(), x.shape[3])
    return replace(found, block=min(found.block, _padded(z)))


_CHUNK = 64
# A segment's states are small beside its tokens, and few enough to be carried over quickly.
_SHORTEST, _LONGEST = 512, 4096
_PROGRAMS = 4  # for each processor of the GPU
_CARRIED = 1024  # numbers of a state in one program
_MOST_HEADS = 65535  # programs along the second axis of a launch
