"""The segment kernels: attention of a closed-form pattern, forward and backward, without lists of blocks.

A KV head's pattern is a row of a small table: its bands (all keys up to a distance), then its far rules (blocks
``start, start + step, ...``, the segments). From these a program finds its own key tiles, or query tiles, in closed form.
Tiles that are seen whole take no mask. Block lists (:class:`~longspan.attention.BlockLists`) go through the same kernels with
``LISTED``.

Names: ``i`` and ``j`` are positions of queries and keys in the document; rows are places in the tensors. Query rows are
consecutive positions from ``q_start``; key rows are the blocks ``k_start, k_start + k_step, ...`` of ``k_size`` positions.
Everything is deterministic: no atomics, partial sums are added in a fixed order.
"""

import triton
import triton.language as tl

# fmt: off - a kernel has forty arguments

# Columns of the table; its rows are the bands, then the far rules whose blocks are fixed, then the relative ones.
SHIFT = tl.constexpr(0)  # log2 of the rule's block
REACH = tl.constexpr(1)  # in blocks; 2**30 >> SHIFT where it has no limit
STOP = tl.constexpr(2)
STEP = tl.constexpr(3)
RESIDUE = tl.constexpr(4)
WIDTH = tl.constexpr(5)  # keys in a run of the segment
ROW = tl.constexpr(6)  # key row of the first run; for a relative rule that of block 0
ROW_STEP = tl.constexpr(7)
AT = tl.constexpr(8)  # position of the first run
AT_STEP = tl.constexpr(9)
COLUMNS = tl.constexpr(10)

LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(1 << 30)


@triton.jit
def _field(table, rule, column: tl.constexpr):
    return tl.load(table + rule * COLUMNS + column)


@triton.jit
def _first_key(i, table, rule):
    """The earliest key within reach of query ``i``."""
    shift = _field(table, rule, SHIFT)
    return tl.maximum(0, ((i >> shift) - _field(table, rule, REACH) + 1) << shift)


@triton.jit
def _last_query(j, table, rule):
    """Behind the last query within whose reach key ``j`` is."""
    shift = _field(table, rule, SHIFT)
    return ((j >> shift) + _field(table, rule, REACH)) << shift


@triton.jit
def _rows_below(at, k_start, k_step, k_size, k_len):
    """How many key rows stand before position ``at``."""
    blocks = tl.maximum(at // k_size - k_start, 0)
    inside = (at // k_size >= k_start) & (blocks % k_step == 0)
    rows = (blocks + k_step - 1) // k_step * k_size + tl.where(inside, at % k_size, 0)
    return tl.minimum(rows, k_len)


@triton.jit
def _position(row, k_start, k_step, k_size):
    """Of a key row; where the blocks are single positions also of rows before the first."""
    return tl.where(k_size == 1, k_start + row * k_step, (k_start + row // k_size * k_step) * k_size + row % k_size)


@triton.jit
def _in_bands(i, j, table, BANDS: tl.constexpr):
    seen = i < -j - 1  # none
    for band in tl.static_range(BANDS):
        shift = _field(table, band, SHIFT)
        seen = seen | (((i >> shift) - (j >> shift)) < _field(table, band, REACH))
    return seen


@triton.jit
def _in_far(i, j, table, rule, RELATIVE: tl.constexpr):
    shift = _field(table, rule, SHIFT)
    away = (i >> shift) - (j >> shift)
    near = (away < _field(table, rule, REACH)) & (j < _field(table, rule, STOP))
    phase = tl.maximum(away, 0) if RELATIVE else j >> shift
    return near & (phase % _field(table, rule, STEP) == _field(table, rule, RESIDUE))


@triton.jit
def _load(
    base,
    descriptor,
    row,
    length,
    stride,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows ``row`` to ``row + SIZE``; zeros where there are none. ``CHECK`` says that some may be missing."""
    if TMA:
        x = descriptor.load([row, 0])
    else:
        rows, dims = tl.arange(0, SIZE), tl.arange(0, BLOCK_D)
        pointers = base + (tl.full([], 0, tl.int64) + row) * stride + rows[:, None] * stride + dims[None, :]
        inside = (row + rows >= 0) & (row + rows < length)
        if CHECK and BLOCK_D == D:
            x = tl.load(pointers, mask=inside[:, None], other=0.0)
        elif CHECK:
            x = tl.load(pointers, mask=inside[:, None] & (dims < D)[None, :], other=0.0)
        elif BLOCK_D == D:
            x = tl.load(pointers)
        else:
            x = tl.load(pointers, mask=(dims < D)[None, :], other=0.0)
    return x


@triton.jit
def _store(base, row, length, stride, x, SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    rows, dims = tl.arange(0, SIZE), tl.arange(0, BLOCK_D)
    pointers = base + (tl.full([], 0, tl.int64) + row) * stride + rows[:, None] * stride + dims[None, :]
    inside = (row + rows >= 0) & (row + rows < length)
    tl.store(pointers, x.to(base.dtype.element_ty), mask=inside[:, None] & (dims < D)[None, :])


@triton.jit
def _descriptor(base, length, stride, SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        descriptor = tl.make_tensor_descriptor(base, [length, D], [stride, 1], [SIZE, BLOCK_D])
    else:
        descriptor = base  # not used
    return descriptor


@triton.jit
def _logits(products, scale, softcap, sigmoid_bias, SOFTCAP: tl.constexpr, SIGMOID: tl.constexpr):
    """Logits in base 2 (softmax) or natural (sigmoid), and their slope in the scaled products."""
    slope = 1.0
    if SOFTCAP:
        bent = 2.0 * tl.sigmoid(2.0 * scale / softcap * products) - 1.0  # tanh
        slope = 1.0 - bent * bent
        logits = bent * softcap
    else:
        logits = products * scale
    logits = logits + sigmoid_bias if SIGMOID else logits * LOG2E
    return logits, slope


@triton.jit
def _gradient(s, slope, dp, lse, delta, visible, SIGMOID: tl.constexpr, MASK: tl.constexpr):
    """Weights and gradients of the scaled products, from the final log-sum-exp (arXiv 2205.14135, algorithm 4)."""
    p = tl.sigmoid(s) if SIGMOID else tl.exp2(s - lse)
    if MASK:
        p = tl.where(visible, p, 0.0)
    ds = p * (1.0 - p) * dp if SIGMOID else p * (dp - delta)
    return p, ds * slope


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


# What differs from one sequence to the next: the kernels are compiled once for all.
_RUNNING = ["q_start", "q_len", "k_start", "k_len", "splits", "list_b", "list_h", "list_q"]


@triton.jit(do_not_specialize=_RUNNING[:4] + _RUNNING[5:])
def rows_kernel(
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
    first = base + (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # the last see most: begin with them
    head = tl.program_id(1) % heads
    b, h, kv = (tl.program_id(1) // heads).to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
    table = TABLE + kv * (BANDS + FARS) * COLUMNS
    K += b * k_b + kv * k_h
    V += b * v_b + kv * v_h
    row = first - q_start
    i = first + tl.arange(0, BM)
    low, high = tl.maximum(first, q_start), tl.minimum(first + BM, q_start + q_len) - 1

    q_rows = _descriptor(Q + b * q_b + h * q_h, q_len, q_t, BM, D, BLOCK_D, TMA)
    q = _load(Q + b * q_b + h * q_h, q_rows, row, q_len, q_t, BM, D, BLOCK_D, True, TMA)
    k_rows = _descriptor(K, k_len, k_t, BN, D, BLOCK_D, TMA)
    v_rows = _descriptor(V, k_len, v_t, BN, DV, BLOCK_DV, TMA)
    at_rows = (b * heads + h) * q_len + row + tl.arange(0, BM)
    inside = (row + tl.arange(0, BM) >= 0) & (row + tl.arange(0, BM) < q_len)
    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    do, lse, delta = q, m, l  # forward has none
    if GRAD:
        do_rows = _descriptor(DO + b * g_b + h * g_h, q_len, g_t, BM, DV, BLOCK_DV, TMA)
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
        at, at_step, row_step = _field(table, far, AT), _field(table, far, AT_STEP), _field(table, far, ROW_STEP)
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
        clear = tl.maximum(begin, tl.cdiv(tl.maximum(0, _first_key(high, table, far) - at), at_step))
        clear = tl.maximum(clear, tl.cdiv(tl.maximum(0, -row0), row_step))
        bound = tl.minimum(tl.minimum(low + 1, stop), lowest)
        for other in tl.static_range(BANDS, far):
            limited = _field(table, other, STOP) < NEVER
            behind = tl.cdiv(tl.maximum(0, _field(table, other, STOP) - at), at_step)
            clear = tl.where(limited, tl.maximum(clear, behind), clear)
            bound = tl.where(limited, bound, tl.minimum(bound, _first_key(low, table, other)))
        clear_end = tl.minimum(end, (tl.maximum(0, bound - width - at + at_step)) // at_step)
        clear_end = tl.minimum(clear_end, (tl.maximum(0, k_len - width - row0 + row_step)) // row_step)
        clear_end = tl.maximum(clear, clear_end)
        clear = tl.minimum(clear, clear_end)
        per = width // BN
        for n in range(clear * per, clear_end * per):
            tile = row0 + n // per * row_step + n % per * BN
            k = _load(K, k_rows, tile, k_len, k_t, BN, D, BLOCK_D, False, TMA)
            v = _load(V, v_rows, tile, k_len, v_t, BN, DV, BLOCK_DV, False, TMA)
            acc, m, l = _visit(
                acc, m, l, q, do, lse, delta, k, v, True, scale, softcap, sigmoid_bias, GRAD, SOFTCAP, SIGMOID, PRECISION, False
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
            visible = (i[:, None] >= j) & _in_far(i[:, None], j, table, far, far >= BANDS + FIXED) & kept[None, :]
            for other in tl.static_range(BANDS, far):
                visible = visible & (_in_far(i[:, None], j, table, other, other >= BANDS + FIXED) == 0)
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
                acc, m, l, q, do, lse, delta, k, v, True, scale, softcap, sigmoid_bias, GRAD, SOFTCAP, SIGMOID, PRECISION, False
            )
        for step in range(tiles, tiles_end - (clear_end - clear)):
            n = tl.where(step < clear, step, step + clear_end - clear)
            k = _load(K, k_rows, n * BN, k_len, k_t, BN, D, BLOCK_D, True, TMA)
            v = _load(V, v_rows, n * BN, k_len, v_t, BN, DV, BLOCK_DV, True, TMA)
            rows = n * BN + tl.arange(0, BN)
            j = _position(rows, k_start, k_step, k_size)[None, :]
            visible = (i[:, None] >= j) & _in_bands(i[:, None], j, table, BANDS) & (rows < k_len)[None, :]
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
        tl.store(LSE + at_rows, tl.where(l == 0.0, -float("inf"), (m + tl.log2(total)) / LOG2E), mask=inside)


@triton.jit(do_not_specialize=_RUNNING[:7])
def keys_kernel(
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
    k = _load(K, _descriptor(K, k_len, k_t, BN, D, BLOCK_D, TMA), row, k_len, k_t, BN, D, BLOCK_D, True, TMA)
    v = _load(V, _descriptor(V, k_len, v_t, BN, DV, BLOCK_DV, TMA), row, k_len, v_t, BN, DV, BLOCK_DV, True, TMA)
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
                on = (j0 >> _field(table, far, SHIFT)) % _field(table, far, STEP) == _field(table, far, RESIDUE)
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
            last = tl.minimum((q_end - 1) >> shift, (j0 >> shift) + _field(table, BANDS + FAR, REACH) - 1)
            first_block += tl.cdiv(tl.maximum(0, (begin >> shift) - first_block), block_step) * block_step
            tiles, clear_end = 0, 0
            tiles_end = tl.maximum(0, last - first_block + block_step) // block_step * per
    share = tl.cdiv(tiles_end - tiles, splits)
    tiles = tiles + split * share
    tiles_end = tl.minimum(tiles_end, tiles + share)
    tiles_end = tl.maximum(tiles, tiles_end)
    clear = tl.minimum(tl.maximum(clear, tiles), tiles_end)
    clear_end = tl.minimum(tl.maximum(clear_end, clear), tiles_end)

    for _ in range(0, group):
        q_rows = _descriptor(Q, q_len, q_t, BM, D, BLOCK_D, TMA)
        do_rows = _descriptor(DO, q_len, g_t, BM, DV, BLOCK_DV, TMA)
        for n in range(clear, clear_end):
            at = base + n * BM - q_start
            q = _load(Q, q_rows, at, q_len, q_t, BM, D, BLOCK_D, False, TMA)
            do = _load(DO, do_rows, at, q_len, g_t, BM, DV, BLOCK_DV, False, TMA)
            lse = tl.load(LSE + at + tl.arange(0, BM)) * LOG2E
            delta = tl.load(DELTA + at + tl.arange(0, BM))
            dk, dv = _receive(
                dk, dv, q, do, lse, delta, k, v, True, scale, softcap, sigmoid_bias, SOFTCAP, SIGMOID, PRECISION, False
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
                dk, dv, q, do, lse, delta, k, v, visible, scale, softcap, sigmoid_bias, SOFTCAP, SIGMOID, PRECISION, True
            )
        Q += q_h
        DO += g_h
        LSE += q_len
        DELTA += q_len

    if FAR >= 0:
        row, k_len, b = unit * BN, tl.num_programs(0) // splits * BN, split * tl.num_programs(1) // kv_heads + b
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
def home_kernel(
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
    row, _ = _segment_tile(TABLE + kv * RULES * COLUMNS, RULE, tl.program_id(0), BN, k_start, RELATIVE)
    OUT += b * o_b + kv * o_h
    PARTS += b * p_b + kv * p_h
    total = _load(OUT, OUT, row, k_len, o_t, BN, D, BLOCK_D, True, False)
    for split in range(0, splits):
        part = PARTS + (tl.full([], 0, tl.int64) + split) * batch * p_b
        total += _load(part, part, tl.program_id(0) * BN, tl.num_programs(0) * BN, p_t, BN, D, BLOCK_D, True, False)
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
