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

from ...triton_device import LOG2E

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

NEVER = tl.constexpr(1 << 30)

# What differs from one sequence to the next: the kernels are compiled once for all.
RUNNING = ["q_start", "q_len", "k_start", "k_len", "list_b", "list_h"]


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
    return tl.where(
        k_size == 1,
        k_start + row * k_step,
        (k_start + row // k_size * k_step) * k_size + row % k_size,
    )


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
        pointers = (
            base
            + (tl.full([], 0, tl.int64) + row) * stride
            + rows[:, None] * stride
            + dims[None, :]
        )
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
def _store(
    base, row, length, stride, x, SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    rows, dims = tl.arange(0, SIZE), tl.arange(0, BLOCK_D)
    pointers = (
        base + (tl.full([], 0, tl.int64) + row) * stride + rows[:, None] * stride + dims[None, :]
    )
    inside = (row + rows >= 0) & (row + rows < length)
    tl.store(pointers, x.to(base.dtype.element_ty), mask=inside[:, None] & (dims < D)[None, :])


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
