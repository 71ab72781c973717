"""The gradient of one decay per head, or per token and head, of the chunk scan."""

import triton
import triton.language as tl

from .pieces import load_piece


@triton.jit(do_not_specialize=["length"])
def decay_gradient_kernel(TOKEN_DOTS, EDGE_DOTS, SEGMENTS, OUT, length, CHUNK: tl.constexpr):
    """Compute the decays' gradient in a segment of one head, from the last token to the first.

    ``TOKEN_DOTS``: ``q . dq - k . dk`` of each token, ``[batch, time, heads]``. ``EDGE_DOTS``:
    ``<S, dS>`` at the segments' edges, ``[slots, heads]``. ``OUT``: ``[batch, time, heads]``.
    """
    h = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    b, start, stop, before, after = load_piece(SEGMENTS, tl.program_id(0))
    i = tl.arange(0, CHUNK)
    first_token = b * length * heads + h  # of [batch, time, heads]
    # The gradient at the token after the chunk.
    gradient_after = tl.load(EDGE_DOTS + after * heads + h, mask=after >= 0, other=0.0).to(
        tl.float64
    )

    chunks = tl.cdiv(stop - start, CHUNK)
    for n in range(chunks):
        t = start + (chunks - 1 - n) * CHUNK
        in_segment = t + i < stop
        tokens = first_token + (t + i).to(tl.int64) * heads
        dots = tl.load(TOKEN_DOTS + tokens, mask=in_segment, other=0.0)
        gradient = tl.sum(tl.where(i[:, None] <= i[None, :], dots[None, :], 0.0), 1)
        gradient += gradient_after
        gradient_after += tl.sum(dots)
        # The state before a document's first token is 0, so its decay changes nothing.
        gradient = tl.where((t + i == start) & (before < 0), 0.0, gradient)
        tl.store(OUT + tokens, gradient.to(tl.float32), mask=in_segment)
