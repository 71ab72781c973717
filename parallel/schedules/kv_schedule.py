"""What a KV schedule has to say about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from ...attention.patterns import Pattern, Selector

if TYPE_CHECKING:
    from .plan import AttentionSpec, PlanStage


class KVSchedule(ABC):
    """A way in which keys and values reach the queries of other ranks.

    To add one, write a subclass in a module of its own and add it to
    :data:`~longspan.parallel.schedules.names.KV_SCHEDULES`.
    """

    name: ClassVar[str]
    """Its name in recipes."""
    is_preferred: ClassVar[bool] = False
    """Whether it is chosen over others that move and hold the same."""

    def unsupported_reason(self, pattern: Pattern | Selector | None) -> str | None:
        """Return why it cannot do the pattern, and which schedule can, or None if it can.

        Args:
            pattern: None for lists of blocks.
        """
        return None

    @abstractmethod
    def num_stages(self, ranks: int) -> int:
        """Return the largest number of stages of a plan, which is what making it costs."""

    @abstractmethod
    def stages(self, spec: AttentionSpec, rank: int) -> Iterator[PlanStage]:
        """Yield the stages of one rank of at least two.

        Each pair of a query and a key that it sees must be in exactly one tile. All tiles of a
        query except one, its first in the order of the stages, have ``is_first = False``.
        """
