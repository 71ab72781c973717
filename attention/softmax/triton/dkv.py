"""A tile of keys against the queries that see it: the gradients of keys and values."""

import triton
import triton.language as tl

from ...triton_device import LOG2E, bulk_rows
from .rules import (
    AT,
    AT_STEP,
    COLUMNS,
    REACH,
    RESIDUE,
    ROW,
    ROW_STEP,
    RUNNING,
    SHIFT,
    STEP,
    STOP,
    WIDTH,
    _field,
    _gradient,
    _in_bands,
    _in_far,
    _last_query,
    _load,
    _logits,
    _position,
    _store,
)


@triton.jit(do_not_specialize=[*RUNNING, "splits"])
def dkv_kernel(
    Q,
    K,
    V,
    LSE,
    DO,
    DELTA,
    DK,
    DV_OUT,
    TABLE,
    POINTERS,
    LISTS,
    scale,
    softcap,
    sigmoid_bias,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    g_b,
    g_t,
    g_h,
    dk_b,
    dk_t,
    dk_h,
    dv_b,
    dv_t,
    dv_h,
    list_b,
    list_h,
    kv_heads,
    group,
    q_start,
    q_len,
    k_start,
    k_step,
    k_size,
    k_len,
    splits,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BANDS: tl.constexpr,
    FIXED: tl.constexpr,
    FARS: tl.constexpr,
    FAR: tl.constexpr,
    LISTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SIGMOID: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a tile of ``BN`` keys and values of one KV head, all query heads of its group one after another.

    With ``FAR`` below 0 what the bands show, at the keys' rows. Else what the bands leave, for the tiles of far rule ``FAR``: a
    sixteenth of the columns can hold most of the work, so each tile's queries are shared among ``splits`` programs, whose
    sums go to ``[splits * batch * kv_heads, tiles * BN, ...]`` and home by :func:`home_kernel`.
    """
    unit = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    kv = (tl.program_id(1) % kv_heads).to(tl.int64)
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    table = TABLE + kv * (BANDS + FARS) * COLUMNS
    Q += b * q_b + kv * group * q_h
    DO += b * g_b + kv * group * g_h
    LSE += (b * kv_heads + kv) * group * q_len
    DELTA += (b * kv_heads + kv) * group * q_len
    base, q_end = q_start - q_start % BM, q_start + q_len

    row = unit * BN
    if FAR >= 0:
        row, j0 = _segment_tile(table, BANDS + FAR, unit, BN, k_start, FAR >= FIXED)
        j = j0 + tl.arange(0, BN)
        j_low, j_high = j0, j0 + BN - 1
    else:
        j = _position(row + tl.arange(0, BN), k_start, k_step, k_size)
        j_low = _position(row, k_start, k_step, k_size)
        j_high = _position(tl.minimum(row + BN, k_len) - 1, k_start, k_step, k_size)
    kept = (row + tl.arange(0, BN) >= 0) & (row + tl.arange(0, BN) < k_len)
    K += b * k_b + kv * k_h
    V += b * v_b + kv * v_h
    k = _load(
        K, bulk_rows(K, k_len, k_t, BN, D, BLOCK_D, TMA), row, k_len, k_t, BN, D, BLOCK_D, True, TMA
    )
    v = _load(
        V,
        bulk_rows(V, k_len, v_t, BN, DV, BLOCK_DV, TMA),
        row,
        k_len,
        v_t,
        BN,
        DV,
        BLOCK_DV,
        True,
        TMA,
    )
    dk = tl.zeros([BN, BLOCK_D], tl.float32)
    dv = tl.zeros([BN, BLOCK_DV], tl.float32)

    # The query tiles `tiles` to `tiles_end`, of which `clear` to `clear_end` see the keys whole. With lists, and for a
    # relative rule, they are not beside one another: `per` tiles in each block of queries.
    clear, clear_end, entries, per, first_block, block_step, shift = 0, 0, LISTS, 1, 0, 0, 0
    if LISTED:
        shift = _field(table, 0, SHIFT)
        per = (1 << shift) // BM
        pointer = POINTERS + b * list_b + kv * list_h + (j_low >> shift)
        entries = LISTS + tl.load(pointer)
        tiles, tiles_end = 0, (tl.load(pointer + 1) - tl.load(pointer)) * per
    else:
        band_all, band_any = j_low, j_low
        for band in tl.static_range(BANDS):
            band_all = tl.maximum(band_all, _last_query(j_low, table, band))
            band_any = tl.maximum(band_any, _last_query(j_high, table, band))
        if FAR < 0:
            begin, end, clear_at, clear_to = j_low, band_any, j_high, band_all
        else:
            begin, end, clear_at, clear_to = band_all, band_all, tl.maximum(j_high, band_any), 0
            owner = j0 >= 0
            for far in tl.static_range(BANDS, BANDS + FIXED):
                on = (j0 >> _field(table, far, SHIFT)) % _field(table, far, STEP) == _field(
                    table, far, RESIDUE
                )
                on = on & (j0 < _field(table, far, STOP))
                end = tl.maximum(end, tl.where(on, _last_query(j0, table, far), 0))
                whole = on & (j_high < _field(table, far, STOP))
                clear_to = tl.maximum(clear_to, tl.where(whole, _last_query(j0, table, far), 0))
                if far < BANDS + FAR:  # the tile is that rule's, with all of its queries
                    owner = owner & (on == 0)
                if far == BANDS + FAR:  # of another head, perhaps, there are more tiles
                    owner = owner & on
            end = tl.where(owner, end, 0)
        begin, end = tl.maximum(begin, q_start), tl.minimum(end, q_end)
        tiles, tiles_end = (begin - base) // BM, tl.cdiv(tl.maximum(end - base, 0), BM)
        clear = tl.cdiv(tl.maximum(clear_at - base, q_start - base), BM)
        clear_end = (tl.maximum(tl.minimum(clear_to, q_end), base) - base) // BM
        tiles_end = tl.where(end > begin, tiles_end, tiles)
        if FAR >= FIXED:
            shift, block_step = _field(table, BANDS + FAR, SHIFT), _field(table, BANDS + FAR, STEP)
            per = (1 << shift) // BM
            first_block = (j0 >> shift) + _field(table, BANDS + FAR, RESIDUE)
            last = tl.minimum(
                (q_end - 1) >> shift, (j0 >> shift) + _field(table, BANDS + FAR, REACH) - 1
            )
            first_block += (
                tl.cdiv(tl.maximum(0, (begin >> shift) - first_block), block_step) * block_step
            )
            tiles, clear_end = 0, 0
            tiles_end = tl.maximum(0, last - first_block + block_step) // block_step * per
    share = tl.cdiv(tiles_end - tiles, splits)
    tiles = tiles + split * share
    tiles_end = tl.minimum(tiles_end, tiles + share)
    tiles_end = tl.maximum(tiles, tiles_end)
    clear = tl.minimum(tl.maximum(clear, tiles), tiles_end)
    clear_end = tl.minimum(tl.maximum(clear_end, clear), tiles_end)

    for _ in range(0, group):
        q_rows = bulk_rows(Q, q_len, q_t, BM, D, BLOCK_D, TMA)
        do_rows = bulk_rows(DO, q_len, g_t, BM, DV, BLOCK_DV, TMA)
        for n in range(clear, clear_end):
            at = base + n * BM - q_start
            q = _load(Q, q_rows, at, q_len, q_t, BM, D, BLOCK_D, False, TMA)
            do = _load(DO, do_rows, at, q_len, g_t, BM, DV, BLOCK_DV, False, TMA)
            lse = tl.load(LSE + at + tl.arange(0, BM)) * LOG2E
            delta = tl.load(DELTA + at + tl.arange(0, BM))
            dk, dv = _receive(
                dk,
                dv,
                q,
                do,
                lse,
                delta,
                k,
                v,
                True,
                scale,
                softcap,
                sigmoid_bias,
                SOFTCAP,
                SIGMOID,
                PRECISION,
                False,
            )
        for step in range(tiles, tiles_end - (clear_end - clear)):
            n = tl.where(step < clear, step, step + clear_end - clear)
            first = base + n * BM
            if LISTED:
                first = (tl.load(entries + n // per) << shift) + n % per * BM
            elif FAR >= FIXED:
                first = ((first_block + n // per * block_step) << shift) + n % per * BM
            at = first - q_start
            i = (first + tl.arange(0, BM))[None, :]
            inside = (at + tl.arange(0, BM) >= 0) & (at + tl.arange(0, BM) < q_len)
            q = _load(Q, q_rows, at, q_len, q_t, BM, D, BLOCK_D, True, TMA)
            do = _load(DO, do_rows, at, q_len, g_t, BM, DV, BLOCK_DV, True, TMA)
            lse = tl.load(LSE + at + tl.arange(0, BM), mask=inside, other=0.0) * LOG2E
            delta = tl.load(DELTA + at + tl.arange(0, BM), mask=inside, other=0.0)
            visible = (i >= j[:, None]) & inside[None, :] & kept[:, None]
            if not LISTED:
                if FAR < 0:
                    visible = visible & _in_bands(i, j[:, None], table, BANDS)
                else:
                    visible = visible & (_in_bands(i, j[:, None], table, BANDS) == 0)
                    visible = visible & _by_rule(i, j[:, None], table, BANDS, FIXED, FAR)
            dk, dv = _receive(
                dk,
                dv,
                q,
                do,
                lse,
                delta,
                k,
                v,
                visible,
                scale,
                softcap,
                sigmoid_bias,
                SOFTCAP,
                SIGMOID,
                PRECISION,
                True,
            )
        Q += q_h
        DO += g_h
        LSE += q_len
        DELTA += q_len

    if FAR >= 0:
        row, k_len, b = (
            unit * BN,
            tl.num_programs(0) // splits * BN,
            split * tl.num_programs(1) // kv_heads + b,
        )
    _store(DK + b * dk_b + kv * dk_h, row, k_len, dk_t, dk * scale, BN, D, BLOCK_D)
    _store(DV_OUT + b * dv_b + kv * dv_h, row, k_len, dv_t, dv, BN, DV, BLOCK_DV)


@triton.jit
def _segment_tile(table, rule, unit, BN: tl.constexpr, k_start, RELATIVE: tl.constexpr):
    """Key row and position of a far rule's tile; to a relative rule all blocks belong."""
    width = _field(table, rule, WIDTH)
    per = width // BN
    if RELATIVE:
        at = (k_start // width + unit // per) * width
        row = at - k_start
    else:
        at = _field(table, rule, AT) + unit // per * _field(table, rule, AT_STEP)
        row = _field(table, rule, ROW) + unit // per * _field(table, rule, ROW_STEP)
    return row + unit % per * BN, at + unit % per * BN


@triton.jit
def _by_rule(i, j, table, BANDS: tl.constexpr, FIXED: tl.constexpr, FAR: tl.constexpr):
    """What the launch for far rule ``FAR`` answers for: all fixed rules, or a relative one without what others show."""
    fixed = i < -j - 1  # none
    for far in tl.static_range(BANDS, BANDS + FIXED):
        fixed = fixed | _in_far(i, j, table, far, False)
    if FAR < FIXED:
        mine = fixed
    else:
        mine = _in_far(i, j, table, BANDS + FAR, True) & (fixed == 0)
        for far in tl.static_range(BANDS + FIXED, BANDS + FAR):
            mine = mine & (_in_far(i, j, table, far, True) == 0)
    return mine


@triton.jit
def _receive(
    dk,
    dv,
    q,
    do,
    lse,
    delta,
    k,
    v,
    visible,
    scale,
    softcap,
    sigmoid_bias,
    SOFTCAP: tl.constexpr,
    SIGMOID: tl.constexpr,
    PRECISION: tl.constexpr,
    MASK: tl.constexpr,
):
    """What one tile of queries adds to the gradients of the keys and values."""
    lse = tl.where(lse == -float("inf"), float("inf"), lse)  # rows that see nothing
    products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    s, slope = _logits(products, scale, softcap, sigmoid_bias, SOFTCAP, SIGMOID)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    p, ds = _gradient(s, slope, dp, lse[None, :], delta[None, :], visible, SIGMOID, MASK)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["k_start", "k_len", "splits"])
def reduce_splits_kernel(
    PARTS,
    OUT,
    TABLE,
    p_b,
    p_t,
    p_h,
    o_b,
    o_t,
    o_h,
    kv_heads,
    batch,
    k_start,
    k_len,
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BN: tl.constexpr,
    RULES: tl.constexpr,
    RULE: tl.constexpr,
    RELATIVE: tl.constexpr,
):
    """Add the splits' sums of one tile of a far rule, in order, to the rows where its keys are."""
    kv = (tl.program_id(1) % kv_heads).to(tl.int64)
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    row, _ = _segment_tile(
        TABLE + kv * RULES * COLUMNS, RULE, tl.program_id(0), BN, k_start, RELATIVE
    )
    OUT += b * o_b + kv * o_h
    PARTS += b * p_b + kv * p_h
    total = _load(OUT, OUT, row, k_len, o_t, BN, D, BLOCK_D, True, False)
    for split in range(0, splits):
        part = PARTS + (tl.full([], 0, tl.int64) + split) * batch * p_b
        total += _load(
            part,
            part,
            tl.program_id(0) * BN,
            tl.num_programs(0) * BN,
            p_t,
            BN,
            D,
            BLOCK_D,
            True,
            False,
        )
    _store(OUT, row, k_len, o_t, total, BN, D, BLOCK_D)


@triton.jit(do_not_specialize=["q_len"])
def delta_kernel(
    OUT,
    DO,
    DLSE,
    DELTA,
    o_b,
    o_t,
    o_h,
    g_b,
    g_t,
    g_h,
    heads,
    q_len,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BM: tl.constexpr,
    WITH_LSE: tl.constexpr,
):
    """``sum(out * grad_out) - grad_lse`` of each row, ``[batch, heads, queries]``."""
    head = tl.program_id(1) % heads
    b, h = (tl.program_id(1) // heads).to(tl.int64), head.to(tl.int64)
    row = tl.program_id(0) * BM
    out = _load(OUT + b * o_b + h * o_h, OUT, row, q_len, o_t, BM, DV, BLOCK_DV, True, False)
    do = _load(DO + b * g_b + h * g_h, DO, row, q_len, g_t, BM, DV, BLOCK_DV, True, False)
    rows = row + tl.arange(0, BM)
    at = (b * heads + h) * q_len + rows
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if WITH_LSE:
        delta -= tl.load(DLSE + at, mask=rows < q_len, other=0.0)
    tl.store(DELTA + at, delta, mask=rows < q_len)
