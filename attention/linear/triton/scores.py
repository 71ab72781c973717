"""The first stage: what the tokens of a chunk have to do with each other, and with its edges."""

import triton
import triton.language as tl

from ...triton_device import LOG2E
from .inverse import unit_lower_inverse
from .pieces import load_piece
from .tiles import load_decay_sums, load_rows, store_rows


@triton.jit
def join_blocks(from_start, to_end, total, i, level):
    """Return the sums of decays in pairs of blocks from those in blocks of ``1 << level`` tokens.

    All are ``[tokens, dims]``: the sum from the block's start up to each token, that of what comes
    after it in the block, and the block's. They are only ever added up: a difference of two sums
    would lose the small decays beside strong ones.
    """
    is_late = ((i >> level) % 2 == 1)[:, None]
    neighbor = tl.gather(total, (i ^ (1 << level))[:, None] + tl.zeros_like(total).to(tl.int32), 0)
    from_start = tl.where(is_late, from_start + neighbor, from_start)
    to_end = tl.where(is_late, to_end, to_end + neighbor)
    return from_start, to_end, total + neighbor


@triton.jit
def pairs_of_blocks(i, level):
    """Return which pairs of a chunk's tokens meet between two blocks of ``1 << level``.

    bool ``[tokens, tokens]``: the row is in the later block, the column in the earlier one.
    """
    block = i >> level
    return (block[:, None] == block[None, :] + 1) & (block % 2 == 1)[:, None]


@triton.jit(do_not_specialize=["length"])
def scores_kernel(
    Q,
    K,
    DECAY,
    BETA,
    CHUNKS,
    SCORES,
    INVERSE,
    QUERIES,
    RECALLING,
    WRITING,
    READ_FACTOR,
    WRITE_FACTOR,
    CARRY,
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
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    BY_KEY: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the scores of a chunk of one head, and factors of its decays.

    ``SCORES`` ``[batch, time, heads, CHUNK]`` are those of the outputs, scaled. With ``BETA``,
    ``INVERSE``, of the same shape, is the delta rule's ``T``.

    With decays ``BY_KEY``: ``QUERIES`` and ``RECALLING`` are queries and keys decayed from the
    chunk's start, and ``WRITING`` keys decayed to its end and multiplied by beta, each ``[batch,
    time, heads, D]``; ``CARRY`` ``[chunks, heads, D]`` is the state's decay. Without: they are
    factors of a token, ``READ_FACTOR`` and ``WRITE_FACTOR`` ``[batch, time, heads]``, and ``CARRY``
    ``[chunks, heads]``.
    """
    chunk = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    b, start, stop, _, _ = load_piece(CHUNKS, chunk)
    i = tl.arange(0, CHUNK)
    t = (start + i).to(tl.int64)
    in_chunk = t < stop
    tokens = (b * length + t) * heads + h  # of [batch, time, heads]
    q_rows = b * q_b + t * q_t + h // group * q_h
    k_rows = b * k_b + t * k_t + h // group * k_h
    if BETA is not None:
        beta = tl.load(BETA + tokens, mask=in_chunk, other=0.0)

    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    recalls = tl.zeros([CHUNK, CHUNK], tl.float32)
    is_same = i[:, None] == i[None, :]
    for first_dim in range(0, D, BLOCK):
        q = load_rows(Q, q_rows, in_chunk, first_dim, D, BLOCK)
        k = load_rows(K, k_rows, in_chunk, first_dim, D, BLOCK)
        if BY_KEY:
            decay = load_rows(DECAY, tokens * D, in_chunk, first_dim, D, BLOCK) * LOG2E
            scores += tl.where(is_same, tl.sum(q.to(tl.float32) * k, 1)[:, None], 0.0)
            from_start = decay
            to_end = tl.zeros_like(decay)
            total = decay
            for level in range(LEVELS):
                # A later row and an earlier key are decayed by what lies between each of them and
                # the edge of their blocks.
                is_late = ((i >> level) % 2 == 1)[:, None]
                factor = tl.exp2(tl.where(is_late, from_start, to_end))
                keys = tl.where(is_late, 0.0, k * factor).to(k.dtype)
                is_pair = pairs_of_blocks(i, level)
                late_q = tl.where(is_late, q * factor, 0.0).to(q.dtype)
                pairs = tl.dot(late_q, tl.trans(keys), input_precision=PRECISION)
                scores += tl.where(is_pair, pairs, 0.0)
                if BETA is not None:
                    late_k = tl.where(is_late, k * factor, 0.0).to(k.dtype)
                    pairs = tl.dot(late_k, tl.trans(keys), input_precision=PRECISION)
                    recalls += tl.where(is_pair, pairs, 0.0)
                from_start, to_end, total = join_blocks(from_start, to_end, total, i, level)

            decayed = tl.exp2(from_start)
            writing = k * tl.exp2(to_end)
            if BETA is not None:
                writing *= beta[:, None]
                store_rows(RECALLING, tokens * D, in_chunk, first_dim, k * decayed, D, BLOCK)
            store_rows(QUERIES, tokens * D, in_chunk, first_dim, q * decayed, D, BLOCK)
            store_rows(WRITING, tokens * D, in_chunk, first_dim, writing, D, BLOCK)
            carry_row = (chunk * heads + h) * D + tl.zeros_like(t)  # of all tokens
            store_rows(CARRY, carry_row, i == 0, first_dim, tl.exp2(total), D, BLOCK)
        else:
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
            if BETA is not None:
                recalls = tl.dot(k, tl.trans(k), recalls, input_precision=PRECISION)

    if not BY_KEY:
        coarse, fine, coarse_total, fine_total, rate = load_decay_sums(
            DECAY, tokens, h, start, stop, CHUNK, PER_TOKEN
        )
        writing = tl.exp2((coarse_total - coarse + (fine_total - fine)) * rate)
        if BETA is not None:
            writing *= beta
        tl.store(READ_FACTOR + tokens, tl.exp2((coarse + fine) * rate), mask=in_chunk)
        tl.store(WRITE_FACTOR + tokens, writing, mask=in_chunk)
        tl.store(CARRY + chunk * heads + h, tl.exp2((coarse_total + fine_total) * rate))
        lag = (coarse[:, None] - coarse[None, :] + (fine[:, None] - fine[None, :])) * rate
        is_visible = i[:, None] >= i[None, :]
        pair_decays = tl.exp2(tl.where(is_visible, lag, 0.0))
        scores = tl.where(is_visible, scores * pair_decays, 0.0)
        if BETA is not None:
            recalls = tl.where(is_visible & ~is_same, recalls * pair_decays, 0.0)

    scores *= scale
    if BETA is not None:
        scores *= beta[None, :]
        inverse = unit_lower_inverse(recalls * beta[None, :], CHUNK, LEVELS - 4)
        store_rows(INVERSE, tokens * CHUNK, in_chunk, 0, inverse, CHUNK, CHUNK)
    store_rows(SCORES, tokens * CHUNK, in_chunk, 0, scores, CHUNK, CHUNK)
