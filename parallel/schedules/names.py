"""Which ways keys, or heads, may move between ranks, by name. Without torch, so that recipes are checked at once."""

import re
from dataclasses import dataclass

from ...attention.patterns import ClosedFormPattern, Pattern
from ...attention.patterns.selection import Selector

WAYS = ("stripes", "ring", "gather")


@dataclass(frozen=True)
class Schedule:
    """How ranks share an attention.

    ==========  ======================================================================================================
    ``ring``    keys of one other rank after another (Ring Attention, arXiv 2310.01889)
    ``gather``  all keys at once (Llama 3, arXiv 2407.21783)
    ``stripes`` what a head sees however far, head by head, and a halo of what it sees nearby
    ``heads``   heads for tokens, by all-to-all (DeepSpeed-Ulysses, arXiv 2309.14509)
    ``grid``    heads among some ranks in a row, and one of the first three between these rows (USP, arXiv 2405.07719;
                distributed multi-head attention, arXiv 2302.06218, is the case of a single row)
    ==========  ======================================================================================================

    Args:
        way: ``ring``, ``gather`` or ``stripes``, between ranks that have the same heads.
        heads: ranks in a row that share the heads; 1 for none of it.
    """

    way: str
    heads: int = 1

    def __post_init__(self):
        if self.way not in WAYS:
            raise ValueError(f"Schedule.way must be one of {', '.join(WAYS)}, got {self.way!r}")
        if self.heads < 1:
            raise ValueError(f"Schedule.heads must be at least 1, got {self.heads}")

    def __str__(self) -> str:
        return self.way if self.heads == 1 else f"heads {self.heads} x {self.way}"


NAMES = ("auto", *WAYS, "heads", "grid")


def named(name: str, ranks: int) -> list[Schedule]:
    """The schedules that a name, as a recipe has it, stands for on so many ranks.

    Raises:
        ValueError: for what is no name.
    """
    grids = [Schedule(way, size) for size in range(2, ranks) if ranks % size == 0 for way in WAYS]
    known = {way: [Schedule(way)] for way in WAYS} | {
        "heads": [Schedule("ring", ranks)],
        "grid": grids,
    }
    if name == "auto":
        return [schedule for schedules in known.values() for schedule in schedules]
    given = re.fullmatch(rf"heads ([1-9]\d*) x ({'|'.join(WAYS)})", name)
    if name not in known and not given:
        raise ValueError(
            f"schedule must be one of {', '.join(NAMES)}, or as 'heads 4 x ring'; got {name!r}"
        )
    return [Schedule(given[2], int(given[1]))] if given else known[name]


def unsupported_reason(
    schedule: Schedule, ranks: int, pattern: Pattern | Selector | None, heads: int, kv_heads: int
) -> str | None:
    """Why a schedule cannot do this, and which can; or None. ``pattern`` is None for lists of blocks."""
    if ranks % schedule.heads:
        return f"{ranks} ranks do not split into rows of {schedule.heads}"
    if schedule.heads > 1 and (reason := heads_refusal(heads, kv_heads, schedule.heads)):
        return f"{reason}; ring takes any"
    if isinstance(pattern, Selector) and schedule.heads > 1:
        return "blocks that are chosen from the content are known for this rank's queries alone; take ring"
    if (
        not isinstance(pattern, ClosedFormPattern)
        and schedule.way == "stripes"
        and schedule.heads < ranks
    ):
        return "lists of blocks have no stripes; take ring"
    return None


def heads_refusal(heads: int, kv_heads: int, ranks: int) -> str | None:
    """Why so many ranks cannot share the heads, or None."""
    if heads % ranks:
        return f"{heads} query heads do not split over {ranks} ranks"
    if kv_heads % ranks and ranks % kv_heads:
        return f"{kv_heads} KV heads neither split over {ranks} ranks nor the ranks over them"
    return None
