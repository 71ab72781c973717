"""The KV schedules, and the schedules that a name in a recipe stands for.

Nothing here imports torch, so that checking a recipe stays fast.
"""

import re
from dataclasses import dataclass

from ...attention.patterns import Pattern, Selector
from .gather import GatherSchedule
from .heads import heads_unsupported_reason
from .kv_schedule import KVSchedule
from .ring import RingSchedule
from .stripes import StripesSchedule

KV_SCHEDULES: dict[str, KVSchedule] = {
    kv_schedule.name: kv_schedule
    for kv_schedule in (RingSchedule(), GatherSchedule(), StripesSchedule())
}
"""The KV schedules by name. A new one is a class and a line here."""

_BY_PREFERENCE = sorted(KV_SCHEDULES, key=lambda name: not KV_SCHEDULES[name].is_preferred)

SCHEDULE_NAMES = ("auto", *_BY_PREFERENCE, "heads", "grid")
"""The words for a schedule in a recipe, besides the members of a grid, as ``heads 4 x ring``."""


@dataclass(frozen=True)
class Schedule:
    """How ranks share an attention.

    =========== =================================================================================
    ``ring``    the keys of one other rank after another (Ring Attention, arXiv 2310.01889)
    ``gather``  all keys at once (Llama 3, arXiv 2407.21783)
    ``stripes`` what a head sees at any distance, head by head, and a halo of what it sees nearby
    ``heads``   heads for tokens, by all-to-all (DeepSpeed-Ulysses, arXiv 2309.14509)
    ``grid``    heads among some successive ranks, and one of the first three between these groups
                (USP, arXiv 2405.07719; distributed multi-head attention, arXiv 2302.06218, is the
                case of a single group)
    =========== =================================================================================

    Args:
        kv_schedule: ``ring``, ``gather`` or ``stripes``, between ranks that have the same heads.
        heads: number of successive ranks that share the heads; 1 if every rank has all of them.
    """

    kv_schedule: str
    heads: int = 1

    def __post_init__(self):
        if self.kv_schedule not in KV_SCHEDULES:
            raise ValueError(
                f"Schedule.kv_schedule must be one of {', '.join(_BY_PREFERENCE)}, "
                f"got {self.kv_schedule!r}"
            )
        if self.heads < 1:
            raise ValueError(f"Schedule.heads must be at least 1, got {self.heads}")

    def __str__(self) -> str:
        if self.heads == 1:
            return self.kv_schedule
        return f"heads {self.heads} x {self.kv_schedule}"

    @property
    def algorithm(self) -> KVSchedule:
        """The KV schedule itself."""
        return KV_SCHEDULES[self.kv_schedule]

    def num_stages(self, ranks: int) -> int:
        """Return the largest number of stages of a plan over ``ranks`` ranks."""
        return self.algorithm.num_stages(ranks // self.heads)

    def unsupported_reason(
        self, ranks: int, pattern: Pattern | Selector | None, num_heads: int, num_kv_heads: int
    ) -> str | None:
        """Return why it cannot do this, and which schedule can, or None if it can.

        Args:
            pattern: None for lists of blocks.
        """
        if ranks % self.heads:
            return f"{ranks} ranks do not split into groups of {self.heads}"
        if self.heads > 1:
            reason = heads_unsupported_reason(num_heads, num_kv_heads, self.heads)
            if reason is not None:
                return f"{reason}; ring supports any number of heads"
            if isinstance(pattern, Selector):
                return (
                    "blocks that are chosen from the content are known for this rank's queries "
                    "only; use ring"
                )
        if self.heads == ranks:  # keys of all tokens are there, and nothing is left to schedule
            return None
        return self.algorithm.unsupported_reason(pattern)


def schedules_named(name: str, ranks: int) -> list[Schedule]:
    """Return the schedules over ``ranks`` ranks that a name in a recipe stands for.

    Raises:
        ValueError: if it is no name of a schedule.
    """
    by_name = {kv_name: [Schedule(kv_name)] for kv_name in _BY_PREFERENCE}
    by_name["heads"] = [Schedule("ring", ranks)]
    by_name["grid"] = [
        Schedule(kv_name, heads)
        for heads in range(2, ranks)
        if ranks % heads == 0
        for kv_name in _BY_PREFERENCE
    ]
    if name == "auto":
        return [schedule for schedules in by_name.values() for schedule in schedules]
    if name in by_name:
        return by_name[name]

    member = re.fullmatch(rf"heads ([1-9]\d*) x ({'|'.join(_BY_PREFERENCE)})", name)
    if member is None:
        raise ValueError(
            f"schedule must be one of {', '.join(SCHEDULE_NAMES)}, or as 'heads 4 x ring'; "
            f"got {name!r}"
        )
    return [Schedule(member[2], int(member[1]))]
