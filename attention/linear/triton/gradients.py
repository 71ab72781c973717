"""The last stages of backward: the gradients of scores, and of queries, keys, beta and decays."""

import triton
import triton.language as tl

from ...triton_device import LOG2E
from .pieces import load_piece
from .scores import join_blocks, pairs_of_blocks
from .tiles import load_decay_sums, load_rows, state_tile, store_rows


@triton.jit(do_not_specialize=["length"])
def score_gradients_kernel(
    WRITTEN,
    D_OUT,
    DV_OUT,
    CHUNKS,
    D_SCORES,
    D_RECALLS,
    w_b,
    w_t,
    w_h,
    length,
    DV: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the gradients of a chunk's scores, of its keys with its queries and with its keys.

    Without scale and beta. ``D_SCORES`` and, with the delta rule, ``D_RECALLS`` are ``[batch, time,
    heads, CHUNK]``.
    """
    h = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    b, start, stop, _, _ = load_piece(CHUNKS, tl.program_id(0))
    i = tl.arange(0, CHUNK)
    t = (start + i).to(tl.int64)
    in_chunk = t < stop
    tokens = (b * length + t) * heads + h  # of [batch, time, heads]
    written_rows = b * w_b + t * w_t + h * w_h

    d_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    d_recalls = tl.zeros([CHUNK, CHUNK], tl.float32)
    for first_value in range(0, DV, BLOCK_V):
        written = load_rows(WRITTEN, written_rows, in_chunk, first_value, DV, BLOCK_V)
        d_out = load_rows(D_OUT, tokens * DV, in_chunk, first_value, DV, BLOCK_V).to(written.dtype)
        d_scores = tl.dot(d_out, tl.trans(written), d_scores, input_precision=PRECISION)
        if D_RECALLS is not None:
            dv = load_rows(DV_OUT, tokens * DV, in_chunk, first_value, DV, BLOCK_V)
            d_recalls = tl.dot(dv, tl.trans(written), d_recalls, input_precision=PRECISION)

    d_scores = tl.where(i[:, None] >= i[None, :], d_scores, 0.0)
    store_rows(D_SCORES, tokens * CHUNK, in_chunk, 0, d_scores, CHUNK, CHUNK)
    if D_RECALLS is not None:
        d_recalls = tl.where(i[:, None] > i[None, :], -d_recalls, 0.0)
        store_rows(D_RECALLS, tokens * CHUNK, in_chunk, 0, d_recalls, CHUNK, CHUNK)


@triton.jit(do_not_specialize=["length"])
def input_gradients_kernel(
    Q,
    K,
    DECAY,
    BETA,
    WRITTEN,
    D_OUT,
    DV_OUT,
    STATES,
    D_STATES,
    D_SCORES,
    D_RECALLS,
    CHUNKS,
    DQ,
    DK,
    D_DECAY,
    D_BETA,
    scale,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    w_b,
    w_t,
    w_h,
    group,
    batch,
    length,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    BY_KEY: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute a chunk's gradients for ``BLOCK`` of the key dims.

    ``DQ`` and ``DK`` are ``[batch, time, heads, D]``, of each value head. ``D_BETA`` is ``[blocks
    of keys, batch, time, heads]``, to be summed; so is ``D_DECAY`` unless decays are ``BY_KEY``:
    then it is ``[batch, time, heads, D]``.
    """
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    chunk = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    first_key = block * BLOCK
    h = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    b, start, stop, before, after = load_piece(CHUNKS, chunk)
    i = tl.arange(0, CHUNK)
    t = (start + i).to(tl.int64)
    in_chunk = t < stop
    tokens = (b * length + t) * heads + h  # of [batch, time, heads]
    partial = block.to(tl.int64) * batch * length * heads  # of [blocks, batch, time, heads]
    wide: tl.constexpr = STATES.dtype.element_ty

    # What comes through the states before and after the chunk.
    dq = tl.zeros([CHUNK, BLOCK], tl.float32)
    dk = tl.zeros([CHUNK, BLOCK], tl.float32)  # of keys that recall
    d_writer = tl.zeros([CHUNK, BLOCK], tl.float32)  # of keys that write, multiplied by beta
    edge = tl.zeros([BLOCK], tl.float32)
    written_rows = b * w_b + t * w_t + h * w_h
    for first_value in range(0, DV, BLOCK_V):
        offsets, mask = state_tile(before, h, heads, first_key, first_value, D, DV, BLOCK, BLOCK_V)
        state = tl.load(STATES + offsets, mask=mask, other=0.0)
        d_out = load_rows(D_OUT, tokens * DV, in_chunk, first_value, DV, BLOCK_V)
        dq = tl.dot(d_out.to(wide), tl.trans(state), dq, input_precision=PRECISION)
        if BETA is not None:
            dv = load_rows(DV_OUT, tokens * DV, in_chunk, first_value, DV, BLOCK_V)
            dk = tl.dot(dv.to(wide), tl.trans(state), dk, input_precision=PRECISION)
        offsets, mask = state_tile(after, h, heads, first_key, first_value, D, DV, BLOCK, BLOCK_V)
        d_state = tl.load(D_STATES + offsets, mask=mask, other=0.0)
        written = load_rows(WRITTEN, written_rows, in_chunk, first_value, DV, BLOCK_V)
        d_writer = tl.dot(written.to(wide), tl.trans(d_state), d_writer, input_precision=PRECISION)
        edge += tl.sum(state.to(tl.float32) * d_state, 1)

    # What comes from the tokens of the chunk.
    q = load_rows(Q, b * q_b + t * q_t + h // group * q_h, in_chunk, first_key, D, BLOCK)
    k = load_rows(K, b * k_b + t * k_t + h // group * k_h, in_chunk, first_key, D, BLOCK)
    writer = k.to(tl.float32)
    if BETA is not None:
        beta = tl.load(BETA + tokens, mask=in_chunk, other=0.0)
        writer *= beta[:, None]
        d_recalls = load_rows(D_RECALLS, tokens * CHUNK, in_chunk, 0, CHUNK, CHUNK)
    d_scores = load_rows(D_SCORES, tokens * CHUNK, in_chunk, 0, CHUNK, CHUNK)
    if BY_KEY:
        decay = load_rows(DECAY, tokens * D, in_chunk, first_key, D, BLOCK) * LOG2E
        from_start = decay
        to_end = tl.zeros_like(decay)
        total = decay
        # As in scores_kernel; what goes through the states waits until these sums are complete.
        own = tl.sum(tl.where(i[:, None] == i[None, :], d_scores, 0.0).to(tl.float32), 1) * scale
        pair_dq = own[:, None] * writer
        pair_dk = tl.zeros_like(dk)
        pair_d_writer = own[:, None] * q
        for level in range(LEVELS):
            is_late = ((i >> level) % 2 == 1)[:, None]
            factor = tl.exp2(tl.where(is_late, from_start, to_end))
            is_pair = pairs_of_blocks(i, level)
            keys = tl.where(is_late, 0.0, writer * factor).to(k.dtype)
            late_q = tl.where(is_late, q * factor * scale, 0.0).to(q.dtype)
            pairs = tl.where(is_pair, d_scores, 0.0)
            d_late = tl.dot(pairs, keys, input_precision=PRECISION) * scale
            pair_dq += tl.where(is_late, d_late * factor, 0.0)
            d_early = tl.dot(tl.trans(pairs), late_q, input_precision=PRECISION)
            if BETA is not None:
                late_k = tl.where(is_late, k * factor, 0.0).to(k.dtype)
                pairs = tl.where(is_pair, d_recalls, 0.0)
                d_late = tl.dot(pairs, keys, input_precision=PRECISION)
                pair_dk += tl.where(is_late, d_late * factor, 0.0)
                d_early = tl.dot(tl.trans(pairs), late_k, d_early, input_precision=PRECISION)
            pair_d_writer += tl.where(is_late, 0.0, d_early * factor)
            from_start, to_end, total = join_blocks(from_start, to_end, total, i, level)
        reading = tl.exp2(from_start)
        dq = dq * (reading * scale)
        dk = -dk * reading
        d_writer *= tl.exp2(to_end)
        carry = tl.sum(tl.where((i == 0)[:, None], tl.exp2(total), 0.0), 0)
        edge = edge * carry + tl.sum(writer * d_writer, 0)
        dq += pair_dq
        dk += pair_dk
        d_writer += pair_d_writer
    else:
        coarse, fine, coarse_total, fine_total, rate = load_decay_sums(
            DECAY, tokens, h, start, stop, CHUNK, PER_TOKEN
        )
        reading = tl.exp2((coarse + fine) * rate)[:, None]
        dq *= reading * scale
        dk *= -reading
        d_writer *= tl.exp2((coarse_total - coarse + (fine_total - fine)) * rate)[:, None]
        carry = tl.exp2((coarse_total + fine_total) * rate)
        edge = edge * carry + tl.sum(writer * d_writer, 0)

        lag = (coarse[:, None] - coarse[None, :] + (fine[:, None] - fine[None, :])) * rate
        is_visible = i[:, None] >= i[None, :]
        pair_decays = tl.exp2(tl.where(is_visible, lag, 0.0))
        pairs = (d_scores * pair_decays * scale).to(q.dtype)
        dq = tl.dot(pairs, writer.to(k.dtype), dq, input_precision=PRECISION)
        d_writer = tl.dot(tl.trans(pairs), q, d_writer, input_precision=PRECISION)
        if BETA is not None:
            pairs = (d_recalls * pair_decays).to(k.dtype)
            dk = tl.dot(pairs, writer.to(k.dtype), dk, input_precision=PRECISION)
            d_writer = tl.dot(tl.trans(pairs), k, d_writer, input_precision=PRECISION)

    # A decay's gradient: all that later tokens read and had been written before it. See stages.py.
    if D_DECAY is not None:
        dots = q * dq + k * dk - writer * d_writer
        # The state before a document's first token is 0, so its decay changes nothing.
        has_effect = (t > start) | (before >= 0)
        if BY_KEY:
            gradient = tl.cumsum(dots, 0, reverse=True) + edge[None, :]
            gradient = tl.where(has_effect[:, None], gradient, 0.0)
            store_rows(D_DECAY, tokens * D, in_chunk, first_key, gradient, D, BLOCK)
        else:
            gradient = tl.cumsum(tl.sum(dots, 1), 0, reverse=True) + tl.sum(edge[None, :], 1)
            gradient = tl.where(has_effect, gradient, 0.0)
            tl.store(D_DECAY + partial + tokens, gradient, mask=in_chunk)

    if BETA is not None:
        tl.store(D_BETA + partial + tokens, tl.sum(k * d_writer, 1), mask=in_chunk)
        d_writer *= beta[:, None]
    store_rows(DQ, tokens * D, in_chunk, first_key, dq, D, BLOCK)
    store_rows(DK, tokens * D, in_chunk, first_key, dk + d_writer, D, BLOCK)
