"""The scans over the chunks of a document: of the states, and in backward of their gradients."""

import triton
import triton.language as tl

from .pieces import load_document, load_piece
from .tiles import load_rows, state_tile, store_rows


@triton.jit
def _carried(state, CARRY, chunk, h, heads, D: tl.constexpr, BLOCK: tl.constexpr, BY_KEY):
    """Return the state ``[BLOCK, values]`` decayed over a chunk."""
    if BY_KEY:
        dims = tl.arange(0, BLOCK)
        carry = tl.load(CARRY + (chunk * heads + h) * D + dims, mask=dims < D, other=0.0)
        state *= carry[:, None]
    else:
        state *= tl.load(CARRY + chunk * heads + h)
    return state


@triton.jit(do_not_specialize=["length"])
def states_kernel(
    K,
    WRITING,
    V,
    INVERSE,
    READ_FACTOR,
    WRITE_FACTOR,
    CARRY,
    CHUNKS,
    DOCUMENTS,
    FIRST,
    STATES,
    WRITTEN,
    LAST,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    group,
    length,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scan the chunks of a document from the first to the last, for ``BLOCK_V`` of the value dims.

    ``K`` recalls and ``WRITING`` writes, see ``scores_kernel``; without ``WRITING``, ``K`` does
    both and has factors. With ``INVERSE``, ``WRITTEN`` ``[batch, time, heads, DV]`` becomes what
    tokens write instead of ``V``.

    ``STATES`` ``[slots, heads, D, DV]`` are those before the chunks; ``FIRST`` and ``LAST``
    ``[batch, heads, D, DV]`` those before and after each batch row.
    """
    blocks: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    document = tl.program_id(0) // blocks
    first_value = tl.program_id(0) % blocks * BLOCK_V
    h = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    first_chunk, chunks = load_document(DOCUMENTS, document)
    BY_KEY: tl.constexpr = WRITING is not None
    # A long sum exceeds the range of fp16.
    wide: tl.constexpr = STATES.dtype.element_ty

    b, start, stop, before, after = load_piece(CHUNKS, first_chunk)
    first_row = tl.where(before >= 0, b, -1)
    offsets, mask = state_tile(first_row, h, heads, 0, first_value, D, DV, BLOCK, BLOCK_V)
    state = tl.load(FIRST + offsets, mask=mask, other=0.0)
    for n in range(chunks):
        chunk = first_chunk + n
        b, start, stop, before, after = load_piece(CHUNKS, chunk)
        t = (start + tl.arange(0, CHUNK)).to(tl.int64)
        in_chunk = t < stop
        tokens = (b * length + t) * heads + h  # of [batch, time, heads]
        offsets, mask = state_tile(before, h, heads, 0, first_value, D, DV, BLOCK, BLOCK_V)
        tl.store(STATES + offsets, state.to(wide), mask=mask)

        k_rows = b * k_b + t * k_t + h // group * k_h
        v_rows = b * v_b + t * v_t + h * v_h
        z = load_rows(V, v_rows, in_chunk, first_value, DV, BLOCK_V)
        if BY_KEY:
            writing = load_rows(WRITING, tokens * D, in_chunk, 0, D, BLOCK)
        else:
            writing = load_rows(K, k_rows, in_chunk, 0, D, BLOCK)
        if INVERSE is not None:
            if BY_KEY:
                recalling = load_rows(K, k_rows, in_chunk, 0, D, BLOCK)
            else:
                recalling = writing
            recalled = tl.dot(recalling.to(wide), state.to(wide), input_precision=PRECISION)
            if not BY_KEY:
                recalled *= tl.load(READ_FACTOR + tokens, mask=in_chunk, other=0.0)[:, None]
            inverse = load_rows(INVERSE, tokens * CHUNK, in_chunk, 0, CHUNK, CHUNK)
            z = tl.dot(inverse, (z - recalled).to(inverse.dtype), input_precision=PRECISION)
            z = z.to(WRITTEN.dtype.element_ty)
            store_rows(WRITTEN, tokens * DV, in_chunk, first_value, z, DV, BLOCK_V)
        if not BY_KEY:
            factor = tl.load(WRITE_FACTOR + tokens, mask=in_chunk, other=0.0)
            z = (z * factor[:, None]).to(z.dtype)
        state = tl.dot(
            tl.trans(writing),
            z,
            _carried(state, CARRY, chunk, h, heads, D, BLOCK, BY_KEY),
            input_precision=PRECISION,
        )

    last_row = tl.where(after >= 0, b, -1)
    offsets, mask = state_tile(last_row, h, heads, 0, first_value, D, DV, BLOCK, BLOCK_V)
    tl.store(LAST + offsets, state, mask=mask)


@triton.jit(do_not_specialize=["length"])
def state_gradients_kernel(
    Q,
    K,
    WRITING,
    SCORES,
    INVERSE,
    READ_FACTOR,
    WRITE_FACTOR,
    CARRY,
    CHUNKS,
    DOCUMENTS,
    D_OUT,
    D_LAST,
    D_STATES,
    D_FIRST,
    DV_OUT,
    scale,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    group,
    length,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scan the chunks of a document from the last to the first, for ``BLOCK_V`` of the value dims.

    ``D_STATES`` ``[slots, heads, D, DV]`` are the gradients of the states after the chunks;
    ``D_LAST`` and ``D_FIRST`` those after and before each batch row. ``DV_OUT`` ``[batch, time,
    heads, DV]`` is the gradient of ``V``. Other arguments are those of the stages before.
    """
    blocks: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    document = tl.program_id(0) // blocks
    first_value = tl.program_id(0) % blocks * BLOCK_V
    h = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    first_chunk, chunks = load_document(DOCUMENTS, document)
    BY_KEY: tl.constexpr = WRITING is not None
    wide: tl.constexpr = D_STATES.dtype.element_ty

    b, start, stop, before, after = load_piece(CHUNKS, first_chunk + chunks - 1)
    last_row = tl.where(after >= 0, b, -1)
    offsets, mask = state_tile(last_row, h, heads, 0, first_value, D, DV, BLOCK, BLOCK_V)
    d_state = tl.load(D_LAST + offsets, mask=mask, other=0.0)
    for n in range(chunks):
        chunk = first_chunk + chunks - 1 - n
        b, start, stop, before, after = load_piece(CHUNKS, chunk)
        t = (start + tl.arange(0, CHUNK)).to(tl.int64)
        in_chunk = t < stop
        tokens = (b * length + t) * heads + h  # of [batch, time, heads]
        offsets, mask = state_tile(after, h, heads, 0, first_value, D, DV, BLOCK, BLOCK_V)
        tl.store(D_STATES + offsets, d_state.to(wide), mask=mask)

        # What tokens write: the gradient from their chunk's outputs, and from the state after it.
        q_rows = b * q_b + t * q_t + h // group * q_h
        k_rows = b * k_b + t * k_t + h // group * k_h
        d_out = load_rows(D_OUT, tokens * DV, in_chunk, first_value, DV, BLOCK_V)
        if BY_KEY:
            writing = load_rows(WRITING, tokens * D, in_chunk, 0, D, BLOCK)
        else:
            writing = load_rows(K, k_rows, in_chunk, 0, D, BLOCK)
        dv = tl.dot(writing.to(wide), d_state.to(wide), input_precision=PRECISION)
        if not BY_KEY:
            dv *= tl.load(WRITE_FACTOR + tokens, mask=in_chunk, other=0.0)[:, None]
        scores = load_rows(SCORES, tokens * CHUNK, in_chunk, 0, CHUNK, CHUNK)
        dv = tl.dot(tl.trans(scores), d_out.to(scores.dtype), dv, input_precision=PRECISION)
        if INVERSE is not None:
            inverse = load_rows(INVERSE, tokens * CHUNK, in_chunk, 0, CHUNK, CHUNK)
            dv = tl.dot(tl.trans(inverse), dv.to(inverse.dtype), input_precision=PRECISION)
        store_rows(DV_OUT, tokens * DV, in_chunk, first_value, dv, DV, BLOCK_V)

        # The state before the chunk.
        d_state = _carried(d_state, CARRY, chunk, h, heads, D, BLOCK, BY_KEY)
        if BY_KEY:
            factor = tl.full([CHUNK], scale, tl.float32)
        else:
            reading = tl.load(READ_FACTOR + tokens, mask=in_chunk, other=0.0)
            factor = reading * scale
        q = load_rows(Q, q_rows, in_chunk, 0, D, BLOCK)
        d_state = tl.dot(
            tl.trans(q),
            (d_out * factor[:, None]).to(q.dtype),
            d_state,
            input_precision=PRECISION,
        )
        if INVERSE is not None:
            if BY_KEY:
                recalling = load_rows(K, k_rows, in_chunk, 0, D, BLOCK)
            else:
                recalling = writing
                dv *= reading[:, None]
            d_state = tl.dot(
                tl.trans(recalling), (-dv).to(q.dtype), d_state, input_precision=PRECISION
            )

    first_row = tl.where(before >= 0, b, -1)
    offsets, mask = state_tile(first_row, h, heads, 0, first_value, D, DV, BLOCK, BLOCK_V)
    tl.store(D_FIRST + offsets, d_state, mask=mask)
