"""The inverse that the delta rule needs in each chunk (UT transform, arXiv 2406.06484 sec. 3)."""

import triton
import triton.language as tl

_SIZE = tl.constexpr(16)
"""Rows of the blocks that are inverted row by row."""


@triton.jit
def unit_lower_inverse(below, CHUNK: tl.constexpr, MERGES: tl.constexpr):
    """Return ``(I + below)^-1`` of a strictly lower triangular ``[CHUNK, CHUNK]``, fp32.

    Blocks of 16 on the diagonal first, by forward substitution. Then pairs of neighbors are merged,
    ``MERGES`` times, until there is one: the inverse of ``[[A, 0], [N, B]]`` is ``[[A', 0], [-B' N
    A', B']]`` with the inverses ``A'`` and ``B'``. Powers of ``below`` are not formed: they may
    grow huge before they cancel. Products are in TF32, more precise than what is made of the
    result; fp32 has chunks of 16, and no products.
    """
    BLOCKS: tl.constexpr = CHUNK // _SIZE
    block = tl.arange(0, BLOCKS)
    is_diagonal = block[:, None, None, None] == block[None, None, :, None]
    # [blocks, 16, 16]
    diagonal = tl.sum(
        tl.where(is_diagonal, tl.reshape(below, [BLOCKS, _SIZE, BLOCKS, _SIZE]), 0.0), 2
    )
    row = tl.arange(0, _SIZE)[None, :, None]
    column = tl.arange(0, _SIZE)[None, None, :]
    inverse = tl.where(row == column, 1.0, 0.0) + tl.zeros_like(diagonal)
    for n in range(1, _SIZE):
        factors = tl.sum(tl.where(row == n, diagonal, 0.0), 1)  # [blocks, 16], 0 from n on
        known = tl.sum(factors[:, :, None] * inverse, 1)
        inverse = tl.where(row == n, inverse - known[:, None, :], inverse)

    # [CHUNK, CHUNK]
    inverse = tl.where(is_diagonal, inverse[:, :, None, :], 0.0)
    inverse = tl.reshape(inverse, [CHUNK, CHUNK])
    i = tl.arange(0, CHUNK)
    for merge in tl.static_range(MERGES):
        block = i // (_SIZE << merge)
        is_between = (block[:, None] == block[None, :] + 1) & (block % 2 == 1)[:, None]
        between = tl.where(is_between, below, 0.0)
        inverse -= tl.dot(tl.dot(inverse, between), inverse)
    return inverse
