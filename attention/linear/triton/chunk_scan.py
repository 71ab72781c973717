"""The chunk scan of one decay per head, or per token and head, and the passing of its states."""

import triton
import triton.language as tl

from ...triton_device import tensor_descriptor
from .pieces import load_document, load_piece, load_slots
from .tiles import load_decay_sums


@triton.jit
def _load_tile(
    tiles,
    t,
    stop,
    stride,
    first_dim,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TMA: tl.constexpr,
):
    """Load ``BLOCK`` of the ``D`` dims of tokens ``t`` to ``t + SIZE``: ``[SIZE, BLOCK]``.

    Zeros are from token ``stop`` on and beyond the last dim. ``tiles`` comes from
    ``tensor_descriptor``.
    """
    if TMA:
        x = tiles.load([t, first_dim])
    else:
        rows = tl.arange(0, SIZE)
        dims = first_dim + tl.arange(0, BLOCK)
        mask = (t + rows < stop)[:, None]
        if D % BLOCK:
            mask = mask & (dims < D)[None, :]
        x = tl.load(
            tiles + t.to(tl.int64) * stride + rows[:, None] * stride + dims[None, :],
            mask=mask,
            other=0.0,
        )
    return x


@triton.jit(do_not_specialize=["length"])
def chunk_scan_kernel(
    X,
    Y,
    Z,
    PARTNER,
    DECAY,
    SEGMENTS,
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
    x_group,
    z_group,
    batch,
    length,
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
    """Scan the chunks of a segment of one head, for ``BLOCK_Z`` of the dims of ``Z``.

    ``STATES`` are those at the segments' edges, ``[slots, heads, ...]``, fp32.

    With ``OUT``: compute it, from the segment's state in ``STATES``. Without: start from a state of
    0, store the state at the segment's end in ``STATES`` and its decay in ``CARRY`` ``[segments,
    heads]``, unless the segment's document ends there.

    With ``PARTNER``, of the shape of ``OUT``: also store the products of its rows with those of
    ``OUT``, for the block's dims, in ``DOTS``, fp32 ``[blocks of Z, batch, time, heads]``.
    """
    # What this program computes: a segment and a block of dims, of a head.
    blocks: tl.constexpr = (DZ + BLOCK_Z - 1) // BLOCK_Z
    segment = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    h = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    x_head = h // x_group
    z_head = h // z_group
    b, start, stop, before, after = load_piece(SEGMENTS, segment)
    chunks = tl.cdiv(stop - start, CHUNK)

    xs = tensor_descriptor(X + b * x_b + x_head * x_h, stop, x_t, CHUNK, DX, BLOCK_X, TMA)
    ys = tensor_descriptor(Y + b * y_b + x_head * y_h, stop, y_t, CHUNK, DX, BLOCK_X, TMA)
    zs = tensor_descriptor(Z + b * z_b + z_head * z_h, stop, z_t, CHUNK, DZ, BLOCK_Z, TMA)
    if PARTNER is not None:
        ps = tensor_descriptor(PARTNER + b * p_b + z_head * p_h, stop, p_t, CHUNK, DZ, BLOCK_Z, TMA)
    first_token = b * length * heads + h  # of [batch, time, heads]

    # The state at the segment's edge: where the scan starts, or ends if there is no OUT.
    i = tl.arange(0, CHUNK)
    dims_x = tl.arange(0, BLOCK_X)
    dims_z = block * BLOCK_Z + tl.arange(0, BLOCK_Z)
    slot = before if (OUT is None) == REVERSE else after
    edge = (slot * heads + h) * (DX * DZ)
    state_offsets = edge + dims_x[:, None] * s_x + dims_z[None, :] * s_z
    state_mask = (dims_x < DX)[:, None] & (dims_z < DZ)[None, :] & (slot >= 0)
    if OUT is None:
        state = tl.zeros([BLOCK_X, BLOCK_Z], tl.float32)
        chunks = tl.where(slot >= 0, chunks, 0)
    else:
        state = tl.load(STATES + state_offsets, mask=state_mask, other=0.0)
    segment_carry = 1.0
    # A long sum exceeds the range of fp16.
    wide: tl.constexpr = tl.bfloat16 if Y.dtype.element_ty == tl.float16 else Y.dtype.element_ty

    for n in range(chunks):
        t = start + (chunks - 1 - n if REVERSE else n) * CHUNK
        in_segment = t + i < stop
        tokens = first_token + (t + i).to(tl.int64) * heads

        # The sum of decays up to each token, in the direction of the scan, is
        # (coarse + fine) * rate; that of the whole chunk (coarse_total + fine_total) * rate.
        coarse, fine, coarse_total, fine_total, rate = load_decay_sums(
            DECAY, tokens, h, t, stop, CHUNK, PER_TOKEN
        )
        if REVERSE:
            coarse = coarse_total - coarse
            fine = fine_total - fine

        # Factors of what a token reads from the state, of the state itself over the chunk, and of
        # what a token writes to it. What passes through q, which reads in one direction and writes
        # in the other, is scaled.
        reading = tl.exp2((coarse + fine) * rate)
        carry = tl.exp2((coarse_total + fine_total) * rate)
        writing = tl.exp2((coarse_total - coarse + (fine_total - fine)) * rate)
        if REVERSE:
            writing *= scale
        else:
            reading *= scale

        # What comes from the state before the chunk, and the state after it.
        y = _load_tile(ys, t, stop, y_t, 0, CHUNK, DX, BLOCK_X, TMA)
        z = _load_tile(zs, t, stop, z_t, block * BLOCK_Z, CHUNK, DZ, BLOCK_Z, TMA)
        if OUT is not None:
            x = _load_tile(xs, t, stop, x_t, 0, CHUNK, DX, BLOCK_X, TMA)
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
            visible = i[:, None] <= i[None, :] if REVERSE else i[:, None] >= i[None, :]
            pairs = tl.dot(x, tl.trans(y), input_precision=PRECISION)
            lag = coarse[:, None] - coarse[None, :]
            if PER_TOKEN:
                lag += fine[:, None] - fine[None, :]
            pairs *= tl.exp2(tl.where(visible, lag * rate, -float("inf"))) * scale
            out = tl.dot(pairs.to(z.dtype), z, out, input_precision=PRECISION)
            out_mask = in_segment[:, None] & (dims_z < DZ)[None, :]
            tl.store(
                OUT + tokens[:, None] * DZ + dims_z[None, :],
                out.to(OUT.dtype.element_ty),
                mask=out_mask,
            )
            if PARTNER is not None:
                partner = _load_tile(ps, t, stop, p_t, block * BLOCK_Z, CHUNK, DZ, BLOCK_Z, TMA)
                block_dots = DOTS + block.to(tl.int64) * batch * length * heads
                tl.store(block_dots + tokens, tl.sum(out * partner, 1), mask=in_segment)

    if OUT is None:
        tl.store(STATES + state_offsets, state, mask=state_mask)
        tl.store(CARRY + segment * heads + h, segment_carry)


@triton.jit
def state_passing_kernel(
    STATES,
    CARRY,
    SEGMENTS,
    DOCUMENTS,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Turn what each segment of a document adds into the states at its segments' edges, in place.

    ``STATES`` ``[slots, heads, SIZE]`` has the first state, in the direction of the scan, if the
    document has one.
    """
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    document = tl.program_id(0) // blocks
    dims = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    h = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    first_segment, segments = load_document(DOCUMENTS, document)

    # The document's first state, in the direction of the scan.
    before, after = load_slots(SEGMENTS, first_segment + (segments - 1 if REVERSE else 0))
    slot = after if REVERSE else before
    state = tl.load(
        STATES + (slot * heads + h) * SIZE + dims, mask=(dims < SIZE) & (slot >= 0), other=0.0
    )

    for n in range(segments):
        segment = first_segment + (segments - 1 - n if REVERSE else n)
        before, after = load_slots(SEGMENTS, segment)
        slot = before if REVERSE else after
        edge = STATES + (slot * heads + h) * SIZE + dims
        is_kept = (dims < SIZE) & (slot >= 0)
        carry = tl.load(CARRY + segment * heads + h)
        state = state * carry + tl.load(edge, mask=is_kept, other=0.0)
        tl.store(edge, state, mask=is_kept)
