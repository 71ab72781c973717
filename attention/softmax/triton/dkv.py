"""A tile of keys with the queries that see it: the gradients of keys and values."""

import triton
import triton.language as tl

from ...triton_device import LOG2E, tensor_descriptor
from .rules import (
    BATCH_ROW,
    COLUMNS,
    K_COLUMN,
    K_LEN,
    K_START,
    KEY_RANGE,
    OFFSET,
    OFFSET_STEP,
    PART,
    PLACE,
    POSITION,
    POSITION_STEP,
    Q_LEN,
    Q_SLOT,
    Q_START,
    REACH,
    RESIDUE,
    SEQUENCE_ARGUMENTS,
    SHIFT,
    SPLIT,
    SPLITS,
    STEP,
    STOP,
    WIDTH,
    in_bands,
    in_far_rule,
    key_position,
    load_tile,
    place_field,
    products_to_logits,
    program_field,
    query_end,
    rule_field,
    store_tile,
    weights_and_gradient,
)


@triton.jit(do_not_specialize=SEQUENCE_ARGUMENTS)
def dkv_kernel(
    Q, K, V, LSE, DO, DELTA, DK, DV_OUT, TABLE, POINTERS, LISTS, PLACES, PROGRAMS,
    scale, softcap, sigmoid_bias,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, l_b, l_h,
    dk_b, dk_t, dk_h, dv_b, dv_t, dv_h, list_b, list_h, group, k_step, k_size,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BANDS: tl.constexpr, FIXED: tl.constexpr,
    FARS: tl.constexpr, FAR: tl.constexpr, LISTED: tl.constexpr, ADD: tl.constexpr,
    SOFTCAP: tl.constexpr, SIGMOID: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a tile of ``BN`` keys and values of one KV head.

    All query heads of its group follow one another. Program ids: row of ``PROGRAMS``, KV head. The
    other arguments are those of the forward kernel.

    With ``FAR`` below 0 the launch is for what the bands (or lists) show, and stores to the places
    of the keys, or with ``ADD`` adds. Otherwise it is for what the bands leave of the tiles of far
    rule ``FAR``. A sixteenth of the keys can hold most of that work, so the queries of each tile
    are shared among several programs. The sums of each go to ``[programs, kv_heads, BN, dim]``, and
    :func:`reduce_splits_kernel` adds them to the places of the keys.
    """
    # Which queries and keys.
    place = program_field(PROGRAMS, PLACE)
    tile = program_field(PROGRAMS, PART)
    q_start = place_field(PLACES, place, Q_START)
    q_len = place_field(PLACES, place, Q_LEN)
    k_start = place_field(PLACES, place, K_START)
    k_len = place_field(PLACES, place, K_LEN)
    q_slot = place_field(PLACES, place, Q_SLOT).to(tl.int64)
    k_column = place_field(PLACES, place, K_COLUMN).to(tl.int64)
    b = place_field(PLACES, place, BATCH_ROW).to(tl.int64)
    kv = tl.program_id(1).to(tl.int64)
    key_range = place_field(PLACES, place, KEY_RANGE)
    table = TABLE + (key_range * tl.num_programs(1) + kv) * (BANDS + FARS) * COLUMNS
    Q += b * q_b + kv * group * q_h + q_slot * q_t
    DO += b * g_b + kv * group * g_h + q_slot * g_t
    first_query = b * l_b + kv * group * l_h + q_slot  # in LSE and DELTA
    K += b * k_b + kv * k_h + k_column * k_t
    V += b * v_b + kv * v_h + k_column * v_t
    q_end = q_start + q_len

    # Which keys the tile has, and their first and last position.
    k_offset = tile * BN
    if FAR >= 0:
        k_offset, j0 = _stripe_tile(table, BANDS + FAR, tile, BN, k_start, FAR >= FIXED)
        j = j0 + tl.arange(0, BN)
        j_low = j0
        j_high = j0 + BN - 1
    else:
        j = key_position(k_offset + tl.arange(0, BN), k_start, k_step, k_size)
        j_low = key_position(k_offset, k_start, k_step, k_size)
        j_high = key_position(tl.minimum(k_offset + BN, k_len) - 1, k_start, k_step, k_size)
    is_key = (k_offset + tl.arange(0, BN) >= 0) & (k_offset + tl.arange(0, BN) < k_len)

    k_tiles = tensor_descriptor(K, k_len, k_t, BN, D, BLOCK_D, TMA)
    k = load_tile(K, k_tiles, k_offset, k_len, k_t, BN, D, BLOCK_D, True, TMA)
    v_tiles = tensor_descriptor(V, k_len, v_t, BN, DV, BLOCK_DV, TMA)
    v = load_tile(V, v_tiles, k_offset, k_len, v_t, BN, DV, BLOCK_DV, True, TMA)
    dk = tl.zeros([BN, BLOCK_D], tl.float32)
    dv = tl.zeros([BN, BLOCK_DV], tl.float32)

    # Which tiles of queries see the keys: `begin` to `end`, and all pairs of `full` to `full_end`
    # are visible. With lists, and for a relative rule, the tiles are not side by side: there are
    # `tiles_per_block` in each block of queries.
    full = 0
    full_end = 0
    entries = LISTS
    tiles_per_block = 1
    first_block = 0
    block_step = 0
    shift = 0
    if LISTED:
        shift = rule_field(table, 0, SHIFT)
        tiles_per_block = (1 << shift) // BM
        pointer = POINTERS + b * list_b + kv * list_h + (j_low >> shift)
        entries = LISTS + tl.load(pointer)
        begin = 0
        end = (tl.load(pointer + 1) - tl.load(pointer)) * tiles_per_block
    else:
        # Before `band_all` all keys are in the bands of a query, before `band_any` some.
        band_all = j_low
        band_any = j_low
        for band in tl.static_range(BANDS):
            band_all = tl.maximum(band_all, query_end(j_low, table, band))
            band_any = tl.maximum(band_any, query_end(j_high, table, band))
        # The same four as positions of queries.
        if FAR < 0:
            i_begin = j_low
            i_end = band_any
            i_full = j_high
            i_full_end = band_all
        else:
            i_begin = band_all
            i_end = band_all
            i_full = tl.maximum(j_high, band_any)
            i_full_end = 0
            # A tile that several fixed rules show belongs to the first, with all of its queries.
            # Another head may have more tiles than this one.
            is_mine = j0 >= 0
            for far in tl.static_range(BANDS, BANDS + FIXED):
                phase = (j0 >> rule_field(table, far, SHIFT)) % rule_field(table, far, STEP)
                shown = phase == rule_field(table, far, RESIDUE)
                shown = shown & (j0 < rule_field(table, far, STOP))
                i_end = tl.maximum(i_end, tl.where(shown, query_end(j0, table, far), 0))
                shown_whole = shown & (j_high < rule_field(table, far, STOP))
                i_full_end = tl.maximum(
                    i_full_end, tl.where(shown_whole, query_end(j0, table, far), 0)
                )
                if far < BANDS + FAR:
                    is_mine = is_mine & (shown == 0)
                if far == BANDS + FAR:
                    is_mine = is_mine & shown
            i_end = tl.where(is_mine, i_end, 0)

        # As tiles, which begin at multiples of BM in the document.
        i_begin = tl.maximum(i_begin, q_start)
        i_end = tl.minimum(i_end, q_end)
        begin = i_begin // BM
        end = tl.where(i_end > i_begin, tl.cdiv(i_end, BM), begin)
        full = tl.cdiv(tl.maximum(i_full, q_start), BM)
        full_end = tl.minimum(i_full_end, q_end) // BM

        if FAR >= FIXED:
            # A relative rule: every `block_step`-th block of queries from `first_block` on.
            shift = rule_field(table, BANDS + FAR, SHIFT)
            block_step = rule_field(table, BANDS + FAR, STEP)
            tiles_per_block = (1 << shift) // BM
            first_block = (j0 >> shift) + rule_field(table, BANDS + FAR, RESIDUE)
            last_block = tl.minimum(
                (q_end - 1) >> shift, (j0 >> shift) + rule_field(table, BANDS + FAR, REACH) - 1
            )
            blocks_before = tl.maximum(0, (i_begin >> shift) - first_block)
            first_block += tl.cdiv(blocks_before, block_step) * block_step
            begin = 0
            full_end = 0
            num_blocks = tl.maximum(0, last_block - first_block + block_step) // block_step
            end = num_blocks * tiles_per_block

    # The share of this split.
    share = tl.cdiv(end - begin, program_field(PROGRAMS, SPLITS))
    begin = begin + program_field(PROGRAMS, SPLIT) * share
    end = tl.minimum(end, begin + share)
    end = tl.maximum(begin, end)
    full = tl.minimum(tl.maximum(full, begin), end)
    full_end = tl.minimum(tl.maximum(full_end, full), end)

    for _ in range(0, group):
        q_tiles = tensor_descriptor(Q, q_len, q_t, BM, D, BLOCK_D, TMA)
        do_tiles = tensor_descriptor(DO, q_len, g_t, BM, DV, BLOCK_DV, TMA)

        # Tiles of queries that see all keys, without a mask.
        for n in range(full, full_end):
            q_offset = n * BM - q_start
            q = load_tile(Q, q_tiles, q_offset, q_len, q_t, BM, D, BLOCK_D, False, TMA)
            do = load_tile(DO, do_tiles, q_offset, q_len, g_t, BM, DV, BLOCK_DV, False, TMA)
            query_index = first_query + q_offset + tl.arange(0, BM)
            lse = tl.load(LSE + query_index) * LOG2E
            delta = tl.load(DELTA + query_index)
            dk, dv = _add_queries(
                dk, dv, q, do, lse, delta, k, v, True, scale, softcap, sigmoid_bias,
                SOFTCAP, SIGMOID, PRECISION, False,
            )  # fmt: skip

        # Those before and after them, with a mask.
        for step in range(begin, end - (full_end - full)):
            n = tl.where(step < full, step, step + full_end - full)
            i0 = n * BM
            if LISTED:
                i0 = (tl.load(entries + n // tiles_per_block) << shift) + n % tiles_per_block * BM
            elif FAR >= FIXED:
                query_block = first_block + n // tiles_per_block * block_step
                i0 = (query_block << shift) + n % tiles_per_block * BM
            q_offset = i0 - q_start
            i = (i0 + tl.arange(0, BM))[None, :]
            is_query = (q_offset + tl.arange(0, BM) >= 0) & (q_offset + tl.arange(0, BM) < q_len)
            q = load_tile(Q, q_tiles, q_offset, q_len, q_t, BM, D, BLOCK_D, True, TMA)
            do = load_tile(DO, do_tiles, q_offset, q_len, g_t, BM, DV, BLOCK_DV, True, TMA)
            query_index = first_query + q_offset + tl.arange(0, BM)
            lse = tl.load(LSE + query_index, mask=is_query, other=0.0) * LOG2E
            delta = tl.load(DELTA + query_index, mask=is_query, other=0.0)
            visible = (i >= j[:, None]) & is_query[None, :] & is_key[:, None]
            if not LISTED:
                if FAR < 0:
                    visible = visible & in_bands(i, j[:, None], table, BANDS)
                else:
                    visible = visible & (in_bands(i, j[:, None], table, BANDS) == 0)
                    visible = visible & _in_launch(i, j[:, None], table, BANDS, FIXED, FAR)
            dk, dv = _add_queries(
                dk, dv, q, do, lse, delta, k, v, visible, scale, softcap, sigmoid_bias,
                SOFTCAP, SIGMOID, PRECISION, True,
            )  # fmt: skip

        # The next query head of the group.
        Q += q_h
        DO += g_h
        first_query += l_h

    if FAR >= 0:
        # To the program's own sums.
        program = tl.program_id(0).to(tl.int64)
        DK += (program * tl.num_programs(1) + kv) * BN * D
        DV_OUT += (program * tl.num_programs(1) + kv) * BN * DV
        store_tile(DK, 0, BN, D, dk * scale, BN, D, BLOCK_D)
        store_tile(DV_OUT, 0, BN, DV, dv, BN, DV, BLOCK_DV)
    else:
        place = program_field(PROGRAMS, PLACE)
        b = place_field(PLACES, place, BATCH_ROW).to(tl.int64)
        k_column = place_field(PLACES, place, K_COLUMN).to(tl.int64)
        k_len = place_field(PLACES, place, K_LEN)
        k_offset = program_field(PROGRAMS, PART) * BN
        DK += b * dk_b + kv * dk_h + k_column * dk_t
        DV_OUT += b * dv_b + kv * dv_h + k_column * dv_t
        store_tile(DK, k_offset, k_len, dk_t, dk * scale, BN, D, BLOCK_D, ADD)
        store_tile(DV_OUT, k_offset, k_len, dv_t, dv, BN, DV, BLOCK_DV, ADD)


@triton.jit
def _stripe_tile(table, rule, tile, BN: tl.constexpr, k_start, RELATIVE: tl.constexpr):
    """Return offset and position of the ``tile``-th tile of a far rule.

    A relative rule may show any block of keys, so all of them are its tiles.
    """
    width = rule_field(table, rule, WIDTH)
    tiles_per_stripe = width // BN
    if RELATIVE:
        position = (k_start // width + tile // tiles_per_stripe) * width
        offset = position - k_start
    else:
        stripe = tile // tiles_per_stripe
        position = rule_field(table, rule, POSITION) + stripe * rule_field(
            table, rule, POSITION_STEP
        )
        offset = rule_field(table, rule, OFFSET) + stripe * rule_field(table, rule, OFFSET_STEP)
    return offset + tile % tiles_per_stripe * BN, position + tile % tiles_per_stripe * BN


@triton.jit
def _in_launch(i, j, table, BANDS: tl.constexpr, FIXED: tl.constexpr, FAR: tl.constexpr):
    """Return which pairs the launch for far rule ``FAR`` is responsible for.

    All pairs of any fixed rule; or those of a relative rule that no other rule shows.
    """
    by_fixed = i < -j - 1  # False everywhere
    for far in tl.static_range(BANDS, BANDS + FIXED):
        by_fixed = by_fixed | in_far_rule(i, j, table, far, False)
    if FAR < FIXED:
        mine = by_fixed
    else:
        mine = in_far_rule(i, j, table, BANDS + FAR, True) & (by_fixed == 0)
        for far in tl.static_range(BANDS + FIXED, BANDS + FAR):
            mine = mine & (in_far_rule(i, j, table, far, True) == 0)
    return mine


@triton.jit
def _add_queries(
    dk, dv, q, do, lse, delta, k, v, visible, scale, softcap, sigmoid_bias,
    SOFTCAP: tl.constexpr, SIGMOID: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Add what one tile of queries contributes to the gradients of the keys and values."""
    # Queries that see nothing: all weights are exp2(s - inf) = 0.
    lse = tl.where(lse == -float("inf"), float("inf"), lse)
    products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    s, slope = products_to_logits(products, scale, softcap, sigmoid_bias, SOFTCAP, SIGMOID)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    p, ds = weights_and_gradient(s, slope, dp, lse[None, :], delta[None, :], visible, SIGMOID, MASK)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def reduce_splits_kernel(
    PARTS, OUT, TABLE, PLACES, PROGRAMS, o_b, o_t, o_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BN: tl.constexpr,
    RULES: tl.constexpr, RULE: tl.constexpr, RELATIVE: tl.constexpr,
):  # fmt: skip
    """Add the splits' sums of one tile of a far rule, in order, to the places of its keys.

    ``PARTS`` ``[programs, kv_heads, BN, D]``, fp32, and ``PROGRAMS`` are those of
    :func:`dkv_kernel`, in which the splits of a tile follow one another. The first of them does the
    work here.
    """
    if program_field(PROGRAMS, SPLIT) == 0:
        place = program_field(PROGRAMS, PLACE)
        k_start = place_field(PLACES, place, K_START)
        k_len = place_field(PLACES, place, K_LEN)
        k_column = place_field(PLACES, place, K_COLUMN).to(tl.int64)
        b = place_field(PLACES, place, BATCH_ROW).to(tl.int64)
        kv = tl.program_id(1).to(tl.int64)
        key_range = place_field(PLACES, place, KEY_RANGE)
        table = TABLE + (key_range * tl.num_programs(1) + kv) * RULES * COLUMNS
        tile = program_field(PROGRAMS, PART)
        offset, _ = _stripe_tile(table, RULE, tile, BN, k_start, RELATIVE)
        OUT += b * o_b + kv * o_h + k_column * o_t
        PARTS += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + kv) * BN * D
        total = load_tile(OUT, OUT, offset, k_len, o_t, BN, D, BLOCK_D, True, False)
        for _ in range(0, program_field(PROGRAMS, SPLITS)):
            total += load_tile(PARTS, PARTS, 0, BN, D, BN, D, BLOCK_D, True, False)
            PARTS += tl.num_programs(1) * BN * D
        store_tile(OUT, offset, k_len, o_t, total, BN, D, BLOCK_D)


@triton.jit(do_not_specialize=["q_len", *SEQUENCE_ARGUMENTS])
def delta_kernel(
    OUT, DO, DLSE, DELTA, o_b, o_t, o_h, g_b, g_t, g_h, dl_b, dl_t, dl_h, l_b, l_h,
    q_len,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Compute ``sum(out * grad_out) - grad_lse`` of each query: ``[batch, queries, heads]``.

    ``DLSE`` is the gradient of the log-sum-exp, or None; ``dl`` are its strides.
    """
    tiles = tl.cdiv(q_len, BM)
    h = tl.program_id(1).to(tl.int64)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    q_offset = tl.program_id(0) % tiles * BM
    OUT += b * o_b + h * o_h
    DO += b * g_b + h * g_h
    out = load_tile(OUT, OUT, q_offset, q_len, o_t, BM, DV, BLOCK_DV, True, False)
    do = load_tile(DO, DO, q_offset, q_len, g_t, BM, DV, BLOCK_DV, True, False)
    queries = q_offset + tl.arange(0, BM)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if DLSE is not None:
        dlse = tl.load(DLSE + b * dl_b + h * dl_h + queries * dl_t, mask=queries < q_len, other=0.0)
        delta -= dlse.to(tl.float32)
    tl.store(DELTA + b * l_b + h * l_h + queries, delta, mask=queries < q_len)
