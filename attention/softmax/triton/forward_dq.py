"""A tile of queries against the keys that it sees: forward, and the gradient of the queries."""

import triton
import triton.language as tl

from ...triton_device import LOG2E, bulk_rows
from .rules import (
    AT,
    AT_STEP,
    COLUMNS,
    NEVER,
    RESIDUE,
    ROW,
    ROW_STEP,
    RUNNING,
    SHIFT,
    STEP,
    STOP,
    WIDTH,
    _field,
    _first_key,
    _gradient,
    _in_bands,
    _in_far,
    _load,
    _logits,
    _position,
    _rows_below,
    _store,
)


@triton.jit
def _visit(
    acc,
    m,
    l,
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
    GRAD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SIGMOID: tl.constexpr,
    PRECISION: tl.constexpr,
    MASK: tl.constexpr,
):
    """One key tile: of the online softmax (``acc`` the output, ``m`` and ``l`` the rows' maximum and sum), or of dQ."""
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    s, slope = _logits(products, scale, softcap, sigmoid_bias, SOFTCAP, SIGMOID)
    if GRAD:
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        p, ds = _gradient(s, slope, dp, lse[:, None], delta[:, None], visible, SIGMOID, MASK)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    elif SIGMOID:
        p = tl.sigmoid(s)
        if MASK:
            p = tl.where(visible, p, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    else:
        if MASK:
            s = tl.where(visible, s, -float("inf"))
        top = tl.maximum(m, tl.max(s, 1))
        base = tl.where(top == -float("inf"), 0.0, top) if MASK else top
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(m - base)
        l = l * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m = top
    return acc, m, l


@triton.jit(do_not_specialize=[*RUNNING, "list_q"])
def forward_dq_kernel(
    Q,
    K,
    V,
    OUT,
    LSE,
    DO,
    DELTA,
    TABLE,
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
    o_b,
    o_t,
    o_h,
    g_b,
    g_t,
    g_h,
    list_b,
    list_h,
    list_q,
    heads,
    group,
    q_start,
    q_len,
    k_start,
    k_step,
    k_size,
    k_len,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BANDS: tl.constexpr,
    FIXED: tl.constexpr,
    FARS: tl.constexpr,
    LISTED: tl.constexpr,
    GRAD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SIGMOID: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and log-sum-exp, or with ``GRAD`` the gradient, of a tile of ``BM`` queries of one head. ``OUT`` is either."""
    base = q_start - q_start % BM
    first = (
        base + (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    )  # the last see most: begin with them
    head = tl.program_id(1) % heads
    b, h, kv = (
        (tl.program_id(1) // heads).to(tl.int64),
        head.to(tl.int64),
        (head // group).to(tl.int64),
    )
    table = TABLE + kv * (BANDS + FARS) * COLUMNS
    K += b * k_b + kv * k_h
    V += b * v_b + kv * v_h
    row = first - q_start
    i = first + tl.arange(0, BM)
    low, high = tl.maximum(first, q_start), tl.minimum(first + BM, q_start + q_len) - 1

    q_rows = bulk_rows(Q + b * q_b + h * q_h, q_len, q_t, BM, D, BLOCK_D, TMA)
    q = _load(Q + b * q_b + h * q_h, q_rows, row, q_len, q_t, BM, D, BLOCK_D, True, TMA)
    k_rows = bulk_rows(K, k_len, k_t, BN, D, BLOCK_D, TMA)
    v_rows = bulk_rows(V, k_len, v_t, BN, DV, BLOCK_DV, TMA)
    at_rows = (b * heads + h) * q_len + row + tl.arange(0, BM)
    inside = (row + tl.arange(0, BM) >= 0) & (row + tl.arange(0, BM) < q_len)
    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    do, lse, delta = q, m, l  # forward has none
    if GRAD:
        do_rows = bulk_rows(DO + b * g_b + h * g_h, q_len, g_t, BM, DV, BLOCK_DV, TMA)
        do = _load(DO + b * g_b + h * g_h, do_rows, row, q_len, g_t, BM, DV, BLOCK_DV, True, TMA)
        lse = tl.load(LSE + at_rows, mask=inside, other=float("inf")) * LOG2E
        lse = tl.where(lse == -float("inf"), float("inf"), lse)  # rows that see nothing
        delta = tl.load(DELTA + at_rows, mask=inside, other=0.0)
        acc = tl.zeros([BM, BLOCK_D], tl.float32)
    else:
        acc = tl.zeros([BM, BLOCK_DV], tl.float32)

    if LISTED:
        # The block's list: how many blocks, then which.
        shift = _field(table, 0, SHIFT)
        own, per = low >> shift, (1 << shift) // BN
        entry = LISTS + b * list_b + kv * list_h + own * list_q
        for n in range(0, tl.load(entry) * per):
            j0 = (tl.load(entry + 1 + n // per) << shift) + n % per * BN
            tile = j0 - k_start
            k = _load(K, k_rows, tile, k_len, k_t, BN, D, BLOCK_D, True, TMA)
            v = _load(V, v_rows, tile, k_len, v_t, BN, DV, BLOCK_DV, True, TMA)
            j = j0 + tl.arange(0, BN)
            kept = (tile + tl.arange(0, BN) >= 0) & (tile + tl.arange(0, BN) < k_len)
            visible = (i[:, None] >= j[None, :]) & kept[None, :]
            acc, m, l = _visit(
                acc,
                m,
                l,
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
                GRAD,
                SOFTCAP,
                SIGMOID,
                PRECISION,
                True,
            )
    # Behind `lowest` the bands show something to some row, behind `highest` all to all.
    lowest, highest = high + 1, high + 1
    for band in tl.static_range(BANDS):
        lowest = tl.minimum(lowest, _first_key(low, table, band))
        highest = tl.minimum(highest, _first_key(high, table, band))

    for far in tl.static_range(BANDS, BANDS + FARS):
        shift, width = _field(table, far, SHIFT), _field(table, far, WIDTH)
        at, at_step, row_step = (
            _field(table, far, AT),
            _field(table, far, AT_STEP),
            _field(table, far, ROW_STEP),
        )
        row0 = _field(table, far, ROW)
        if far >= BANDS + FIXED:  # the tile's queries are of one block
            cycle = _field(table, far, STEP)
            turn = ((low >> shift) + cycle - _field(table, far, RESIDUE)) % cycle << shift
            at += turn
            row0 += turn
        stop = _field(table, far, STOP)
        # Runs that some row sees and the bands do not show to all.
        begin = tl.cdiv(tl.maximum(0, _first_key(low, table, far) - at), at_step)
        begin = tl.maximum(begin, tl.cdiv(tl.maximum(0, 1 - width - row0), row_step))
        end = tl.cdiv(tl.maximum(0, tl.minimum(tl.minimum(high + 1, stop), highest) - at), at_step)
        end = tl.minimum(end, tl.cdiv(tl.maximum(0, k_len - row0), row_step))
        # Of these the ones that all rows see, and that nothing else shows.
        clear = tl.maximum(
            begin, tl.cdiv(tl.maximum(0, _first_key(high, table, far) - at), at_step)
        )
        clear = tl.maximum(clear, tl.cdiv(tl.maximum(0, -row0), row_step))
        bound = tl.minimum(tl.minimum(low + 1, stop), lowest)
        for other in tl.static_range(BANDS, far):
            limited = _field(table, other, STOP) < NEVER
            behind = tl.cdiv(tl.maximum(0, _field(table, other, STOP) - at), at_step)
            clear = tl.where(limited, tl.maximum(clear, behind), clear)
            bound = tl.where(limited, bound, tl.minimum(bound, _first_key(low, table, other)))
        clear_end = tl.minimum(end, (tl.maximum(0, bound - width - at + at_step)) // at_step)
        clear_end = tl.minimum(
            clear_end, (tl.maximum(0, k_len - width - row0 + row_step)) // row_step
        )
        clear_end = tl.maximum(clear, clear_end)
        clear = tl.minimum(clear, clear_end)
        per = width // BN
        for n in range(clear * per, clear_end * per):
            tile = row0 + n // per * row_step + n % per * BN
            k = _load(K, k_rows, tile, k_len, k_t, BN, D, BLOCK_D, False, TMA)
            v = _load(V, v_rows, tile, k_len, v_t, BN, DV, BLOCK_DV, False, TMA)
            acc, m, l = _visit(
                acc,
                m,
                l,
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
                GRAD,
                SOFTCAP,
                SIGMOID,
                PRECISION,
                False,
            )
        skipped = (clear_end - clear) * per
        for step in range(begin * per, tl.maximum(begin, end) * per - skipped):
            n = tl.where(step < clear * per, step, step + skipped)
            tile = row0 + n // per * row_step + n % per * BN
            j0 = at + n // per * at_step + n % per * BN
            k = _load(K, k_rows, tile, k_len, k_t, BN, D, BLOCK_D, True, TMA)
            v = _load(V, v_rows, tile, k_len, v_t, BN, DV, BLOCK_DV, True, TMA)
            j = (j0 + tl.arange(0, BN))[None, :]
            kept = (tile + tl.arange(0, BN) >= 0) & (tile + tl.arange(0, BN) < k_len)
            visible = (
                (i[:, None] >= j)
                & _in_far(i[:, None], j, table, far, far >= BANDS + FIXED)
                & kept[None, :]
            )
            for other in tl.static_range(BANDS, far):
                visible = visible & (
                    _in_far(i[:, None], j, table, other, other >= BANDS + FIXED) == 0
                )
            visible = visible & (_in_bands(i[:, None], j, table, BANDS) == 0)
            acc, m, l = _visit(
                acc,
                m,
                l,
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
                GRAD,
                SOFTCAP,
                SIGMOID,
                PRECISION,
                True,
            )

    if BANDS > 0:
        start = _rows_below(lowest, k_start, k_step, k_size, k_len)
        stop = _rows_below(high + 1, k_start, k_step, k_size, k_len)
        tiles, tiles_end = start // BN, tl.where(stop > start, tl.cdiv(stop, BN), start // BN)
        clear = tl.cdiv(_rows_below(highest, k_start, k_step, k_size, k_len), BN)
        clear_end = _rows_below(low + 1, k_start, k_step, k_size, k_len) // BN
        clear = tl.minimum(tl.maximum(clear, tiles), tiles_end)
        clear_end = tl.minimum(tl.maximum(clear_end, clear), tiles_end)
        for n in range(clear, clear_end):
            k = _load(K, k_rows, n * BN, k_len, k_t, BN, D, BLOCK_D, False, TMA)
            v = _load(V, v_rows, n * BN, k_len, v_t, BN, DV, BLOCK_DV, False, TMA)
            acc, m, l = _visit(
                acc,
                m,
                l,
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
                GRAD,
                SOFTCAP,
                SIGMOID,
                PRECISION,
                False,
            )
        for step in range(tiles, tiles_end - (clear_end - clear)):
            n = tl.where(step < clear, step, step + clear_end - clear)
            k = _load(K, k_rows, n * BN, k_len, k_t, BN, D, BLOCK_D, True, TMA)
            v = _load(V, v_rows, n * BN, k_len, v_t, BN, DV, BLOCK_DV, True, TMA)
            rows = n * BN + tl.arange(0, BN)
            j = _position(rows, k_start, k_step, k_size)[None, :]
            visible = (
                (i[:, None] >= j) & _in_bands(i[:, None], j, table, BANDS) & (rows < k_len)[None, :]
            )
            acc, m, l = _visit(
                acc,
                m,
                l,
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
                GRAD,
                SOFTCAP,
                SIGMOID,
                PRECISION,
                True,
            )

    OUT += b * o_b + h * o_h
    if GRAD:
        _store(OUT, row, q_len, o_t, acc * scale, BM, D, BLOCK_D)
    elif SIGMOID:
        _store(OUT, row, q_len, o_t, acc, BM, DV, BLOCK_DV)
        tl.store(LSE + at_rows, l, mask=inside)
    else:
        total = tl.where(l == 0.0, 1.0, l)  # rows that see nothing
        _store(OUT, row, q_len, o_t, acc / total[:, None], BM, DV, BLOCK_DV)
        tl.store(
            LSE + at_rows,
            tl.where(l == 0.0, -float("inf"), (m + tl.log2(total)) / LOG2E),
            mask=inside,
        )
