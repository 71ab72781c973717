"""How kernels load tiles of tokens, and sum up decays that all key dims share."""

import triton
import triton.language as tl

from ...triton_device import LOG2E

# exp() is 0 in fp32 from here on: stronger decays would only take digits from the others in their
# sums.
STRONGEST = tl.constexpr(-104.0)
# A chunk's sums of decays have two parts: multiples of 1/256, exact in fp32, and what is left.
# Differences of sums are then as exact as if only the decays between had been added up.
_COARSE = tl.constexpr(256.0)


@triton.jit
def load_rows(X, offsets, in_chunk, first_dim, D: tl.constexpr, BLOCK: tl.constexpr):
    """Load ``BLOCK`` of the ``D`` dims of tokens at ``offsets`` (int64): ``[tokens, BLOCK]``.

    Zeros are beyond the chunk and beyond the last dim.
    """
    dims = first_dim + tl.arange(0, BLOCK)
    mask = in_chunk[:, None]
    if D % BLOCK:
        mask = mask & (dims < D)[None, :]
    return tl.load(X + offsets[:, None] + dims[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(X, offsets, in_chunk, first_dim, x, D: tl.constexpr, BLOCK: tl.constexpr):
    """Store what :func:`load_rows` would load."""
    dims = first_dim + tl.arange(0, BLOCK)
    mask = in_chunk[:, None]
    if D % BLOCK:
        mask = mask & (dims < D)[None, :]
    tl.store(X + offsets[:, None] + dims[None, :], x.to(X.dtype.element_ty), mask=mask)


@triton.jit
def state_tile(slot, head, heads, first_key, first_value, D, DV, BLOCK, BLOCK_V):
    """Return offsets and mask of a tile of the states ``[slots, heads, D, DV]``.

    The mask is empty if ``slot`` is -1.
    """
    keys = first_key + tl.arange(0, BLOCK)
    values = first_value + tl.arange(0, BLOCK_V)
    state = (slot.to(tl.int64) * heads + head) * (D * DV)
    mask = (keys < D)[:, None] & (values < DV)[None, :] & (slot >= 0)
    return state + keys[:, None] * DV + values[None, :], mask


@triton.jit
def load_decay_sums(DECAY, tokens, head, start, stop, CHUNK: tl.constexpr, PER_TOKEN: tl.constexpr):
    """Load a chunk's log-decays and add them up.

    A sum is ``(coarse + fine) * rate``, to base 2. Differences of two sums are exact if those of
    their parts are taken first.

    Args:
        DECAY: ``[batch, time, heads]`` with ``PER_TOKEN``, else ``[heads]``.
        tokens: int64 offsets of the chunk's tokens in ``[batch, time, heads]``.

    Returns:
        The two parts of the sums up to each token, those of the sum of all, and the rate.
    """
    t = start + tl.arange(0, CHUNK)
    if PER_TOKEN:
        decay = tl.load(DECAY + tokens, mask=t < stop, other=0.0)
        decay = tl.maximum(decay, STRONGEST, propagate_nan=tl.PropagateNan.ALL)
        decay_coarse = tl.floor(decay * _COARSE) / _COARSE
        coarse = tl.cumsum(decay_coarse, 0)
        fine = tl.cumsum(decay - decay_coarse, 0)
        coarse_total = tl.sum(decay_coarse, 0)
        fine_total = tl.sum(decay - decay_coarse, 0)
        rate = LOG2E
    else:
        coarse_total = tl.minimum(stop - start, CHUNK).to(tl.float32)
        fine_total = 0.0
        coarse = tl.minimum(tl.arange(0, CHUNK) + 1.0, coarse_total)
        fine = tl.zeros([CHUNK], tl.float32)
        rate = tl.load(DECAY + head) * LOG2E
    return coarse, fine, coarse_total, fine_total, rate
