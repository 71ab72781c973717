"""How evenly a schedule spreads the work of an attention."""

from functools import lru_cache

import numpy as np

from ...attention.patterns import Causal, ClosedFormPattern, Pattern
from ...attention.patterns.rules import Rule
from ...attention.patterns.selection import Selector
from ..layout import Layout
from .names import Schedule


@lru_cache(maxsize=256)
def balance(
    schedule: Schedule,
    layout: Layout,
    pattern: Pattern | Selector | None,
    heads: int,
    kv_heads: int,
) -> float:
    """Pairs of query and key that the rank with most computes, over the mean of all ranks, for a sequence of one document.

    Args:
        pattern: None for lists of blocks; these, and blocks that are chosen from the content, are reckoned as if all earlier
            keys were seen.
        heads, kv_heads: of the whole attention.
    """
    pairs = _pairs(
        pattern if isinstance(pattern, ClosedFormPattern) else Causal(), layout, kv_heads
    )
    rows = pairs.reshape(kv_heads, -1, schedule.heads).sum(-1)  # ranks in a row share their tokens,
    per_query_head = np.repeat(rows, heads // kv_heads, 0)
    work = per_query_head.reshape(schedule.heads, -1, rows.shape[1]).sum(
        1
    )  # and each takes some of the query heads
    return float(work.max() / work.mean())


@lru_cache(maxsize=8)
def _pairs(pattern: ClosedFormPattern, layout: Layout, kv_heads: int) -> np.ndarray:
    """Of each KV head and rank, those of its tokens' queries: float64 ``[kv_heads, ranks]``."""
    found: dict[tuple[Rule, ...], np.ndarray] = {}
    for head in range(kv_heads):
        if pattern.rules(head) not in found:
            segments = np.add.reduceat(
                pattern.visible_keys(layout.length, head), layout.segment_starts
            )
            found[pattern.rules(head)] = np.bincount(layout.segment_ranks, segments, layout.ranks)
    return np.stack([found[pattern.rules(head)] for head in range(kv_heads)])
