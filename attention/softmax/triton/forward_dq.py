"""A tile of queries with the keys that it sees: the forward pass, and the queries' gradient."""

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
    RESIDUE,
    SEQUENCE_ARGUMENTS,
    SHIFT,
    STEP,
    STOP,
    UNLIMITED,
    WIDTH,
    first_key,
    in_bands,
    in_far_rule,
    key_position,
    keys_before,
    load_tile,
    place_field,
    products_to_logits,
    program_field,
    rule_field,
    store_tile,
    weights_and_gradient,
)


@triton.jit
def _visit(
    acc, m, l, q, do, lse, delta, k, v, visible, scale, softcap, sigmoid_bias,
    GRAD: tl.constexpr, SOFTCAP: tl.constexpr, SIGMOID: tl.constexpr, PRECISION: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the online softmax, or with ``GRAD`` to dQ.

    ``acc`` is the output, or dQ; ``m`` is the maximum of each query's logits, ``l`` the sum of its
    weights.
    """
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    s, slope = products_to_logits(products, scale, softcap, sigmoid_bias, SOFTCAP, SIGMOID)
    if GRAD:
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        p, ds = weights_and_gradient(
            s, slope, dp, lse[:, None], delta[:, None], visible, SIGMOID, MASK
        )
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    elif SIGMOID:
        p = tl.sigmoid(s)
        if MASK:
            p = tl.where(visible, p, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    else:
        if MASK:
            s = tl.where(visible, s, -float("inf"))
        new_m = tl.maximum(m, tl.max(s, 1))
        # A query that has seen nothing yet: no NaN from inf - inf.
        base = tl.where(new_m == -float("inf"), 0.0, new_m) if MASK else new_m
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(m - base)
        l = l * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m = new_m
    return acc, m, l


@triton.jit(do_not_specialize=[*SEQUENCE_ARGUMENTS, "list_q"])
def forward_dq_kernel(
    Q, K, V, OUT, LSE, DO, DELTA, TABLE, LISTS, PLACES, PROGRAMS, scale, softcap, sigmoid_bias,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h, g_b, g_t, g_h, l_b, l_h,
    list_b, list_h, list_q, group, k_step, k_size,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BANDS: tl.constexpr, FIXED: tl.constexpr,
    FARS: tl.constexpr, LISTED: tl.constexpr, GRAD: tl.constexpr, ADD: tl.constexpr,
    SOFTCAP: tl.constexpr, SIGMOID: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute output and log-sum-exp, or with ``GRAD`` dQ, of a tile of ``BM`` queries of one head.

    With ``ADD`` these are merged with, or added to, what is there.

    Program ids: row of ``PROGRAMS``, head. ``OUT`` is the output or dQ. Arguments ``x_b``, ``x_t``,
    ``x_h`` are the strides of a tensor's batch, time and heads (``g`` for ``DO``, ``l`` for ``LSE``
    and ``DELTA``, of which a head's queries are side by side). The key tiles have ``BN`` keys. The
    table has ``BANDS`` bands and ``FARS`` far rules, of which the first ``FIXED`` have fixed
    stripes.
    """
    # Which queries and keys.
    place = program_field(PROGRAMS, PLACE)
    q_start = place_field(PLACES, place, Q_START)
    q_len = place_field(PLACES, place, Q_LEN)
    k_start = place_field(PLACES, place, K_START)
    k_len = place_field(PLACES, place, K_LEN)
    q_slot = place_field(PLACES, place, Q_SLOT).to(tl.int64)
    k_column = place_field(PLACES, place, K_COLUMN).to(tl.int64)
    b = place_field(PLACES, place, BATCH_ROW).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    kv = h // group
    key_range = place_field(PLACES, place, KEY_RANGE)
    table = TABLE + (key_range * (tl.num_programs(1) // group) + kv) * (BANDS + FARS) * COLUMNS
    Q += b * q_b + h * q_h + q_slot * q_t
    K += b * k_b + kv * k_h + k_column * k_t
    V += b * v_b + kv * v_h + k_column * v_t
    OUT += b * o_b + h * o_h + q_slot * o_t
    DO += b * g_b + h * g_h + q_slot * g_t

    # Tiles begin at multiples of BM in the document.
    i0 = q_start - q_start % BM + program_field(PROGRAMS, PART) * BM
    q_offset = i0 - q_start  # below 0 if q_start is inside the tile
    i = i0 + tl.arange(0, BM)
    i_low = tl.maximum(i0, q_start)
    i_high = tl.minimum(i0 + BM, q_start + q_len) - 1
    is_query = (q_offset + tl.arange(0, BM) >= 0) & (q_offset + tl.arange(0, BM) < q_len)

    # Load what belongs to the queries.
    q_tiles = tensor_descriptor(Q, q_len, q_t, BM, D, BLOCK_D, TMA)
    q = load_tile(Q, q_tiles, q_offset, q_len, q_t, BM, D, BLOCK_D, True, TMA)
    k_tiles = tensor_descriptor(K, k_len, k_t, BN, D, BLOCK_D, TMA)
    v_tiles = tensor_descriptor(V, k_len, v_t, BN, DV, BLOCK_DV, TMA)
    lse_index = b * l_b + h * l_h + q_slot + q_offset + tl.arange(0, BM)
    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    do, lse, delta = q, m, l  # unused by the forward pass
    if GRAD:
        do_tiles = tensor_descriptor(DO, q_len, g_t, BM, DV, BLOCK_DV, TMA)
        do = load_tile(DO, do_tiles, q_offset, q_len, g_t, BM, DV, BLOCK_DV, True, TMA)
        lse = tl.load(LSE + lse_index, mask=is_query, other=float("inf")) * LOG2E
        # Queries that see nothing: all weights are exp2(s - inf) = 0.
        lse = tl.where(lse == -float("inf"), float("inf"), lse)
        delta = tl.load(DELTA + lse_index, mask=is_query, other=0.0)
        acc = tl.zeros([BM, BLOCK_D], tl.float32)
    elif ADD:
        # The online softmax goes on where earlier keys have left it.
        acc = load_tile(OUT, OUT, q_offset, q_len, o_t, BM, DV, BLOCK_DV, True, False)
        acc = acc.to(tl.float32)
        if not SIGMOID:
            m = tl.load(LSE + lse_index, mask=is_query, other=-float("inf")) * LOG2E
            l = tl.where(m == -float("inf"), 0.0, 1.0)
    else:
        acc = tl.zeros([BM, BLOCK_DV], tl.float32)

    # Block lists: the list of the query block has its length, then the key blocks.
    if LISTED:
        shift = rule_field(table, 0, SHIFT)
        query_block = i_low >> shift
        tiles_per_block = (1 << shift) // BN
        entry = LISTS + b * list_b + kv * list_h + query_block * list_q
        for n in range(0, tl.load(entry) * tiles_per_block):
            j0 = (tl.load(entry + 1 + n // tiles_per_block) << shift) + n % tiles_per_block * BN
            k_offset = j0 - k_start
            k = load_tile(K, k_tiles, k_offset, k_len, k_t, BN, D, BLOCK_D, True, TMA)
            v = load_tile(V, v_tiles, k_offset, k_len, v_t, BN, DV, BLOCK_DV, True, TMA)
            j = j0 + tl.arange(0, BN)
            is_key = (k_offset + tl.arange(0, BN) >= 0) & (k_offset + tl.arange(0, BN) < k_len)
            visible = (i[:, None] >= j[None, :]) & is_key[None, :]
            acc, m, l = _visit(
                acc, m, l, q, do, lse, delta, k, v, visible, scale, softcap, sigmoid_bias,
                GRAD, SOFTCAP, SIGMOID, PRECISION, True,
            )  # fmt: skip

    # The bands show the keys from `band_start` on to some query, and those from `full_band_start`
    # on to all queries.
    band_start = i_high + 1
    full_band_start = i_high + 1
    for band in tl.static_range(BANDS):
        band_start = tl.minimum(band_start, first_key(i_low, table, band))
        full_band_start = tl.minimum(full_band_start, first_key(i_high, table, band))

    # Far rules, one after another: what neither a band nor an earlier far rule has shown.
    for far in tl.static_range(BANDS, BANDS + FARS):
        shift = rule_field(table, far, SHIFT)
        width = rule_field(table, far, WIDTH)
        position = rule_field(table, far, POSITION)
        position_step = rule_field(table, far, POSITION_STEP)
        offset_step = rule_field(table, far, OFFSET_STEP)
        offset = rule_field(table, far, OFFSET)
        if far >= BANDS + FIXED:
            # A relative rule: its stripes depend on the block of the queries, which is the same in
            # the whole tile.
            cycle = rule_field(table, far, STEP)
            turn = ((i_low >> shift) + cycle - rule_field(table, far, RESIDUE)) % cycle << shift
            position += turn
            offset += turn
        stop = rule_field(table, far, STOP)

        # Stripes that some query sees, and that the bands do not show to all.
        begin = tl.cdiv(tl.maximum(0, first_key(i_low, table, far) - position), position_step)
        begin = tl.maximum(begin, tl.cdiv(tl.maximum(0, 1 - width - offset), offset_step))
        end = tl.minimum(tl.minimum(i_high + 1, stop), full_band_start)
        end = tl.cdiv(tl.maximum(0, end - position), position_step)
        end = tl.minimum(end, tl.cdiv(tl.maximum(0, k_len - offset), offset_step))

        # Of these the ones that all queries see as a whole, and that nothing else shows to any.
        full = tl.maximum(
            begin,
            tl.cdiv(tl.maximum(0, first_key(i_high, table, far) - position), position_step),
        )
        full = tl.maximum(full, tl.cdiv(tl.maximum(0, -offset), offset_step))
        bound = tl.minimum(tl.minimum(i_low + 1, stop), band_start)
        for other in tl.static_range(BANDS, far):
            is_limited = rule_field(table, other, STOP) < UNLIMITED
            beyond = tl.cdiv(
                tl.maximum(0, rule_field(table, other, STOP) - position), position_step
            )
            full = tl.where(is_limited, tl.maximum(full, beyond), full)
            bound = tl.where(is_limited, bound, tl.minimum(bound, first_key(i_low, table, other)))
        full_end = tl.minimum(
            end, (tl.maximum(0, bound - width - position + position_step)) // position_step
        )
        full_end = tl.minimum(
            full_end, (tl.maximum(0, k_len - width - offset + offset_step)) // offset_step
        )
        full_end = tl.maximum(full, full_end)
        full = tl.minimum(full, full_end)

        # The full stripes, without a mask.
        tiles_per_stripe = width // BN
        for n in range(full * tiles_per_stripe, full_end * tiles_per_stripe):
            k_offset = offset + n // tiles_per_stripe * offset_step + n % tiles_per_stripe * BN
            k = load_tile(K, k_tiles, k_offset, k_len, k_t, BN, D, BLOCK_D, False, TMA)
            v = load_tile(V, v_tiles, k_offset, k_len, v_t, BN, DV, BLOCK_DV, False, TMA)
            acc, m, l = _visit(
                acc, m, l, q, do, lse, delta, k, v, True, scale, softcap, sigmoid_bias,
                GRAD, SOFTCAP, SIGMOID, PRECISION, False,
            )  # fmt: skip

        # Those before and after them, with a mask.
        full_tiles = (full_end - full) * tiles_per_stripe
        end_tile = tl.maximum(begin, end) * tiles_per_stripe - full_tiles
        for step in range(begin * tiles_per_stripe, end_tile):
            n = tl.where(step < full * tiles_per_stripe, step, step + full_tiles)
            k_offset = offset + n // tiles_per_stripe * offset_step + n % tiles_per_stripe * BN
            j0 = position + n // tiles_per_stripe * position_step + n % tiles_per_stripe * BN
            k = load_tile(K, k_tiles, k_offset, k_len, k_t, BN, D, BLOCK_D, True, TMA)
            v = load_tile(V, v_tiles, k_offset, k_len, v_t, BN, DV, BLOCK_DV, True, TMA)
            j = (j0 + tl.arange(0, BN))[None, :]
            is_key = (k_offset + tl.arange(0, BN) >= 0) & (k_offset + tl.arange(0, BN) < k_len)
            shown = in_far_rule(i[:, None], j, table, far, far >= BANDS + FIXED)
            visible = (i[:, None] >= j) & shown & is_key[None, :]
            for other in tl.static_range(BANDS, far):
                shown = in_far_rule(i[:, None], j, table, other, other >= BANDS + FIXED)
                visible = visible & (shown == 0)
            visible = visible & (in_bands(i[:, None], j, table, BANDS) == 0)
            acc, m, l = _visit(
                acc, m, l, q, do, lse, delta, k, v, visible, scale, softcap, sigmoid_bias,
                GRAD, SOFTCAP, SIGMOID, PRECISION, True,
            )  # fmt: skip

    # The bands: tiles `begin` to `end`, of which all queries see `full` to `full_end` as a whole.
    if BANDS > 0:
        start = keys_before(band_start, k_start, k_step, k_size, k_len)
        stop = keys_before(i_high + 1, k_start, k_step, k_size, k_len)
        begin = start // BN
        end = tl.where(stop > start, tl.cdiv(stop, BN), start // BN)
        full = tl.cdiv(keys_before(full_band_start, k_start, k_step, k_size, k_len), BN)
        full_end = keys_before(i_low + 1, k_start, k_step, k_size, k_len) // BN
        full = tl.minimum(tl.maximum(full, begin), end)
        full_end = tl.minimum(tl.maximum(full_end, full), end)
        for n in range(full, full_end):
            k = load_tile(K, k_tiles, n * BN, k_len, k_t, BN, D, BLOCK_D, False, TMA)
            v = load_tile(V, v_tiles, n * BN, k_len, v_t, BN, DV, BLOCK_DV, False, TMA)
            acc, m, l = _visit(
                acc, m, l, q, do, lse, delta, k, v, True, scale, softcap, sigmoid_bias,
                GRAD, SOFTCAP, SIGMOID, PRECISION, False,
            )  # fmt: skip
        for step in range(begin, end - (full_end - full)):
            n = tl.where(step < full, step, step + full_end - full)
            k = load_tile(K, k_tiles, n * BN, k_len, k_t, BN, D, BLOCK_D, True, TMA)
            v = load_tile(V, v_tiles, n * BN, k_len, v_t, BN, DV, BLOCK_DV, True, TMA)
            k_offset = n * BN + tl.arange(0, BN)
            j = key_position(k_offset, k_start, k_step, k_size)[None, :]
            shown = in_bands(i[:, None], j, table, BANDS)
            visible = (i[:, None] >= j) & shown & (k_offset < k_len)[None, :]
            acc, m, l = _visit(
                acc, m, l, q, do, lse, delta, k, v, visible, scale, softcap, sigmoid_bias,
                GRAD, SOFTCAP, SIGMOID, PRECISION, True,
            )  # fmt: skip

    # Store the results.
    if GRAD:
        store_tile(OUT, q_offset, q_len, o_t, acc * scale, BM, D, BLOCK_D, ADD)
    elif SIGMOID:
        store_tile(OUT, q_offset, q_len, o_t, acc, BM, DV, BLOCK_DV)
        tl.store(LSE + lse_index, l, mask=is_query)
    else:
        total = tl.where(l == 0.0, 1.0, l)  # 0 for queries that see nothing
        store_tile(OUT, q_offset, q_len, o_t, acc / total[:, None], BM, DV, BLOCK_DV)
        final_lse = tl.where(l == 0.0, -float("inf"), (m + tl.log2(total)) / LOG2E)
        tl.store(LSE + lse_index, final_lse, mask=is_query)
