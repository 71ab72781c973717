"""Makes plans, and chooses the schedule that moves the least without slowing a rank."""

import hashlib
from functools import lru_cache
from typing import NamedTuple

from ...attention.patterns import ClosedFormPattern, Pattern, Selector
from ..layout import Layout
from .balance import balance
from .heads import HeadSplit
from .names import Schedule, schedules_named
from .plan import AttentionSpec, BatchRows, Plan, PlanStage, own_keys_stage

_VERSION = 1
"""Part of every plan's key; raised when the same inputs give another plan."""
_MOST_WORK = 1.1
"""Times the work of the most even schedule: fewer bytes do not make up for more."""


@lru_cache(maxsize=64)
def choose_schedule(
    schedule: str | Schedule,
    layout: Layout,
    pattern: Pattern | Selector | None,
    num_heads: int,
    num_kv_heads: int,
    dims: tuple[int, int],
) -> Schedule:
    """Return the schedule of that name that moves the least, in forward and backward together.

    Only schedules that spread the work about as evenly as any are considered; of equal ones the
    schedule that holds the least is chosen.

    Args:
        schedule: a name as in a recipe, or the only schedule to consider.
        pattern: None for lists of blocks.
        num_heads, num_kv_heads: of the whole attention.
        dims: of a key and of a value.

    Raises:
        ValueError: if no schedule of that name can do this.
    """
    if isinstance(schedule, Schedule):
        candidates = [schedule]
    else:
        candidates = schedules_named(schedule, layout.ranks)

    reasons = {
        candidate: candidate.unsupported_reason(layout.ranks, pattern, num_heads, num_kv_heads)
        for candidate in candidates
    }
    supported = [candidate for candidate in candidates if not reasons[candidate]]
    if not supported:
        no_grid = (
            f"{layout.ranks} ranks do not split into groups "
            "of more than one rank and fewer than all"
        )
        reason = next(iter(reasons.values()), no_grid)
        raise ValueError(f"schedule {schedule} cannot do this: {reason}")
    if len(supported) == 1:
        return supported[0]

    work = {
        candidate: balance(candidate, layout, pattern, num_heads, num_kv_heads)
        for candidate in supported
    }
    most_work = _MOST_WORK * min(work.values())
    even = [candidate for candidate in supported if work[candidate] <= most_work]
    return min(
        even, key=lambda candidate: cost(candidate, layout, pattern, num_heads, num_kv_heads, dims)
    )


class Cost(NamedTuple):
    """What a schedule costs the rank that has most of it, for a sequence of one document.

    In numbers of the dtype of keys and values.
    """

    received: int
    """In forward and backward together."""
    buffer: int
    """Keys and values of other ranks that are held at a time."""


@lru_cache(maxsize=256)
def cost(
    schedule: Schedule,
    layout: Layout,
    pattern: Pattern | Selector | None,
    num_heads: int,
    num_kv_heads: int,
    dims: tuple[int, int],
) -> Cost:
    """Return what a schedule costs; the arguments are those of :func:`choose_schedule`.

    Only the first, the middle and the last rank are planned. All ranks look at the same ones, so
    that all choose the same schedule.
    """
    closed_form = pattern if isinstance(pattern, ClosedFormPattern) else None
    rows = (BatchRows(0, 1, (0,), layout.length),)
    plans = [
        make_plan(layout, closed_form, num_heads, num_kv_heads, rows, schedule, rank)
        for rank in sorted({0, layout.ranks // 2, layout.ranks - 1})
    ]
    return Cost(
        received=max(sum(traffic.received for traffic in plan.traffic(*dims)) for plan in plans),
        buffer=max(plan.buffer(*dims) for plan in plans),
    )


def make_plan(
    layout: Layout,
    pattern: ClosedFormPattern | None,
    num_heads: int,
    num_kv_heads: int,
    rows: tuple[BatchRows, ...],
    schedule: Schedule,
    rank: int,
) -> Plan:
    """Return what ``rank`` does. ``pattern`` is None for lists of blocks: any key may be seen."""
    group_size = schedule.heads
    group = rank // group_size  # ranks of a group share the heads

    head_split = None
    first_kv_head = 0
    own_kv_heads = num_kv_heads
    if group_size > 1:
        rank_in_group = rank % group_size
        head_split = _head_split(
            layout, group * group_size, group_size, rank_in_group, num_heads, num_kv_heads
        )
        first_kv_head = head_split.own_kv_heads.start
        own_kv_heads = head_split.own_kv_heads.stop - first_kv_head

    all_rules = []
    own_pattern = pattern
    if pattern is not None:
        all_rules = [rule for head in range(num_kv_heads) for rule in pattern.rules(head)]
        own_pattern = pattern.from_head(first_kv_head) if first_kv_head else pattern
    spec = AttentionSpec(
        layout=layout.grouped(group_size),
        pattern=own_pattern,
        num_kv_heads=own_kv_heads,
        rows=rows,
        model_has_near_rules=any(rule.reach is not None for rule in all_rules),
        model_has_far_rules=any(rule.reach is None for rule in all_rules),
    )
    stages: tuple[PlanStage, ...]
    if spec.layout.ranks == 1:
        stages = (own_keys_stage(spec, group),)
    else:
        stages = tuple(schedule.algorithm.stages(spec, group))
    return Plan(
        batch_size=spec.batch_size,
        rank=group,
        stages=stages,
        head_split=head_split,
        first_kv_head=first_kv_head,
        peers=range(rank % group_size, layout.ranks, group_size),
        key=_plan_key(layout, pattern, num_heads, num_kv_heads, rows, schedule),
    )


plan_attention = lru_cache(maxsize=16)(make_plan)
"""Kept for the layers of a step. A plan holds indices on the device, so not for long."""


@lru_cache(maxsize=8)
def _head_split(
    layout: Layout, first: int, size: int, rank: int, num_heads: int, num_kv_heads: int
) -> HeadSplit:
    return HeadSplit(layout, range(first, first + size), rank, num_heads, num_kv_heads)


def _plan_key(
    layout: Layout,
    pattern: ClosedFormPattern | None,
    num_heads: int,
    num_kv_heads: int,
    rows: tuple[BatchRows, ...],
    schedule: Schedule,
) -> int:
    """Return a number of all that a plan depends on, except the rank.

    Its text is spelled out, since keys must not change when a class or a field is renamed.
    """
    texts = [
        f"Rows(first={group.first_row}, stop={group.stop_row}, "
        f"starts={group.document_starts}, length={group.length})"
        for group in rows
    ]
    rows_text = f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"
    schedule_text = f"Schedule(way={schedule.kv_schedule!r}, heads={schedule.heads})"
    return _number_of_text(
        f"({_VERSION}, {layout!r}, {pattern!r}, {num_heads}, {num_kv_heads}, "
        f"{rows_text}, {schedule_text})"
    )


def key_of(*values: object) -> int:
    """Return a number that is the same on every rank for values that print the same."""
    return _number_of_text(repr(values))


def _number_of_text(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
