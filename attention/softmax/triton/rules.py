"""What the kernels of softmax attention share: a pattern as a small table, and loads and logits.

The kernels compute attention under a closed-form pattern, forward and backward, without lists of
blocks. The pattern of a KV head is a few rows of a table: its bands (all keys up to a distance),
then its far rules, each of which shows stripes: ``width`` consecutive keys at regular distances.
From these a program finds its own tiles of keys, or of queries, in closed form. Tiles of which all
pairs are visible need no mask. Block lists go through the same kernels with ``LISTED``.

A launch computes all tiles of a :class:`~longspan.attention.softmax.tile_batch.TileBatch`, all
documents for example. ``PLACES`` says where each of them is, and ``PROGRAMS`` of which tile, and of
which part of it, each program is.

Names: ``i`` and ``j`` are positions of queries and keys in the document, offsets count from the
first of the tile's own queries or keys in the tensors. Queries are at consecutive positions from
``q_start`` on. Keys are in blocks of ``k_size`` positions, ``k_start, k_start + k_step, ...``;
consecutive keys are blocks of one position.

Everything is deterministic: there are no atomics, and partial sums are added in a fixed order.
"""

import triton
import triton.language as tl

from ...triton_device import LOG2E

# Columns of the table. Its rows are the bands, then the far rules whose stripes are fixed, then the
# relative ones.
SHIFT = tl.constexpr(0)  # log2 of the rule's block
REACH = tl.constexpr(1)  # in blocks; UNLIMITED >> SHIFT if there is no limit
STOP = tl.constexpr(2)  # a position; UNLIMITED if there is no limit
STEP = tl.constexpr(3)
RESIDUE = tl.constexpr(4)
WIDTH = tl.constexpr(5)  # keys in a stripe
OFFSET = tl.constexpr(6)  # of the first stripe; for a relative rule that of the document's block 0
OFFSET_STEP = tl.constexpr(7)
POSITION = tl.constexpr(8)  # of the first stripe
POSITION_STEP = tl.constexpr(9)
COLUMNS = tl.constexpr(10)

UNLIMITED = tl.constexpr(1 << 30)

# Columns of PLACES.
BATCH_ROW = tl.constexpr(0)
Q_SLOT = tl.constexpr(1)  # the first query's token in the tensors
Q_START = tl.constexpr(2)
Q_LEN = tl.constexpr(3)
K_COLUMN = tl.constexpr(4)  # the first key's token in the tensors
K_START = tl.constexpr(5)
K_LEN = tl.constexpr(6)
KEY_RANGE = tl.constexpr(7)  # which of the tables of rules
PLACE_COLUMNS = tl.constexpr(8)

# Columns of PROGRAMS.
PLACE = tl.constexpr(0)
PART = tl.constexpr(1)  # which tile of BM queries, or of BN keys
SPLIT = tl.constexpr(2)  # which share of the queries of these keys, ...
SPLITS = tl.constexpr(3)  # ... of so many
PROGRAM_COLUMNS = tl.constexpr(4)

# Arguments that differ from one sequence to the next. Kernels are not specialized for their values,
# so that they are compiled once for all.
SEQUENCE_ARGUMENTS = ["l_b", "l_h", "list_b", "list_h"]


@triton.jit
def program_field(PROGRAMS, column: tl.constexpr):
    """Load one column of this program's row, anew at each call, as registers are few in loops."""
    return tl.load(PROGRAMS + tl.program_id(0) * PROGRAM_COLUMNS + column, volatile=True)


@triton.jit
def place_field(PLACES, place, column: tl.constexpr):
    """Load one column of a place, anew at each call."""
    return tl.load(PLACES + place * PLACE_COLUMNS + column, volatile=True)


@triton.jit
def rule_field(table, rule, column: tl.constexpr):
    """Load one column of a rule."""
    return tl.load(table + rule * COLUMNS + column)


@triton.jit
def first_key(i, table, rule):
    """Return the earliest key position within reach of query ``i``."""
    shift = rule_field(table, rule, SHIFT)
    return tl.maximum(0, ((i >> shift) - rule_field(table, rule, REACH) + 1) << shift)


@triton.jit
def query_end(j, table, rule):
    """Return the position after the last query within whose reach key ``j`` is."""
    shift = rule_field(table, rule, SHIFT)
    return ((j >> shift) + rule_field(table, rule, REACH)) << shift


@triton.jit
def keys_before(position, k_start, k_step, k_size, k_len):
    """Return how many keys of the tensor are before ``position``."""
    blocks = tl.maximum(position // k_size - k_start, 0)
    inside = (position // k_size >= k_start) & (blocks % k_step == 0)
    keys = (blocks + k_step - 1) // k_step * k_size + tl.where(inside, position % k_size, 0)
    return tl.minimum(keys, k_len)


@triton.jit
def key_position(offset, k_start, k_step, k_size):
    """Return the position of a key; of consecutive keys also of offsets below 0."""
    return tl.where(
        k_size == 1,
        k_start + offset * k_step,
        (k_start + offset // k_size * k_step) * k_size + offset % k_size,
    )


@triton.jit
def in_bands(i, j, table, BANDS: tl.constexpr):
    """Return whether some band reaches from query ``i`` back to key ``j``."""
    seen = i < -j - 1  # False everywhere
    for band in tl.static_range(BANDS):
        shift = rule_field(table, band, SHIFT)
        seen = seen | (((i >> shift) - (j >> shift)) < rule_field(table, band, REACH))
    return seen


@triton.jit
def in_far_rule(i, j, table, rule, RELATIVE: tl.constexpr):
    """Return whether a far rule shows key ``j`` to query ``i``, apart from causality."""
    shift = rule_field(table, rule, SHIFT)
    distance = (i >> shift) - (j >> shift)
    near = (distance < rule_field(table, rule, REACH)) & (j < rule_field(table, rule, STOP))
    phase = tl.maximum(distance, 0) if RELATIVE else j >> shift
    return near & (phase % rule_field(table, rule, STEP) == rule_field(table, rule, RESIDUE))


@triton.jit
def load_tile(
    base, descriptor, offset, length, stride,
    SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    CHECK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Load tokens ``offset`` to ``offset + SIZE`` as ``[SIZE, BLOCK_D]``, zeros outside the tensor.

    Without ``CHECK`` all of these tokens must be in the tensor.
    """
    if TMA:
        x = descriptor.load([offset, 0])
    else:
        tokens = tl.arange(0, SIZE)
        dims = tl.arange(0, BLOCK_D)
        start = base + (tl.full([], 0, tl.int64) + offset) * stride
        pointers = start + tokens[:, None] * stride + dims[None, :]
        inside = (offset + tokens >= 0) & (offset + tokens < length)
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
def store_tile(
    base, offset, length, stride, x,
    SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ADD: tl.constexpr = False,
):  # fmt: skip
    """Store ``x`` ``[SIZE, BLOCK_D]`` from token ``offset`` on, as far as the tensor goes.

    With ``ADD`` it is added to what is there, in fp32.
    """
    tokens = tl.arange(0, SIZE)
    dims = tl.arange(0, BLOCK_D)
    start = base + (tl.full([], 0, tl.int64) + offset) * stride
    pointers = start + tokens[:, None] * stride + dims[None, :]
    inside = (offset + tokens >= 0) & (offset + tokens < length)
    mask = inside[:, None] & (dims < D)[None, :]
    if ADD:
        x += tl.load(pointers, mask=mask, other=0.0)
    tl.store(pointers, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def products_to_logits(
    products, scale, softcap, sigmoid_bias, SOFTCAP: tl.constexpr, SIGMOID: tl.constexpr
):
    """Return the logits, and their slope in the scaled products.

    For softmax in base 2, whose exponential is one instruction; for the sigmoid in base e.
    """
    slope = 1.0
    if SOFTCAP:
        tanh = 2.0 * tl.sigmoid(2.0 * scale / softcap * products) - 1.0
        slope = 1.0 - tanh * tanh
        logits = tanh * softcap
    else:
        logits = products * scale
    logits = logits + sigmoid_bias if SIGMOID else logits * LOG2E
    return logits, slope


@triton.jit
def weights_and_gradient(
    logits, slope, grad_weights, lse, delta, visible, SIGMOID: tl.constexpr, MASK: tl.constexpr
):
    """Return the weights, and the gradient of the scaled products.

    From the final log-sum-exp, in base 2 (FlashAttention, arXiv 2205.14135, algorithm 4).
    """
    p = tl.sigmoid(logits) if SIGMOID else tl.exp2(logits - lse)
    if MASK:
        p = tl.where(visible, p, 0.0)
    ds = p * (1.0 - p) * grad_weights if SIGMOID else p * (grad_weights - delta)
    return p, ds * slope
