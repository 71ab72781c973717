"""How evenly a schedule spreads the work of an attention over the ranks."""

from functools import lru_cache

import numpy as np

from ...attention.patterns import Causal, ClosedFormPattern, Pattern, Rule, Selector
from ..layout import Layout
from .names import Schedule


@lru_cache(maxsize=256)
def balance(
    schedule: Schedule,
    layout: Layout,
    pattern: Pattern | Selector | None,
    num_heads: int,
    num_kv_heads: int,
) -> float:
    """Return the work of the rank that has most, over the mean of all ranks.

    Work is the number of visible (query, key) pairs of a sequence of one document.

    Args:
        pattern: None for lists of blocks. These, and blocks that are chosen from the content, are
            counted as if a query saw all keys before it.
        num_heads, num_kv_heads: of the whole attention.
    """
    counted = pattern if isinstance(pattern, ClosedFormPattern) else Causal()
    pairs = _pairs_of_ranks(counted, layout, num_kv_heads)  # [kv_heads, ranks]

    # Each group of ranks has the same tokens, those of all of its ranks ...
    per_kv_head = pairs.reshape(num_kv_heads, -1, schedule.heads).sum(-1)  # [kv_heads, groups]
    per_head = np.repeat(per_kv_head, num_heads // num_kv_heads, 0)  # [heads, groups]
    # ... and each rank of a group has its share of the query heads.
    work = per_head.reshape(schedule.heads, -1, per_head.shape[1]).sum(1)
    return float(work.max() / work.mean())


@lru_cache(maxsize=8)
def _pairs_of_ranks(pattern: ClosedFormPattern, layout: Layout, num_kv_heads: int) -> np.ndarray:
    """Count the visible (query, key) pairs of each KV head: float64 ``[kv_heads, ranks]``."""
    pairs_of_rules: dict[tuple[Rule, ...], np.ndarray] = {}
    for head in range(num_kv_heads):
        rules = pattern.rules(head)
        if rules not in pairs_of_rules:
            visible = pattern.visible_keys(layout.length, head)
            per_segment = np.add.reduceat(visible, layout.segment_starts)
            pairs_of_rules[rules] = np.bincount(layout.segment_ranks, per_segment, layout.ranks)
    return np.stack([pairs_of_rules[pattern.rules(head)] for head in range(num_kv_heads)])
