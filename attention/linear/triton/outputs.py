"""The last stage of forward: the outputs of each chunk."""

import triton
import triton.language as tl

from .pieces import load_piece
from .tiles import load_rows, state_tile, store_rows


@triton.jit(do_not_specialize=["length"])
def outputs_kernel(
    Q,
    WRITTEN,
    SCORES,
    READ_FACTOR,
    CHUNKS,
    STATES,
    OUT,
    scale,
    q_b,
    q_t,
    q_h,
    w_b,
    w_t,
    w_h,
    group,
    length,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute ``OUT`` ``[batch, time, heads, DV]`` of a chunk, for ``BLOCK_V`` of its dims.

    ``Q`` are decayed from the chunk's start, or have a ``READ_FACTOR``. ``WRITTEN`` is what tokens
    write, ``V`` or with the delta rule what ``states_kernel`` makes of it.
    """
    blocks: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    chunk = tl.program_id(0) // blocks
    first_value = tl.program_id(0) % blocks * BLOCK_V
    h = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    b, start, stop, before, _ = load_piece(CHUNKS, chunk)
    t = (start + tl.arange(0, CHUNK)).to(tl.int64)
    in_chunk = t < stop
    tokens = (b * length + t) * heads + h  # of [batch, time, heads]
    q_rows = b * q_b + t * q_t + h // group * q_h
    wide: tl.constexpr = STATES.dtype.element_ty

    out = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    for first_key in range(0, D, BLOCK):
        q = load_rows(Q, q_rows, in_chunk, first_key, D, BLOCK)
        offsets, mask = state_tile(before, h, heads, first_key, first_value, D, DV, BLOCK, BLOCK_V)
        state = tl.load(STATES + offsets, mask=mask, other=0.0)
        out = tl.dot(q.to(wide), state, out, input_precision=PRECISION)
    if READ_FACTOR is not None:
        out *= tl.load(READ_FACTOR + tokens, mask=in_chunk, other=0.0)[:, None]
    out *= scale

    written_rows = b * w_b + t * w_t + h * w_h
    written = load_rows(WRITTEN, written_rows, in_chunk, first_value, DV, BLOCK_V)
    scores = load_rows(SCORES, tokens * CHUNK, in_chunk, 0, CHUNK, CHUNK)
    out = tl.dot(scores, written, out, input_precision=PRECISION)
    store_rows(OUT, tokens * DV, in_chunk, first_value, out, DV, BLOCK_V)
