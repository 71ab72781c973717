"""The plan of a schedule, and of the schedules of a name the one that moves the least without slowing any rank."""

import hashlib
from functools import lru_cache
from typing import NamedTuple

from ...attention.patterns import ClosedFormPattern, Pattern
from ...attention.patterns.selection import Selector
from ..layout import Layout
from . import ways
from .balance import balance
from .heads import HeadExchange
from .names import Schedule, named, unsupported_reason
from .plan import AttentionSpec, BatchRows, Plan

_STAGES = {"stripes": ways.stripes, "ring": ways.ring, "gather": ways.gather}
_VERSION = 1  # of the plans: part of their key
_EVEN = 1.1  # times the work of the most even schedule: more is not made good by fewer bytes


@lru_cache(maxsize=64)
def choose_schedule(
    schedule: str | Schedule,
    layout: Layout,
    pattern: Pattern | Selector | None,
    heads: int,
    kv_heads: int,
    dims: tuple[int, int],
) -> Schedule:
    """The one of that name that moves the least, forward and backward, of those that spread the work about as evenly as any;
    of equals the one that holds the least.

    Args:
        pattern: None for lists of blocks.
        dims: of keys and of values.

    Raises:
        ValueError: where none can do this.
    """
    candidates = [schedule] if isinstance(schedule, Schedule) else named(schedule, layout.ranks)
    reasons = {
        one: unsupported_reason(one, layout.ranks, pattern, heads, kv_heads) for one in candidates
    }
    able = [one for one in candidates if not reasons[one]]
    if not able:
        reason = next(
            iter(reasons.values()),
            f"{layout.ranks} ranks have no rows of more than one and fewer than all",
        )
        raise ValueError(f"schedule {schedule} cannot do this: {reason}")
    if len(able) == 1:
        return able[0]
    work = {one: balance(one, layout, pattern, heads, kv_heads) for one in able}
    even = [one for one in able if work[one] <= _EVEN * min(work.values())]
    return min(even, key=lambda one: cost(one, layout, pattern, heads, kv_heads, dims))


class Cost(NamedTuple):
    """Of the rank that has most of it, for a sequence of one document: numbers of the dtype of keys and values."""

    received: int
    """Forward and backward."""
    buffer: int
    """Keys and values of others that are held at a time."""


@lru_cache(maxsize=256)
def cost(
    schedule: Schedule,
    layout: Layout,
    pattern: Pattern | Selector | None,
    heads: int,
    kv_heads: int,
    dims: tuple[int, int],
) -> Cost:
    """What a schedule takes; the arguments are those of :func:`choose_schedule`.

    Of a few ranks, the same for every rank to look at, so that all choose the same.
    """
    rows, closed_form = (
        (BatchRows(0, 1, (0,), layout.length),),
        pattern if isinstance(pattern, ClosedFormPattern) else None,
    )
    plans = [
        make_plan(layout, closed_form, heads, kv_heads, rows, schedule, rank)
        for rank in sorted({0, layout.ranks // 2, layout.ranks - 1})
    ]
    return Cost(
        max(sum(traffic.received for traffic in plan.traffic(*dims)) for plan in plans),
        max(plan.buffer(*dims) for plan in plans),
    )


def make_plan(
    layout: Layout,
    pattern: Pattern | None,
    heads: int,
    kv_heads: int,
    rows: tuple[BatchRows, ...],
    schedule: Schedule,
    rank: int,
) -> Plan:
    """What ``rank`` does. ``pattern`` is None for lists of blocks, of which any may be seen."""
    size = schedule.heads
    own, first, own_kv_heads = None, 0, kv_heads
    if size > 1:
        own = _head_exchange(layout, rank // size * size, size, rank % size, heads, kv_heads)
        first = own.kv_heads[own.rank].start
        own_kv_heads = own.kv_heads[own.rank].stop - first
    rules = (
        []
        if pattern is None
        else [rule for head in range(kv_heads) for rule in pattern.rules(head)]
    )
    problem = AttentionSpec(
        layout.grouped(size),
        pattern.from_head(first) if pattern is not None and first else pattern,
        own_kv_heads,
        rows,
        near=any(rule.reach is not None for rule in rules),
        far=any(rule.reach is None for rule in rules),
    )
    stages = ways.own_keys if problem.layout.ranks == 1 else _STAGES[schedule.way]
    peers = range(rank % size, layout.ranks, size)
    key = key_of(_VERSION, layout, pattern, heads, kv_heads, rows, schedule)
    return Plan(
        problem.batch, rank // size, tuple(stages(problem, rank // size)), own, first, peers, key
    )


plan_attention = lru_cache(maxsize=16)(make_plan)
"""Kept for the layers of a step. A plan holds indices on the device, so not for long."""


@lru_cache(maxsize=8)
def _head_exchange(
    layout: Layout, first: int, size: int, rank: int, heads: int, kv_heads: int
) -> HeadExchange:
    return HeadExchange(layout, range(first, first + size), rank, heads, kv_heads)


def key_of(*what: object) -> int:
    """The same number on every rank for what prints the same."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:7])
